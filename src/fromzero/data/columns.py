"""Columns: a table in, a float matrix out, by a schema that was fitted once and is kept with the run.

Numbers are brought to mean 0 and standard deviation 1; words become one column each (one-hot). What an empty
cell becomes is a stated policy per column. At prediction columns are found by name, never by position.
Dims: M rows, W width of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fromzero.data.table import Table, missing
from fromzero.errors import DataError, Fault, nearest

MOST_DEVIATIONS = 1e30  # float32 ends at 3e38
MANY_SPACES = 2  # on average in a cell: a sentence, not a name
MOST_WORDS = 0.1  # share of the cells of a column of numbers: with fewer they are slips, with more they are names
MOST_CATEGORIES = 64  # found by itself; a column named in data.input may have ten times as many


@dataclass(frozen=True)
class Column:
    """One input column: what it is, and what becomes of its cells."""

    name: str
    kind: str  # number | category
    policy: str  # what an empty cell becomes: median | mean | zero | category | drop | error
    fill: float = 0.0  # number: the value put in, before scaling
    mean: float = 0.0
    std: float = 1.0
    flag: bool = False  # number: one more column that is 1 where the cell was empty
    categories: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        if self.kind == "number":
            return 1 + self.flag
        return len(self.categories) + (self.policy == "category")

    def __str__(self) -> str:
        if self.kind == "number":
            empty = (
                f"empty → {self.policy}"
                + (f" {self.fill:.4g}" if self.policy in ("median", "mean") else "")
                + (" and a flag" if self.flag else "")
            )
            return f"number, scaled by mean {self.mean:.4g} and deviation {self.std:.4g}; {empty}"
        empty = "empty → a category of its own" if self.policy == "category" else f"empty → {self.policy}"
        return f"{len(self.categories)} categories; {empty}; unseen → none of them"


@dataclass(frozen=True)
class ColumnFacts:
    """What was seen in a column before anything was decided."""

    name: str
    kind: str  # number | category | text | constant | id | empty | mixed: numbers, and a few words
    distinct: int
    missing: int
    infinite: int = 0
    word: int = -1  # mixed: the first row that holds a word


def inspect_column(name: str, cells: Sequence[Any]) -> ColumnFacts:
    """Look at one column's cells."""
    present = [cell for cell in cells if not missing(cell)]
    gaps = len(cells) - len(present)
    if not present:
        return ColumnFacts(name, "empty", 0, gaps)
    distinct = len(set(present))
    numbers = _numbers(present)
    infinite = 0 if numbers is None else int(np.isinf(numbers).sum())
    if distinct == 1 and not gaps:
        return ColumnFacts(name, "constant", 1, gaps)
    if numbers is not None:
        counted = len(numbers) > 3 and not gaps and not infinite and bool(np.all(np.diff(numbers) == 1))
        return ColumnFacts(name, "id" if counted else "number", distinct, gaps, infinite)
    most = MOST_WORDS * len(present)
    words = list(islice((row for row, cell in enumerate(cells) if not missing(cell) and not _is_number(cell)), int(most) + 1))
    if distinct > 10 and len(words) < most:
        return ColumnFacts(name, "mixed", distinct, gaps, word=words[0])
    if distinct > max(MOST_CATEGORIES, 0.5 * len(present)) or (distinct == len(present) and distinct > 10):
        spaces = sum(str(cell).count(" ") for cell in present[:1000]) / len(present[:1000])
        return ColumnFacts(name, "text" if spaces >= MANY_SPACES else "id", distinct, gaps)
    return ColumnFacts(name, "category", distinct, gaps)


