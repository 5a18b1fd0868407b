"""Packed: a weight that is only read in, products with a few rows at a time out, from the same numbers laid out for that, or from 8 or
4 bits each.

Where tokens are made one by one, each step multiplies every weight with one row, or as many as there are texts: reading the weights is
what it costs. On a CPU only, where torch's kernels for this are; there are no gradients.
Dims: N rows, I inputs, O outputs; filled up with zeros P outputs, a multiple of 16, and Q inputs, G = Q / 32 groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # inputs that share a scale and a least value: the blocks of GGUF's Q4_0 and Q4_1, whose values int4 finds again
ROWS = 16  # of products that the layout of float32 is chosen for; one row takes no longer with it
_onednn = torch.ops.mkldnn


class Packed(nn.Module):
    """A Linear that is only read; `packed` makes it.

    float32:  the same numbers in the order in which oneDNN reads them
    int8:     whole numbers with a scale for each output, so that the largest is 127; arXiv:2208.07339 section 2
    int4:     whole numbers from 0 to 15 with a scale and a least value for each group of 32 inputs; inputs of both are rounded to
              bfloat16, sums are float32
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.outputs, self.kind = linear.out_features, kind
        weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach()
        if kind == "float32":
            self.weight = _onednn._reorder_linear_weight(weight.contiguous(), ROWS)
            return
        self.short = -weight.shape[1] % GROUP
        weight = F.pad(weight, (0, self.short, 0, -len(weight) % 16))  # (P, Q): the kernels read beyond their end otherwise
        self.weight, self.scales = _int8(weight) if kind == "int8" else _int4(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, I) float32.  returns: (N, O)"""
        y: Tensor
        if self.kind == "float32":
            y = _onednn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        rounded = (F.pad(x, (0, self.short)) if self.short else x).bfloat16()
        if self.kind == "int8":
            y = torch._weight_int8pack_mm(rounded, self.weight, self.scales).float()
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rounded, self.weight, GROUP, self.scales).float()
        y = y if y.shape[1] == self.outputs else y[:, : self.outputs]
        return y if self.bias is None else y + self.bias


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: (P, Q).  returns: (P, Q) int8, and (P,) bfloat16"""
    scale = (weight.abs().amax(1) / 127).bfloat16()
    whole = (weight / scale.float().clamp(min=1e-30)[:, None]).round().clamp(-127, 127)
    return whole.to(torch.int8), scale


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: (P, Q).  returns: what torch makes of as many numbers, and (G, P, 2) bfloat16: of a number n comes (n - 8) · first + second"""
    groups = weight.unflatten(1, (-1, GROUP))  # (P, G, 32)
    least, most = groups.aminmax(dim=-1)
    scale = ((most - least) / 15).clamp(min=1e-30)
    whole = ((groups - least[..., None]) / scale[..., None]).round().to(torch.int32)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.flatten(1), 1)
    return packed, torch.stack([scale, least + 8 * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()


def packed(linear: nn.Module, kind: str) -> nn.Module:
    """A float32 Linear on a CPU → the kind that is asked for; anything else as it is."""
    if not isinstance(linear, nn.Linear) or linear.weight.device.type != "cpu" or linear.weight.dtype != torch.float32:
        return linear
    if kind == "float32" and not torch.backends.mkldnn.is_available():
        return linear
    return Packed(linear, kind)
