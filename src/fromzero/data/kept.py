"""Kept: examples, and what a part of a model once said of each, in; batches that begin with that out. Knows no model.

Dims: M examples, B examples of a batch, N tokens end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fromzero.data.examples import Examples, Inputs
from fromzero.data.text import TextExamples, places


@dataclass(frozen=True)
class KeptExamples:
    """Examples whose first input is what was kept of them; the others are their own.

    source:     the examples; but for text, zeros stand for their own inputs, of which only the shape is still asked
    rows:       (M, …) of each example, or (N, …) of the tokens of all of them, end to end; it may be a file's memory map
    per_token:  which of the two
    """

    source: Examples
    rows: Tensor
    per_token: bool

    def __len__(self) -> int:
        return len(self.source)

    @property
    def targets(self) -> Tensor:
        return self.source.targets

    @property
    def bytes(self) -> int:
        return self.source.bytes if isinstance(self.source, TextExamples) else 0

    def take(self, index: Tensor) -> tuple[Inputs, Tensor]:
        """index: (B,)  returns: what was kept, (B, …) or (N, …), then the examples' own inputs; and their targets"""
        if not isinstance(self.source, TextExamples):
            zeros = tuple(one.expand(len(index), *one.shape[1:]) for one in self._zeros)
            return (self.rows.index_select(0, index), *zeros), self.source.targets.index_select(0, index)
        inputs, targets = self.source.take(index)
        place = places(self._starts[index], self.source.lengths[index]) if self.per_token else index
        return (self.rows.index_select(0, place), *inputs), targets

    @cached_property
    def _starts(self) -> Tensor:
        """(M,) where the tokens of each example begin in rows"""
        assert isinstance(self.source, TextExamples)
        return self.source.lengths.cumsum(0) - self.source.lengths

    @cached_property
    def _zeros(self) -> Inputs:
        """One example's inputs without a value: no memory, whatever their shape"""
        return tuple(one.new_zeros(()).expand(one.shape) for one in self.source.take(torch.tensor([0]))[0])
