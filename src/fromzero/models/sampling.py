"""Sampling: scores of the next token in, one token out. Knows no model and no text.

Dims: V vocabulary, M tokens that are drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw(
    scores: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator, min_p: float | None = None
) -> int:
    """scores: (V,); the rest as in Sampling.  returns: the id of one token"""
    if temperature == 0:
        return int(scores.argmax())
    shares, order = shares_of(scores.double(), temperature, top_k, top_p, min_p)
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def shares_of(scores: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> tuple[Tensor, Tensor]:
    """scores: (V,) float64.  returns: (M,) shares of the tokens that are drawn from, the best first, and (V,) all ids in that order"""
    best, order = ((scores - scores.max()) / temperature).sort(descending=True)  # the best is 0: a tiny temperature gives no infinity
    shares = best[:top_k].softmax(dim=0)
    if top_p is not None:
        shares = shares[shares.cumsum(0) - shares < top_p]
    if min_p is not None:
        shares = shares[shares >= min_p * shares[0]]
    return shares, order


def penalised(scores: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """scores: (V,).  ids: of the text so far.  returns: (V,)"""
    seen = torch.tensor(sorted(set(ids)), device=scores.device)
    said = scores[seen]
    return scores.index_copy(0, seen, torch.where(said < 0, said * penalty, said / penalty))