def _numbers(cells: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    try:
        return np.array(cells, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None


def _is_number(cell: Any) -> bool:
    try:
        return float(cell) is not None
    except OverflowError:
        return True
    except (ValueError, TypeError):
        return False


def usable(facts: ColumnFacts) -> bool:
    return facts.kind in ("number", "category")


@dataclass(frozen=True)
class Columns:
    """The fitted schema of a table's inputs."""

    columns: tuple[Column, ...]

    @property
    def width(self) -> int:
        return sum(column.width for column in self.columns)

    def apply(self, table: Table) -> Tensor:
        """Turn a table's cells into numbers.

        returns:  (M, W) float32
        raises:   DataError with every column that is missing and every cell that cannot be read
        """
        values, _, faults = self.read(table)
        if faults:
            raise DataError(faults[:20])
        return values

    def read(self, table: Table) -> tuple[Tensor, list[int], list[Fault]]:
        """The rows whose every cell can be read, (M', W) float32; their places; and what is wrong with the others.

        raises: DataError with every column that is missing
        """
        absent = [c.name for c in self.columns if c.name not in table.columns]
        if absent:
            faults = []
            for name in absent:
                close = nearest(name, [n for n in table.columns if n not in {c.name for c in self.columns}])
                mend = f"is '{close[0]}' the same?" if close else f"the file has {', '.join(list(table.columns)[:12])}"
                faults.append(Fault(f"has no column '{name}', which the model was trained with", mend=mend, file=table.file, key=name))
            raise DataError(faults)
        found: list[tuple[int, Fault]] = []
        values = np.concatenate([_encode(column, table, found) for column in self.columns], axis=1)
        readable = sorted({*range(len(table))} - {row for row, _ in found})
        return torch.from_numpy(values[readable].astype(np.float32)), readable, [fault for _, fault in found]


def gap(cell: Any) -> bool:
    """Whether a cell is empty or an infinite number: what the policies of a column of numbers speak of."""
    if missing(cell):
        return True
    try:
        return math.isinf(float(cell))
    except (ValueError, OverflowError):
        return False


def _encode(column: Column, table: Table, found: list[tuple[int, Fault]]) -> np.ndarray[Any, Any]:
    """The column's numbers, (M, width).  found: gets the rows and faults of cells that cannot be read"""

    def fault(row: int, what: str, why: str) -> None:
        found.append((row, Fault(what, why=why, file=table.file, line=table.lines[row], key=column.name)))

    cells = table.columns[column.name]
    gaps = np.array([missing(cell) for cell in cells], dtype=bool)
    if column.kind == "category":
        place = {name: i for i, name in enumerate(column.categories)}
        matrix = np.zeros((len(cells), column.width))
        for row, cell in enumerate(cells):
            if gaps[row] and column.policy == "category":
                matrix[row, -1] = 1.0
            elif not gaps[row] and (at := place.get(as_word(cell))) is not None:
                matrix[row, at] = 1.0
    else:
        values = np.full(len(cells), math.nan)
        for row, cell in enumerate(cells):
            if gaps[row]:
                continue
            try:
                values[row] = float(cell)
            except (ValueError, OverflowError):
                fault(row, f"{str(cell)[:40]!r} is not a number", "the column held numbers in training")
        gaps = ~np.isfinite(values)
        values[gaps] = column.fill
        with np.errstate(over="ignore"):
            matrix = ((values - column.mean) / column.std)[:, None]
        for row in np.flatnonzero(np.abs(matrix[:, 0]) > MOST_DEVIATIONS).tolist():
            why = f"it lies more than {MOST_DEVIATIONS:g} deviations from the mean in training, {column.mean:.4g}"
            fault(row, f"{str(cells[row])[:40]} is out of all range", why)
        if column.flag:
            matrix = np.concatenate([matrix, gaps[:, None].astype(np.float64)], axis=1)
    if column.policy in ("error", "drop"):
        for row in np.flatnonzero(gaps).tolist():
            what = "is empty" if missing(cells[row]) else f"is {cells[row]}, not a finite number"
            fault(row, what, f"data.missing says {column.policy} for this column")
    return matrix


def as_word(cell: Any) -> str:
    """One spelling for equal cells: 1.0 and 1 are the same category."""
    if isinstance(cell, bool) or (isinstance(cell, float) and cell.is_integer()):
        cell = int(cell)
    return str(cell).strip()


def fit_columns(table: Table, names: Sequence[str], policies: Mapping[str, str]) -> Columns:
    """Decide what becomes of each input column, from the training rows alone.

    policies: column → median | mean | zero | category | drop | error; others are decided here: a number's gap
              becomes the median and sets a flag, a word's gap is a category of its own
    """
    return Columns(tuple(_fit(table, name, policies.get(name, "auto")) for name in names))


def _fit(table: Table, name: str, policy: str) -> Column:
    cells, file = table.columns[name], table.file
    facts = inspect_column(name, cells)
    if facts.kind == "mixed" and policy != "category":
        mend = f"correct it, or say data.missing: {{{name}: category}} where numbers are names too"
        what = f"{str(cells[facts.word])[:40]!r} is not a number"
        raise DataError(what, why="nearly all of the column are", mend=mend, file=file, line=table.lines[facts.word], key=name)
    numbers = _numbers([cell for cell in cells if not missing(cell)]) if facts.kind != "empty" else np.zeros(0)
    if numbers is None or policy == "category":
        words = sorted({as_word(cell) for cell in cells if not missing(cell)})
        if len(words) > 10 * MOST_CATEGORIES:
            raise DataError(
                f"has {len(words)} different words",
                why="each would become an input of its own",
                mend="leave it out of data.input",
                file=file,
                key=name,
            )
        if policy in ("median", "mean", "zero"):
            raise DataError(
                f"has words, for which data.missing: {policy} has no meaning", mend="use category, drop or error", file=file, key=name
            )
        chosen = policy if policy in ("drop", "error") else "category"
        return Column(name, "category", chosen, categories=tuple(words))
    finite = numbers[np.isfinite(numbers)]
    count = finite.size
    if not count:
        finite = np.zeros(1)
    chosen = "median" if policy == "auto" else policy
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(finite.mean()), float(finite.std())
    if not math.isfinite(std):
        raise DataError(
            f"holds values up to {np.abs(finite).max():.3g}, too large to be scaled",
            mend="leave it out, or correct it",
            file=file,
            key=name,
        )
    fill = {"median": float(np.median(finite)), "mean": mean}.get(chosen, 0.0)
    flag = policy == "auto" and count < len(cells)
    return Column(name, "number", chosen, fill, mean, std if std > 0 else 1.0, flag)
