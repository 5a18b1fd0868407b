"""Documents: where each document of a batch of tokens begins in, their lengths, positions and runs of equal length out.

A batch of text is the tokens of its documents end to end; there is no padding and no pad token.
Dims: N tokens of a batch end to end, B documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from fromzero.errors import ShapeError


@dataclass(frozen=True)
class Group:
    """Documents of one length, one behind the other."""

    length: int
    count: int


@dataclass(frozen=True)
class Documents:
    """offsets: (B + 1,) int64 from 0 to N.  positions: (N,) int64, each token's place in its own document.

    pasts: how many tokens of each document were read before these, and are kept in a cache; empty where there is none
    """

    offsets: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    groups: tuple[Group, ...]
    pasts: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        pasts = self.pasts or (0,) * len(self.lengths)
        return max((past + length for past, length in zip(pasts, self.lengths, strict=True)), default=0)

    @property
    def last(self) -> Tensor:
        """(B,) the place of each document's last token"""
        return self.offsets[1:] - 1

    @property
    def owner(self) -> Tensor:
        """(N,) int64, the document of each token"""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=sum(self.lengths))


def documents_of(tokens: Tensor, offsets: Tensor | None, pasts: Sequence[int] = ()) -> Documents:
    """Look at the offsets once for all layers. On a GPU this waits for the device.

    offsets: None where the tokens are one document: then no value is looked at, so that a program can be made of the model
    raises: ShapeError where the offsets do not run from 0 to N, or a document is empty
    """
    if offsets is None:
        length = tokens.shape[0]
        ends = torch.cat([tokens.new_zeros(1), tokens.new_full((1,), length)])
        return Documents(ends, (length,), torch.arange(length, device=tokens.device), (Group(length, 1),))
    bounds = offsets.tolist()
    lengths = tuple(after - before for before, after in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != len(tokens) or min(lengths, default=1) < 1:
        raise ShapeError(
            f"offsets {bounds[:6]}{' …' if len(bounds) > 6 else ''} do not fit {len(tokens)} tokens",
            why="they begin with 0, rise by each document's length of at least 1, and end with the number of tokens",
        )
    starts = offsets[:-1] - torch.tensor(pasts, device=offsets.device) if pasts else offsets[:-1]
    positions = torch.arange(len(tokens), device=tokens.device) - torch.repeat_interleave(
        starts, offsets.diff(), output_size=len(tokens)
    )  # (N,)
    return Documents(offsets, lengths, positions, _groups(lengths), tuple(pasts))


def _groups(lengths: tuple[int, ...]) -> tuple[Group, ...]:
    return tuple(Group(length, len(list(run))) for length, run in groupby(lengths))
