"""Kinds of data: each a set of rows with labels and content, that becomes Examples once a format is fitted.

Dims: M rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fromzero.data.columns import ColumnFacts, Columns, fit_columns, gap, usable
from fromzero.data.examples import Examples, ItemExamples, TensorExamples
from fromzero.data.images import GREY_MODES, ImageFormat, ImageTree, image_header, printable, read_image
from fromzero.data.table import Table
from fromzero.data.text import TextFormat
from fromzero.data.turns import ChatFormat
from fromzero.errors import DataError, Fault, did_you_mean

MOST_IN_MEMORY = 2 * 2**30  # bytes of decoded images; more are decoded each time they are used


@dataclass(frozen=True)
class ArrayFormat:
    """Inputs as arrays of one shape, divided by `divisor` where they are pixels."""

    shape: tuple[int, ...]
    divisor: float | None = None


InputFormat = Columns | ImageFormat | ArrayFormat | TextFormat | ChatFormat


class RowSource(Protocol):
    """Rows before they are split. labels: raw, or a float tensor (M, K)."""

    kind: str

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Sequence[Any] | Tensor: ...

    def __len__(self) -> int: ...

    def keys(self) -> list[bytes]:
        """content of each row's input, for finding repeats"""

    def where(self, row: int) -> str: ...

    def fit(self, rows: Sequence[int]) -> InputFormat: ...

    def examples(self, rows: Sequence[int], form: InputFormat, targets: Tensor) -> Examples: ...


# -------------------------------------------------------------------------------------------- tables


@dataclass
class TableRows:
    """Rows of a table. inputs: names of the columns used; set_aside: column → why it is not used."""

    table: Table
    target: str
    inputs: tuple[str, ...]
    policies: dict[str, str]
    facts: tuple[ColumnFacts, ...]
    set_aside: dict[str, str] = field(default_factory=dict)
    kind: str = "table"

    @property
    def name(self) -> str:
        return self.table.file

    @property
    def labels(self) -> Sequence[Any]:
        return self.table.columns[self.target]

    def __len__(self) -> int:
        return len(self.table)

    def keys(self) -> list[bytes]:
        columns = [self.table.columns[name] for name in self.inputs]
        return [repr(cells).encode() for cells in zip(*columns, strict=True)]

    def where(self, row: int) -> str:
        return self.table.where(row)

    def fit(self, rows: Sequence[int]) -> Columns:
        return fit_columns(self.table.take(rows), self.inputs, self.policies)

    def examples(self, rows: Sequence[int], form: InputFormat, targets: Tensor) -> Examples:
        assert isinstance(form, Columns)
        return TensorExamples(form.apply(self.table.take(rows)), targets)


def table_rows(
    table: Table, *, target: str, inputs: Sequence[str] | None, policies: dict[str, str], facts: tuple[ColumnFacts, ...]
) -> TableRows:
    """Choose a table's target and input columns, saying why others are set aside.

    raises: DataError for columns that are not there, or when none is left
    """
    names = list(table.columns)
    asked = [("data.target", target)] + [("data.input", n) for n in inputs or ()] + [("data.missing", n) for n in policies]
    faults = [
        Fault(
            f"has no column '{name}'",
            mend=did_you_mean(name, names) or f"the columns are {', '.join(names[:20])}",
            file=table.file,
            key=key,
        )
        for key, name in asked
        if name not in table.columns
    ]
    if inputs and target in inputs:
        faults.append(
            Fault(f"column '{target}' is both input and target", mend="the answer cannot be an input", file=table.file, key="data.input")
        )
    if faults:
        raise DataError(faults)
    set_aside: dict[str, str] = {}
    chosen = list(inputs or ())
    for seen in facts if inputs is None else ():
        if seen.name == target:
            continue
        if usable(seen):
            chosen.append(seen.name)
        else:
            reasons = {
                "id": "looks like an identifier: (almost) every row has its own value",
                "constant": "has one value in every row",
                "text": "holds text; a text model reads one such column, named in data.input",
                "empty": "is empty in every row",
                "mixed": f"holds numbers, but {str(table.columns[seen.name][seen.word])[:40]!r} at {table.where(seen.word)}",
            }
            set_aside[seen.name] = reasons[seen.kind]
    if not chosen:
        raise DataError(
            "no input column is left",
            why="; ".join(f"{n} {why}" for n, why in set_aside.items()),
            mend="name the inputs with data.input",
            file=table.file,
        )
    dropping = [n for n in chosen if policies.get(n) == "drop"]
    kept = [r for r in range(len(table)) if not any(gap(table.columns[n][r]) for n in dropping)]
    if not kept:
        raise DataError(
            "no row is left",
            why=f"{len(table)} rows, and each has an empty cell in {', '.join(dropping)}",
            key="data.missing",
            file=table.file,
        )
    return TableRows(table.take(kept) if len(kept) < len(table) else table, target, tuple(chosen), policies, facts, set_aside)


