"""Feed-forward: each token's vector in, a vector of the same width out, through one wide layer. No token sees another.

Dims: N tokens end to end, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)); the rows of gate and up are one matrix, gate first: one product, not two.

    source:  gated units arXiv:2002.05202 section 2
    """

    def __init__(self, width: int, hidden: int, *, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activate, self.gated = ACTIVATIONS[activation], gated
        self.up = nn.Linear(width, 2 * hidden if gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, D).  returns: (N, D)"""
        hidden = self.up(x)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)  # (N, F) each
            hidden = self.activate(gate) * up
        else:
            hidden = self.activate(hidden)
        out: Tensor = self.down(hidden)
        return out
