"""Answers: raw labels in, targets out, by a description that is kept with the run and turns outputs back into names.

Dims: M examples, K numbers an answer has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fromzero.data.columns import as_word
from fromzero.data.table import missing
from fromzero.errors import DataError, did_you_mean, nearest


@dataclass(frozen=True)
class Classes:
    """names: in the order of the indices.  binary: targets are (M, 1) floats for binary cross-entropy."""

    names: tuple[str, ...]
    binary: bool = False

    @property
    def width(self) -> int:
        return 1 if self.binary else len(self.names)

    def targets(self, labels: Sequence[Any], where: Callable[[int], str]) -> Tensor:
        """labels → (M,) int64, or (M, 1) float32 if binary.  raises: DataError at the first label that is no class"""
        index = {name: i for i, name in enumerate(self.names)}
        found = torch.empty(len(labels), dtype=torch.int64)
        for row, label in enumerate(labels):
            at = index.get(as_word(label))
            if at is None:
                close = nearest(as_word(label), self.names)
                raise DataError(
                    f"{where(row)}: label '{as_word(label)[:40]}' is none of the {len(self.names)} classes in training",
                    why=f"they are {', '.join(self.names[:12])}",
                    mend=f"did you mean '{close[0]}'?" if close else "add such examples to the training data, or remove these",
                )
            found[row] = at
        return found.to(torch.float32)[:, None] if self.binary else found


@dataclass(frozen=True)
class Numbers:
    """names: of the K numbers.  Targets are (value - mean) / std; outputs are turned back with them."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def width(self) -> int:
        return len(self.names)

    def scaled(self, values: Tensor) -> Tensor:
        """(M, K) in units of the data → (M, K) as learned, float32"""
        return ((values - torch.tensor(self.mean, dtype=torch.float64)) / torch.tensor(self.std, dtype=torch.float64)).to(torch.float32)

    def restored(self, outputs: Tensor) -> Tensor:
        """(M, K) as learned → (M, K) float64 in units of the data"""
        return outputs.double() * torch.tensor(self.std, dtype=torch.float64) + torch.tensor(self.mean, dtype=torch.float64)


@dataclass(frozen=True)
class Soft:
    """Targets that are already (M, K) floats: class probabilities, or several yes-or-no answers."""

    names: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.names)


Answers = Classes | Numbers | Soft


def find_classes(labels: Sequence[Any], keep: Sequence[str] | None, where: Callable[[int], str]) -> tuple[str, ...]:
    """The class names of some labels, numbers in their order and words in theirs; or `keep`, checked."""
    counts = Counter(as_word(label) for label in labels)
    if keep is not None:
        absent = [name for name in keep if name not in counts]
        if absent:
            why = f"the classes are {', '.join(_sorted(counts)[:20])}"
            raise DataError(
                f"data.classes names '{absent[0]}', which no example has", why=why, mend=did_you_mean(absent[0], counts), key="data.classes"
            )
        if len(set(keep)) != len(keep):
            raise DataError("data.classes names a class twice", key="data.classes")
        return tuple(keep)
    fractions = _fractions(labels)
    if fractions:
        raise DataError(
            f"{where(fractions[0])}: label {labels[fractions[0]]} is no class",
            why=f"{len(fractions)} of {len(labels)} labels have fractions",
            mend="to predict numbers use task: regress; if they are classes, name them in data.classes",
        )
    return tuple(_sorted(counts))


def _fractions(labels: Sequence[Any]) -> list[int]:
    """Rows whose label is a number with a fraction, where all labels are numbers."""
    try:
        return [row for row, label in enumerate(labels) if not float(label).is_integer()]
    except (ValueError, TypeError, OverflowError):
        return []


def _sorted(names: Any) -> list[str]:
    def key(name: str) -> tuple[int, float, str]:
        try:
            return (0, float(name), name)
        except ValueError:
            return (1, math.inf, name)

    return sorted(names, key=key)


def read_numbers(labels: Sequence[Any], where: Callable[[int], str]) -> Tensor:
    """Labels of a table's column → (M, 1) float64.  raises: DataError at the first that is no finite number"""
    values = torch.empty(len(labels), 1, dtype=torch.float64)
    for row, label in enumerate(labels):
        try:
            values[row, 0] = float(label)
        except (ValueError, TypeError, OverflowError):
            raise DataError(
                f"{where(row)}: the answer {str(label)[:40]!r} is not a number", mend="to name classes use task: classify"
            ) from None
    check_finite(values, where)
    return values


def check_finite(values: Tensor, where: Callable[[int], str]) -> None:
    bad = (~torch.isfinite(values)).any(dim=1).nonzero()
    if len(bad):
        raise DataError(f"{where(int(bad[0]))}: the answer is {values[bad[0]].tolist()}, not a finite number", why=f"{len(bad)} such rows")


def fit_numbers(names: Sequence[str], values: Tensor, *, scale: bool) -> Numbers:
    """values: (M, K) of the training set"""
    if not scale:
        return Numbers(tuple(names), (0.0,) * len(names), (1.0,) * len(names))
    std = values.std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return Numbers(tuple(names), tuple(values.mean(dim=0).tolist()), tuple(std.tolist()))


def answered(labels: Sequence[Any]) -> list[int]:
    """Rows that have an answer at all."""
    return [row for row, label in enumerate(labels) if not missing(label)]
