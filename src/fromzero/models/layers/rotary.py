"""Rotary positions: each token's place in its document in, cosines and sines out; and queries or keys turned by them.

A Rope says how fast each pair turns; the functions that stretch a rope to longer documents take frequencies and give frequencies.
Dims: N tokens end to end, H heads, K head width, R turned part of the head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fromzero.models.layers.documents import Documents


@dataclass(frozen=True)
class Rope:
    """Numbers, not tensors: they stay exact when a model is cast to a short float type, and are equal where two layers share them.

    frequencies:  radians a token of the R/2 pairs
    interleaved:  which values are a pair, see rotate
    magnitude:    the cosines and sines are multiplied by it
    far, limit:   the frequencies of documents of more than `limit` tokens (LongRoPE); empty: the same
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    magnitude: float = 1.0
    far: tuple[float, ...] = ()
    limit: int = 0


def turns(rope: Rope, documents: Documents, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What rotate takes, (N, 1, R) each; a document's length decides, not its batch."""
    wide, places = dtype if dtype == torch.float64 else torch.float32, documents.positions
    inverse = _on_device(rope.frequencies, wide, places.device)  # (R/2,)
    if rope.far and documents.longest > rope.limit:
        lengths = documents.offsets.diff()
        lengths = lengths + torch.tensor(documents.pasts, device=lengths.device) if documents.pasts else lengths
        long = lengths[documents.owner] > rope.limit  # (N,)
        inverse = torch.where(long[:, None, None], _on_device(rope.far, wide, places.device), inverse)  # (N, 1, R/2)
    return angles(places, inverse, magnitude=rope.magnitude, dtype=dtype, interleaved=rope.interleaved)


@lru_cache(maxsize=32)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept: where tokens are made one by one, each would bring them over anew."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def frequencies(base: float, width: int) -> tuple[float, ...]:
    """base^(-2i / R) for the R/2 pairs.  source: arXiv:2104.09864 section 3.2.2"""
    return tuple(base ** (-i / width) for i in range(0, width, 2))


def stretch_llama3(plain: Sequence[float], *, factor: float, slow: float, fast: float, context: int) -> tuple[float, ...]:
    """Pairs of at least `fast` turns in the old context stay, those of at most `slow` are divided by factor, a ramp lies between.

    source:  `apply_scaling` of github.com/meta-llama/llama-models, models/llama3/model.py
    """
    kept = [min(max((context * f / math.tau - slow) / (fast - slow), 0.0), 1.0) for f in plain]
    return tuple(f * (k + (1 - k) / factor) for f, k in zip(plain, kept, strict=True))


def stretch_yarn(
    plain: Sequence[float], *, base: float, factor: float, slow: float, fast: float, context: int, whole: bool
) -> tuple[float, ...]:
    """As stretch_llama3, but the ramp runs over the pairs' numbers; whole: its ends are rounded outwards to whole pairs.

    source:  arXiv:2309.00071 section 3.2; a ramp over numbers of pairs as in the authors' code, github.com/jquesnelle/yarn
    """
    width = 2 * len(plain)
    first, last = (width * math.log(context / (rounds * math.tau)) / (2 * math.log(base)) for rounds in (fast, slow))
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    kept = [1 - min(max((i - first) / ((last - first) or 0.001), 0.0), 1.0) for i in range(len(plain))]
    return tuple(f * (k + (1 - k) / factor) for f, k in zip(plain, kept, strict=True))


def angles(
    positions: Tensor, inverse: Tensor, *, magnitude: float = 1.0, dtype: torch.dtype, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """positions: (N,) int64.  inverse: (R/2,) frequencies in radians a token.  returns: what rotate takes, (N, 1, R) each"""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    turn = positions[:, None, None].to(wide) * inverse.to(wide)  # (N, 1, R/2)
    cos, sin = (turn.cos() * magnitude).to(dtype), (turn.sin() * magnitude).to(dtype)
    if interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first R of the K values of each head.

    cos, sin:    (N, 1, R), of each value; the sine with the sign that the value's partner has
    interleaved: pairs are neighbours (0, 1), (2, 3) … as in the paper; else halves (0, R/2), (1, R/2 + 1) …
    x:           (N, H, K)
    source:      arXiv:2104.09864 section 3.2.2
    """
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else turned.roll(width // 2, dims=-1)
    pair = (turned * cos).add_(partner * sin)  # not in place: under autocast x may be shorter
    return pair if width == x.shape[-1] else torch.cat([pair, x[..., width:]], dim=-1)
