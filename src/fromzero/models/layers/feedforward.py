"""Feed-forward: each token's vector in, a vector of the same width out, through one wide layer. No token sees another.

Dims: N tokens end to end, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_aten = torch.ops.aten
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # gradient of the activation and its input → gradient of its input
    "gelu": _aten.gelu_backward,
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    "relu": lambda gradient, x: _aten.threshold_backward(gradient, x, 0),
    "silu": _aten.silu_backward,
}


class FeedForward(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)); the rows of gate and up are one matrix, gate first: one product, not two.

    source:  gated units arXiv:2002.05202 section 2
    """

    def __init__(self, width: int, hidden: int, *, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.up = nn.Linear(width, 2 * hidden if gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, D).  returns: (N, D)"""
        wide = self.up(x)  # (N, F), or gated (N, 2 F)
        if not self.gated:
            hidden = ACTIVATIONS[self.activation](wide)
        elif torch.is_grad_enabled():
            hidden = _Gate.apply(wide, self.activation)  # type: ignore[no-untyped-call]
        else:
            hidden = _gated(wide, self.activation)
        out: Tensor = self.down(hidden)
        return out


def _gated(wide: Tensor, activation: str) -> Tensor:
    """wide: (N, 2 F), the gate's half first.  returns: (N, F)"""
    gate, up = wide.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


class _Gate(torch.autograd.Function):
    """act(gate) · up, which keeps what came in alone: act(gate) is cheaper computed again than kept."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, activation: str) -> Tensor:
        """wide: (N, 2 F), the gate's half first"""
        ctx.save_for_backward(wide)
        ctx.activation = activation
        return _gated(wide, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (wide,) = ctx.saved_tensors
        gate, up = wide.chunk(2, dim=-1)
        return torch.cat([BACKWARD[ctx.activation](gradient * up, gate), gradient * ACTIVATIONS[ctx.activation](gate)], dim=-1), None
