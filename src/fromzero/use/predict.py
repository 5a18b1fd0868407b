"""Predict: a saved model and new inputs in, class names with probabilities or numbers out.

Knows no file. Dims: M inputs, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data import Classes, Numbers
from fromzero.errors import DataError, Fault
from fromzero.runner.saved import SavedModel
from fromzero.use.inputs import read_given
from fromzero.use.write import as_table


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


def predict(saved: SavedModel, model: nn.Module, inputs: Any, told: Callable[[int, int], None] | None = None) -> Predictions:
    """Predict for a table, an image, a folder of images, an array file, texts, an open stream, or arrays and tables from Python.

    told:    hears after each part how many inputs are done, of how many
    raises:  DataError where nothing can be read, or a column is missing
    """
    if saved.task in ("language", "chat"):
        raise DataError("the model goes on with text, it names no answer", mend="fromzero evaluate measures it on other text")
    given = read_given(saved.preparation, inputs)
    like = next(model.parameters(), torch.zeros(()))
    places: list[int] = []
    outputs: list[Tensor] = []
    with torch.inference_mode():
        for part in given.parts:
            arguments = (t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for t in part.arguments)
            outputs.append(model(*arguments).cpu())
            places += part.places
            if told is not None:
                told(len(places) + len(given.faults), len(given.names))
    if not places:
        raise DataError(given.faults or "there is nothing to predict")
    order = torch.tensor(places).argsort()
    named = name_outputs(saved, [given.names[place] for place in sorted(places)], torch.cat(outputs)[order])
    return Predictions(tuple(named), tuple(given.faults))


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