_TARGET_NAMES = ("target", "label", "class", "y", "species", "category", "intent", "outcome", "diagnosis", "answer", "score", "price")


def guess_target(names: Sequence[str]) -> str:
    """The column that is most likely the answer: a usual name for one, else the last."""
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[word] for word in _TARGET_NAMES if word in lowered), names[-1])


# -------------------------------------------------------------------------------------------- images


@dataclass
class ImageRows:
    """Rows of an image folder. asked: the format a recipe states, needed where sizes differ."""

    tree: ImageTree
    asked: ImageFormat | None
    skip_broken: int
    broken: dict[str, str] = field(default_factory=dict)
    kind: str = "images"

    def __post_init__(self) -> None:
        self.sizes: dict[tuple[int, int], int] = {}
        self.modes: dict[str, int] = {}
        kept: list[tuple[int, bytes]] = []
        faults: list[Fault] = []
        for row, path in enumerate(self.tree.paths):
            try:
                size, mode = image_header(path)
                digest = hashlib.sha256(path.read_bytes()).digest()
            except DataError as error:
                faults += error.faults
                continue
            except OSError as error:
                faults.append(Fault(f"cannot be read ({error.strerror})", file=printable(str(path))))
                continue
            self.sizes[size] = self.sizes.get(size, 0) + 1
            self.modes[mode] = self.modes.get(mode, 0) + 1
            kept.append((row, digest))
        self._quarantine(faults)
        self._rows = [row for row, _ in kept]
        self._keys = [digest for _, digest in kept]
        self._pixels: dict[ImageFormat, Tensor] = {}
        self._decode_all()

    def _quarantine(self, faults: Sequence[Fault]) -> None:
        self.broken.update({fault.file: fault.what for fault in faults})
        if len(self.broken) > self.skip_broken:
            count = Fault(
                f"{len(self.broken)} of {len(self.tree.paths)} images are broken",
                why=f"data.skip_broken allows {self.skip_broken}",
                file=self.name,
            )
            raise DataError([*list(faults)[:20], count])

    def _decode_all(self) -> None:
        """Decode each image once while rows are counted, so that a broken one is found before training."""
        self._refuse_empty()
        form = self.fit(())
        whole = len(self._rows) * form.channels * form.height * form.width
        pixels: list[Tensor] = []
        faults: list[Fault] = []
        good: list[int] = []
        for place, row in enumerate(self._rows):
            try:
                pixels_of_one = read_image(self.tree.paths[row], form)
            except DataError as error:
                faults += error.faults
                continue
            good.append(place)
            if whole <= MOST_IN_MEMORY:
                pixels.append(pixels_of_one)
        self._quarantine(faults)
        self._rows = [self._rows[place] for place in good]
        self._keys = [self._keys[place] for place in good]
        self._refuse_empty()
        if whole <= MOST_IN_MEMORY:
            self._pixels[form] = torch.stack(pixels)

    def _refuse_empty(self) -> None:
        for name in sorted(set(self.tree.labels) - set(self.labels)):
            raise DataError(
                f"class '{name}' has no image that can be read", why=f"{len(self.broken)} broken images are left out", file=self.name
            )

    @property
    def name(self) -> str:
        return printable(str(self.tree.root))

    @property
    def labels(self) -> Sequence[Any]:
        return [self.tree.labels[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> list[bytes]:
        return self._keys

    @property
    def names(self) -> list[str]:
        """The path of each row below the folder"""
        return [printable(str(self.tree.paths[row].relative_to(self.tree.root))) for row in self._rows]

    def where(self, row: int) -> str:
        return printable(str(self.tree.paths[self._rows[row]]))

    def fit(self, rows: Sequence[int]) -> ImageFormat:
        if self.asked is not None:
            return self.asked
        if len(self.sizes) > 1:
            common = sorted(self.sizes, key=lambda size: -self.sizes[size])
            shown = ", ".join(f"{h}×{w} ({self.sizes[h, w]})" for h, w in common[:4])
            raise DataError(
                f"its images have {len(self.sizes)} sizes: {shown}",
                why="a batch needs one, and resizing changes what is learned",
                mend=f"say data.input: {{size: {max(common[0])}}}",
                file=self.name,
            )
        height, width = next(iter(self.sizes))
        return ImageFormat(height, width, 1 if set(self.modes) <= GREY_MODES else 3)

    def examples(self, rows: Sequence[int], form: InputFormat, targets: Tensor) -> Examples:
        assert isinstance(form, ImageFormat)
        if form in self._pixels:
            return TensorExamples(self._pixels[form][list(rows)], targets, divisor=255.0)
        paths = [self.tree.paths[row] for row in self._rows]
        if len(rows) * form.channels * form.height * form.width <= MOST_IN_MEMORY:
            return TensorExamples(torch.stack([read_image(paths[r], form) for r in rows]), targets, divisor=255.0)
        return ItemExamples(lambda row: read_image(paths[row], form).to(torch.float32).div_(255.0), targets, tuple(rows))


# -------------------------------------------------------------------------------------------- arrays


@dataclass
class ArrayRows:
    """Rows of two tensors. labels may be whole numbers, floats, or (M, K) floats."""

    inputs: Tensor
    answers: Tensor
    name: str
    kind: str = "arrays"

    @property
    def labels(self) -> Sequence[Any] | Tensor:
        return self.answers if self.answers.ndim > 1 else self.answers.tolist()

    def __len__(self) -> int:
        return len(self.answers)

    def keys(self) -> list[bytes]:
        rows = self.inputs.reshape(len(self.inputs), -1).contiguous().numpy()
        return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]

    def where(self, row: int) -> str:
        return f"{self.name}, example {row}"

    def fit(self, rows: Sequence[int]) -> ArrayFormat:
        return ArrayFormat(tuple(self.inputs.shape[1:]), 255.0 if self.inputs.dtype == torch.uint8 else None)

    def examples(self, rows: Sequence[int], form: InputFormat, targets: Tensor) -> Examples:
        assert isinstance(form, ArrayFormat)
        if tuple(self.inputs.shape[1:]) != form.shape:
            raise DataError(f"has inputs of shape {tuple(self.inputs.shape[1:])}, the model was trained with {form.shape}", file=self.name)
        whole = len(rows) == len(self)
        divisor = 255.0 if self.inputs.dtype == torch.uint8 else None
        return TensorExamples(self.inputs if whole else self.inputs[torch.as_tensor(rows)], targets, divisor)


@dataclass
class ItemRows:
    """Rows of a Dataset from Python: anything with a length and items (input, answer), fetched one by one."""

    dataset: Any
    name: str
    kind: str = "items"

    def __post_init__(self) -> None:
        count = len(self.dataset)
        if count == 0:
            raise DataError("holds 0 examples", file=self.name)
        self.shape: tuple[int, ...] = ()
        self._labels: list[Tensor] = []
        for row in range(count):
            item, label = self._item(row)
            shape = tuple(self._tensor(row, item, "input").shape)
            self.shape = self.shape if row else shape
            if shape != self.shape:
                raise DataError(f"its example {row} has shape {shape}, example 0 {self.shape}", mend="give all one shape", file=self.name)
            self._labels.append(self._tensor(row, label, "answer"))
            if self._labels[row].shape != self._labels[0].shape:
                raise DataError(f"its example {row} has an answer of another shape than example 0", file=self.name)

    def _tensor(self, row: int, value: Any, which: str) -> Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            what = f"its example {row} has {type(value).__name__} for an {which}, not numbers"
            mend = "turn images into tensors in the Dataset" if which == "input" else "give class indices from 0, or numbers"
            raise DataError(what, mend=mend, file=self.name) from None

    def _item(self, row: int) -> tuple[Any, Any]:
        item = self.dataset[row]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"its example {row} is {type(item).__name__}, not (input, answer)", file=self.name)
        return item[0], item[1]

    @property
    def labels(self) -> Sequence[Any] | Tensor:
        whole = torch.stack(self._labels)
        return whole if whole.ndim > 1 and whole.shape[1] > 1 else whole.reshape(-1).tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def keys(self) -> list[bytes]:
        return [str(row).encode() for row in range(len(self))]  # its items may change from one fetch to the next

    def where(self, row: int) -> str:
        return f"{self.name}, example {row}"

    def fit(self, rows: Sequence[int]) -> ArrayFormat:
        return ArrayFormat(self.shape)

    def examples(self, rows: Sequence[int], form: InputFormat, targets: Tensor) -> Examples:
        assert isinstance(form, ArrayFormat)
        if self.shape != form.shape:
            raise DataError(f"has inputs of shape {self.shape}, the model was trained with {form.shape}", file=self.name)
        fetch: Callable[[int], Any] = lambda row: torch.as_tensor(self._item(row)[0]).to(torch.float32)  # noqa: E731
        return ItemExamples(fetch, targets, tuple(rows))


def refuse_other_kind(source: RowSource, form: InputFormat) -> None:
    """raises: DataError if such rows can never become inputs of this format"""
    kinds: dict[str, tuple[str, type]] = {"table": ("a table", Columns), "images": ("images", ImageFormat), "text": ("text", TextFormat)}
    kind, wanted = kinds.get(source.kind, ("arrays", ArrayFormat))
    if not isinstance(form, wanted):
        trained = {Columns: "a table", ImageFormat: "images", ArrayFormat: "arrays", TextFormat: "text"}[type(form)]
        raise DataError(f"holds {kind}, the model was trained on {trained}", mend="give data of that kind", file=source.name)
