"""Quantised Linears: a weight in, 8 or 4 bits a value out, and its values again where it is used. Plain torch, for every device.

For a weight that stands still: what reads it has gradients, it has none.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = {"8bit": 8, "4bit": 4}
BLOCK = 64  # values along the input that share a scale, at 4 bits


def nf4_levels() -> list[float]:
    """The 16 values of NormalFloat4, from -1 to 1: quantiles of the normal distribution, zero among them.

    source: arXiv:2305.14314 section 3 and appendix E: 8 steps upwards and 7 downwards from the middle to the quantile 1 - δ,
            δ = (1/32 + 1/30) / 2
    """
    outer = 0.5 - (1 / 32 + 1 / 30) / 2
    below, above = ([NormalDist().inv_cdf(0.5 + outer * i / steps) for i in range(steps + 1)] for steps in (7, 8))
    return [-value / above[-1] for value in reversed(below)] + [value / above[-1] for value in above[1:]]


class QuantizedLinear(nn.Module):
    """A frozen Linear whose weight is kept as whole numbers and scales, and is whole only while a product is computed.

    packed:  8 bits: (out, in) int8, with a scale for each row, so that the largest is 127
             4 bits: (out, blocks · 32) uint8, two values a byte, the first in the high half, with a scale for each block of 64
    scale:   (out, 1) or (out, blocks), float32 at least
    source:  arXiv:2208.07339 section 2; arXiv:2305.14314 section 3, without its second quantisation of the scales
    """

    packed: Tensor
    scale: Tensor
    pairs: Tensor

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        weight = linear.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if bits == 4:
            levels = torch.tensor(nf4_levels()).to(weight)
            both = torch.cartesian_prod(levels, levels)  # (256, 2): what each byte stands for
            self.register_buffer("pairs", both, persistent=False)
            blocks = F.pad(weight, (0, -self.in_features % BLOCK)).unflatten(1, (-1, BLOCK))  # (out, blocks, 64)
            scale = blocks.abs().amax(-1, keepdim=True)
            codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
            packed, scale = (codes[..., ::2] << 4 | codes[..., 1::2]).flatten(1), scale.flatten(1)
        else:
            scale = weight.abs().amax(1, keepdim=True) / 127
            packed = (weight / scale).round().to(torch.int8)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """(out, in) in the type of the scales, made anew at each call"""
        if self.bits == 8:
            return self.packed * self.scale
        blocks = F.embedding(self.packed.int(), self.pairs).view(*self.scale.shape, BLOCK)  # (out, blocks, 64)
        return (blocks * self.scale[..., None]).flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in).  returns: (…, out) in the type of x"""
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    """x Wᵀ + bias; W is made again in the backward pass, so that nothing of its size is kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None
