"""Predict: a saved model and new inputs in, class names with probabilities or numbers out.

Inputs are prepared as in training; a table's columns are found by name. Dims: M inputs, K outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fromzero.data import Classes, Examples, ImageFormat, Numbers, Preparation, TensorExamples, TextFormat
from fromzero.data.arrays import as_pair, read_inputs
from fromzero.data.columns import Columns
from fromzero.data.images import ENDINGS, printable, read_image, walk_images
from fromzero.data.opening import ARRAYS, TABLES
from fromzero.data.sources import InputFormat
from fromzero.data.table import read_table, read_text, table_of
from fromzero.data.text import whole_texts
from fromzero.errors import DataError, Fault, did_you_mean
from fromzero.runner.saved import SavedModel
from fromzero.use.write import as_table

BATCH = 256


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input. probabilities: by class name, of classify; values: by name, of regress."""

    input: str
    answer: str | float
    probabilities: dict[str, float] | None = None
    values: dict[str, float] | None = None

    def as_row(self) -> dict[str, Any]:
        """One flat row for a table."""
        if self.probabilities is not None:
            best = self.probabilities.get(str(self.answer), 0.0)
            return {"input": self.input, "class": self.answer, "probability": best, **{f"p({n})": p for n, p in self.probabilities.items()}}
        return {"input": self.input, **(self.values or {})}


@dataclass(frozen=True)
class Predictions:
    """rows: one an input that could be read.  faults: the inputs that could not."""

    rows: tuple[Prediction, ...]
    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        return as_table([row.as_row() for row in self.rows])


def predict(saved: SavedModel, model: nn.Module, inputs: Any) -> Predictions:
    """Predict for a table, an image, a folder of images, an array file, or arrays and tables from Python.

    raises: DataError where nothing can be read, or a column is missing
    """
    if saved.task in ("language", "chat"):
        raise DataError("the model goes on with text, it names no answer", mend="fromzero evaluate measures it on other text")
    names, examples, faults = prepare(saved.preparation, inputs)
    if not len(examples):
        raise DataError(list(faults) or "there is nothing to predict")
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    outputs = []
    with torch.no_grad():
        for part in torch.arange(len(examples)).split(BATCH):
            arguments = examples.take(part)[0]
            outputs.append(model(*(t.to(dtype) if t.is_floating_point() else t for t in arguments)).cpu())
    return Predictions(tuple(name_outputs(saved, names, torch.cat(outputs))), tuple(faults))


def name_outputs(saved: SavedModel, names: Sequence[str], outputs: Tensor) -> list[Prediction]:
    """outputs: (M, K) as the model gives them → named answers"""
    answers = saved.preparation.answers
    outputs = outputs.reshape(len(outputs), -1).double()
    if isinstance(answers, Numbers):
        rows = answers.restored(outputs).tolist()
        return [Prediction(n, row[0], values=dict(zip(answers.names, row, strict=True))) for n, row in zip(names, rows, strict=True)]
    if saved.loss == "bce":
        shares = outputs.sigmoid()
        if isinstance(answers, Classes):
            shares = torch.cat([1 - shares, shares], dim=1)[:, : len(answers.names)]
    else:
        shares = outputs.softmax(dim=1)
    known = [*answers.names, *(f"output {i}" for i in range(len(answers.names), shares.shape[1]))]
    best = shares.argmax(dim=1).tolist()
    return [Prediction(n, known[b], dict(zip(known, row, strict=True))) for n, b, row in zip(names, best, shares.tolist(), strict=True)]


def prepare(preparation: Preparation, inputs: Any) -> tuple[list[str], Examples, list[Fault]]:
    """Inputs of any kind → their names, examples without answers, and the faults of those left out."""
    form = preparation.inputs
    if isinstance(form, TextFormat):
        names, texts = _texts(form, inputs)
        return names, whole_texts(form, texts, torch.zeros(len(texts))), []
    names, tensor, faults = _tensors(form, inputs)
    return names, TensorExamples(tensor, torch.zeros(len(tensor))), faults


