"""Inputs: what a person gives to be predicted in, parts that a model takes out, and the faults of what cannot be read.

Inputs are prepared as in training; a table's columns are found by name. Dims: B inputs of a part, M of all, N tokens end to end.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fromzero.data import ImageFormat, Inputs, Preparation, TextFormat
from fromzero.data.arrays import as_pair, read_inputs
from fromzero.data.columns import Columns
from fromzero.data.images import ENDINGS, printable, read_image, walk_images
from fromzero.data.opening import ARRAYS, TABLES
from fromzero.data.sources import InputFormat
from fromzero.data.table import read_table, read_text, table_of
from fromzero.data.text import whole_texts
from fromzero.errors import DataError, Fault, did_you_mean
from fromzero.runner.pieces import by_tokens

AT_ONCE, TOKENS_AT_ONCE = 256, 4096
STANDARD_INPUT = "standard input"
_MAGIC = {
    b"\x93NUMPY": ".npy",
    b"PK\x03\x04": ".npz",
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"PAR1": ".parquet",
    b"[": ".json",
    b"{": ".jsonl",
}


class Part(NamedTuple):
    """places: of these inputs among all.  arguments: of the model, for B inputs"""

    places: Sequence[int]
    arguments: Inputs


@dataclass
class Given:
    """names: of all inputs, also of those that cannot be read.  parts: to be gone through once.  faults: whole after that"""

    names: Sequence[str]
    parts: Iterator[Part]
    faults: list[Fault]


def read_given(preparation: Preparation, inputs: Any) -> Given:
    """Inputs of any kind: a table, an image, a folder of images, an array file, texts, an open stream, or the same from Python.

    raises: DataError where nothing can be read, a column is missing, or shapes do not fit
    """
    if isinstance(inputs, io.IOBase):
        return _from_stream(preparation, inputs)
    form = preparation.inputs
    if isinstance(form, TextFormat):
        return _texts(form, inputs)
    if isinstance(form, Columns):
        return _rows(form, inputs)
    return _pictures(form, inputs) if _is_picture(form, inputs) else _array(form, inputs)


def _from_stream(preparation: Preparation, stream: Any) -> Given:
    """What standard input is, its first bytes say; else rows of a table, or a text in each line."""
    data = stream.read()
    plain = ".txt" if isinstance(preparation.inputs, TextFormat) else ".csv"
    seen = next((ending for magic, ending in _MAGIC.items() if data.lstrip()[: len(magic)] == magic), plain)
    suffix = plain if plain == ".txt" and seen == ".json" else seen  # a text may begin with a bracket
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"input{suffix}"
        path.write_bytes(data)
        try:
            given = read_given(preparation, path)
            parts = list(given.parts)  # while the file is there
        except DataError as error:
            raise DataError([_renamed(fault, path) for fault in error.faults]) from None
    names = [name.replace(str(path), STANDARD_INPUT) for name in given.names]
    return Given(names, iter(parts), [_renamed(fault, path) for fault in given.faults])


def _renamed(fault: Fault, path: Path) -> Fault:
    return replace(fault, file=fault.file.replace(str(path), STANDARD_INPUT))


def _texts(form: TextFormat, inputs: Any) -> Given:
    """Texts of like length together: nothing is padded, and documents of one length are attended to at once"""
    texts, file = _lines(form, inputs)
    empty = [place for place, text in enumerate(texts) if not text.strip()]
    full = sorted({*range(len(texts))} - {*empty})
    faults = [Fault("is empty", "there is no text in it", file=file, line=place + 1 if file else 0, key=form.column) for place in empty]

    def parts() -> Iterator[Part]:
        examples = whole_texts(form, [texts[place] for place in full], torch.zeros(len(full)))
        order = examples.lengths.argsort(stable=True)
        for index in by_tokens(order, examples.lengths[order], TOKENS_AT_ONCE):
            yield Part([full[place] for place in index.tolist()], examples.take(index)[0])

    return Given(texts, parts() if full else iter(()), faults)


def _lines(form: TextFormat, inputs: Any) -> tuple[list[str], str]:
    """A text, a list of texts, a table with the column of the training, or a file with a text in each line; and the file, if it is one"""
    file = ""
    if isinstance(inputs, (str, Path)):
        path = Path(inputs)
        if len(str(inputs)) > 250 or not path.is_file():
            if path.suffix.lower() in (*TABLES, ".txt"):
                _existing(path)
            return [str(inputs)], ""
        if path.suffix.lower() not in TABLES:
            return [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()], str(
                path
            )  # splitlines would cut at U+2028 too
        inputs, file = read_table(path).columns, str(path)
    if isinstance(inputs, (list, tuple)) and all(isinstance(text, str) for text in inputs):
        return list(inputs), file
    columns = inputs if isinstance(inputs, dict) else _columns(inputs)
    if form.column not in columns:
        raise DataError(
            f"there is no column '{form.column}', which the model was trained on",
            mend=did_you_mean(form.column, columns) or f"the columns are {', '.join(list(columns)[:12])}",
        )
    return ["" if text is None else str(text) for text in columns[form.column]], file


def _rows(form: Columns, inputs: Any) -> Given:
    table = read_table(_existing(inputs)) if isinstance(inputs, (str, Path)) else table_of(_columns(inputs), name="the table given")
    values, readable, faults = form.read(table)
    return Given([table.where(row) for row in range(len(table))], _cut(values, readable), faults)


def _is_picture(form: InputFormat, inputs: Any) -> bool:
    if not isinstance(inputs, (str, Path)) or Path(inputs).suffix.lower() in ARRAYS:
        return False
    if not isinstance(form, ImageFormat) and len(form.shape) != 3:  # type: ignore[union-attr]
        raise DataError("the model takes arrays", mend=f"give one of {', '.join(ARRAYS)}", file=str(inputs))
    return True


def _array(form: Any, inputs: Any) -> Given:
    array = read_inputs(_existing(inputs)) if isinstance(inputs, (str, Path)) else inputs
    tensor = as_pair(array, np.zeros(len(array)), "the inputs given")[0]
    if tuple(tensor.shape[1:]) != form.shape:
        raise DataError(
            f"inputs have shape {tuple(tensor.shape[1:])}, the model was trained with {form.shape}",
            mend="the first number of an array counts its examples",
        )
    return Given([str(row) for row in range(len(tensor))], _cut(tensor, range(len(tensor))), [])


def _cut(values: Tensor, places: Sequence[int]) -> Iterator[Part]:
    for begin in range(0, len(places), AT_ONCE):
        part = values[begin : begin + AT_ONCE]
        yield Part(places[begin : begin + AT_ONCE], (part.to(torch.float32).div_(255.0) if part.dtype == torch.uint8 else part,))


def _pictures(form: Any, inputs: str | Path) -> Given:
    """Images are decoded by threads, some ahead of those that the model looks at; no more than two parts are in memory."""
    path = _existing(inputs)
    form = form if isinstance(form, ImageFormat) else ImageFormat(form.shape[1], form.shape[2], form.shape[0])
    paths = walk_images(path, Counter()) if path.is_dir() else [path]
    if not paths:
        raise DataError("holds no image", file=str(path), mend=f"images end in {', '.join(sorted(ENDINGS)[:6])} …")
    faults: list[Fault] = []

    def read(image: Path) -> Tensor | tuple[Fault, ...]:
        try:
            return read_image(image, form)
        except DataError as error:
            return error.faults

    def parts() -> Iterator[Part]:
        with ThreadPoolExecutor() as pool:
            ask: Callable[[int], list[Any]] = lambda begin: [pool.submit(read, image) for image in paths[begin : begin + AT_ONCE]]  # noqa: E731
            ahead = ask(0)
            for begin in range(0, len(paths), AT_ONCE):
                now, ahead = ahead, ask(begin + AT_ONCE)
                seen = {begin + place: future.result() for place, future in enumerate(now)}
                faults.extend(fault for found in seen.values() if isinstance(found, tuple) for fault in found)
                pixels = {place: found for place, found in seen.items() if isinstance(found, Tensor)}
                if pixels:
                    yield Part(list(pixels), (torch.stack(list(pixels.values())).to(torch.float32).div_(255.0),))

    return Given([printable(str(image)) for image in paths], parts(), faults)


def _columns(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, list):  # rows as objects
        names = dict.fromkeys(name for row in inputs for name in row)
        return {name: [row.get(name) for row in inputs] for name in names}
    return {str(name): list(inputs[name]) for name in (inputs.columns if hasattr(inputs, "columns") else inputs)}


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise DataError("is no file or folder", file=str(path), mend=f"tables end in {', '.join(TABLES[:4])}, images in .png, .jpg …")
    return Path(path)
