"""Rotary positions: each token's place in its document in, cosines and sines out; and queries or keys turned by them.

Dims: N tokens end to end, H heads, K head width, R turned part of the head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, inverse: Tensor, *, magnitude: float = 1.0, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions: (N,) int64.  inverse: (R/2,) frequencies in radians a token.  returns: cosines and sines, (N, 1, R/2) each"""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    turn = positions[:, None, None].to(wide) * inverse.to(wide)  # (N, 1, R/2)
    return (turn.cos() * magnitude).to(dtype), (turn.sin() * magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first R of the K values of each head.

    interleaved: pairs are neighbours (0, 1), (2, 3) … as in the paper; else halves (0, R/2), (1, R/2 + 1) …
    x:           (N, H, K)
    source:      arXiv:2104.09864 section 3.2.2
    """
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]  # (N, H, R/2)
        pair = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        pair = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return pair if not rest.shape[-1] else torch.cat([pair, rest], dim=-1)