def _texts(form: TextFormat, inputs: Any) -> tuple[list[str], list[str]]:
    """A text, a list of texts, a table with the column of the training, or a file with a text in each line"""
    if isinstance(inputs, (str, Path)):
        path = Path(inputs)
        if len(str(inputs)) > 250 or not path.is_file():
            if path.suffix.lower() in (*TABLES, ".txt"):
                _existing(path)
            return [str(inputs)], [str(inputs)]
        if path.suffix.lower() not in TABLES:
            lines = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]  # splitlines would cut at U+2028 too
            return lines, lines
        inputs = read_table(path).columns
    if isinstance(inputs, (list, tuple)) and all(isinstance(text, str) for text in inputs):
        return list(inputs), list(inputs)
    columns = inputs if isinstance(inputs, dict) else _columns(inputs)
    if form.column not in columns:
        raise DataError(
            f"there is no column '{form.column}', which the model was trained on",
            mend=did_you_mean(form.column, columns) or f"the columns are {', '.join(list(columns)[:12])}",
        )
    cells = columns[form.column]
    if None in cells:
        raise DataError(f"row {cells.index(None) + 1} has no text in column '{form.column}'", mend="remove the row")
    texts = [str(text) for text in cells]
    return texts, texts


def _tensors(form: InputFormat, inputs: Any) -> tuple[list[str], Tensor, list[Fault]]:
    assert not isinstance(form, TextFormat)
    if isinstance(form, Columns):
        table = read_table(_existing(inputs)) if isinstance(inputs, (str, Path)) else table_of(_columns(inputs), name="the table given")
        return [table.where(row) for row in range(len(table))], form.apply(table), []
    if isinstance(inputs, (str, Path)) and Path(inputs).suffix.lower() not in ARRAYS:
        if isinstance(form, ImageFormat) or len(form.shape) == 3:
            return _images(
                _existing(inputs), form if isinstance(form, ImageFormat) else ImageFormat(form.shape[1], form.shape[2], form.shape[0])
            )
        raise DataError("the model takes arrays", mend=f"give one of {', '.join(ARRAYS)}", file=str(inputs))
    array = read_inputs(_existing(inputs)) if isinstance(inputs, (str, Path)) else inputs
    tensor = as_pair(array, np.zeros(len(array)), "the inputs given")[0]
    if tensor.dtype == torch.uint8:
        tensor = tensor.to(torch.float32).div_(255.0)
    if tuple(tensor.shape[1:]) != form.shape:
        raise DataError(
            f"inputs have shape {tuple(tensor.shape[1:])}, the model was trained with {form.shape}",
            mend="the first number of an array counts its examples",
        )
    return [str(row) for row in range(len(tensor))], tensor, []


def _columns(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, list):  # rows as objects
        names = dict.fromkeys(name for row in inputs for name in row)
        return {name: [row.get(name) for row in inputs] for name in names}
    return {str(name): list(inputs[name]) for name in (inputs.columns if hasattr(inputs, "columns") else inputs)}


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise DataError("is no file or folder", file=str(path), mend=f"tables end in {', '.join(TABLES[:4])}, images in .png, .jpg …")
    return Path(path)


def _images(path: Path, form: ImageFormat) -> tuple[list[str], Tensor, list[Fault]]:
    paths = walk_images(path, Counter()) if path.is_dir() else [path]
    if not paths:
        raise DataError("holds no image", file=str(path), mend=f"images end in {', '.join(sorted(ENDINGS)[:6])} …")
    names: list[str] = []
    pixels: list[Tensor] = []
    faults: list[Fault] = []
    for image in paths:
        try:
            pixels.append(read_image(image, form))
            names.append(printable(str(image)))
        except DataError as error:
            faults += error.faults
    stacked = torch.stack(pixels) if pixels else torch.zeros(0, *form.shape)
    return names, stacked.to(torch.float32).div_(255.0), faults
