"""onnx: a model in, a graph that ONNX Runtime runs out, with the preparation of images and tables inside.

What goes in is in docs/export.md: pixels as bytes; a table's numbers as they are, and its categories as numbers of their words.
Dims: B batch, C channels, H height, W width, P number columns, Q category columns, K outputs.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fromzero.use.export.traced as traced
from fromzero.data import Classes, ImageFormat, Numbers
from fromzero.data.columns import Column, Columns
from fromzero.data.sources import ArrayFormat
from fromzero.errors import MissingExtra
from fromzero.use.export.compare import Compared, compare
from fromzero.use.export.program import program
from fromzero.use.export.subject import Subject

OPENS = "onnxruntime.InferenceSession(FOLDER/model.onnx)"
FILE = "model.onnx"
UNSEEN = -1  # the number of a word that no example of training had


def refusal(subject: Subject) -> str:
    return traced.refusal(subject)


def write(subject: Subject, folder: Path) -> list[Compared]:
    runtime, _ = _needed("onnxruntime"), _needed("onnxscript")
    made, notes = _traced(subject)
    with _quiet():
        graph = torch.onnx.export(program(made), (), input_names=made.names, output_names=made.outputs, dynamo=True, verbose=False)
    assert graph is not None
    graph.model.metadata_props.update(notes)
    graph.save(folder / FILE)
    session = runtime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    found = []
    for given, said in made.cases:
        answers = session.run(list(made.outputs), {name: tensor.numpy() for name, tensor in zip(made.names, given, strict=True)})
        for name, wanted, answer in zip(made.outputs, said, answers, strict=True):
            found.append(compare(f"onnxruntime ({name})", wanted, torch.from_numpy(answer)))
    return [max((one for one in found if f"({name})" in one.reader), key=lambda one: one.difference or 0) for name in made.outputs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's reports about its own parts"""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"{name} is not installed", why="an export is kept only after it was run", mend="pip install 'fromzero[export]'"
        ) from error


def _traced(subject: Subject) -> tuple[traced.Traced, dict[str, str]]:
    """returns: what is traced, and the notes that stand in the file"""
    notes = {"fromzero.reads": subject.reads, "fromzero.source": subject.source}
    if subject.classes:
        notes["classes"] = json.dumps(subject.classes, ensure_ascii=False)
    if subject.reads in ("language", "text"):
        return traced.trace_text(subject), notes
    given, before, names = _before(subject, notes)
    after, outputs = _after(subject)
    with torch.no_grad():
        said = [after(subject.said), after(subject.model(subject.inputs[0][:1]))]
    return traced.batched(_Whole(before, subject.model, after), names, outputs, given, said), notes


class _Whole(nn.Module):
    def __init__(self, before: nn.Module, model: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.model, self.after = before, model, after

    def forward(self, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
        inputs = self.before(first) if second is None else self.before(first, second)
        answers: tuple[Tensor, ...] = self.after(self.model(inputs))
        return answers


def _before(subject: Subject, notes: dict[str, str]) -> tuple[tuple[Tensor, ...], nn.Module, tuple[str, ...]]:
    """Raw inputs that the prepared ones were made of, what prepares them, and their names"""
    inputs, form = subject.inputs[0], None if subject.preparation is None else subject.preparation.inputs
    if isinstance(form, Columns):
        notes["columns"] = json.dumps(described(form), ensure_ascii=False)
        table = PreparedTable(form)
        given, kept = table.undone(inputs), [bool(table.numbers), bool(table.categories)]
        names = ("numbers", "categories")
        return (
            tuple(t for t, here in zip(given, kept, strict=True) if here),
            table,
            tuple(n for n, here in zip(names, kept, strict=True) if here),
        )
    divisor = form.divisor if isinstance(form, ArrayFormat) else 255.0 if form is None or isinstance(form, ImageFormat) else None
    if divisor is None:
        return (inputs,), nn.Identity(), ("inputs",)
    return ((inputs * divisor).round().to(torch.uint8),), _Pixels(divisor, inputs.dtype), ("pixels",)


class _Pixels(nn.Module):
    def __init__(self, divisor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.divisor, self.dtype = divisor, dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, C, H, W) uint8, already of the model's size.  returns: the same, divided"""
        return pixels.to(self.dtype) / self.divisor


class PreparedTable(nn.Module):
    """Cells of a table become what the model reads, as data.columns does it: scaled, one-hot, gaps filled."""

    def __init__(self, form: Columns) -> None:
        super().__init__()
        self.columns = form.columns
        self.numbers = [column for column in form.columns if column.kind == "number"]
        self.categories = [column for column in form.columns if column.kind == "category"]

    def forward(self, *given: Tensor) -> Tensor:
        """numbers: (B, P) float64, NaN for an empty cell.  categories: (B, Q) int64, UNSEEN, a word's place, or behind them for an empty one"""
        numbers = iter(given[0].unbind(1) if self.numbers else ())
        codes = iter(given[-1].unbind(1) if self.categories else ())
        blocks = [self._number(next(numbers), c) if c.kind == "number" else self._category(next(codes), c) for c in self.columns]
        return torch.cat(blocks, dim=1)

    def _number(self, cells: Tensor, column: Column) -> Tensor:
        gaps = cells.isnan() | cells.isinf()
        scaled = (torch.where(gaps, column.fill, cells) - column.mean) / column.std
        parts = [scaled.float()[:, None], *([gaps.float()[:, None]] if column.flag else [])]
        return torch.cat(parts, dim=1)

    def _category(self, codes: Tensor, column: Column) -> Tensor:
        return (codes[:, None] == torch.arange(column.width)).float()

    def undone(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Cells that become these inputs.  inputs: (B, W).  returns: (B, P) float64, (B, Q) int64"""
        numbers, codes = [], []
        for column, block in zip(self.columns, inputs.split([c.width for c in self.columns], dim=1), strict=True):
            if column.kind == "number":
                cells = block[:, 0].double() * column.std + column.mean
                numbers.append(cells.where(block[:, 1] == 0, torch.nan) if column.flag else cells)
            else:
                codes.append(block.argmax(1).where(block.any(1), UNSEEN))
        empty = inputs.new_zeros(len(inputs), 0)
        return torch.stack(numbers, 1) if numbers else empty.double(), torch.stack(codes, 1) if codes else empty.long()


def described(form: Columns) -> dict[str, Any]:
    """The columns of `numbers` and of `categories` in their order, and the words in theirs; what is no word of them is -1."""
    numbers = [column.name for column in form.columns if column.kind == "number"]
    words = {
        column.name: [*column.categories, *([None] if column.policy == "category" else [])]
        for column in form.columns
        if column.kind == "category"
    }
    return {"numbers": numbers, "categories": words}


def _after(subject: Subject) -> tuple[nn.Module, tuple[str, ...]]:
    answers = None if subject.preparation is None else subject.preparation.answers
    if isinstance(answers, Numbers):
        return _Restored(answers), ("values",)
    saved = subject.start.saved
    binary = saved is not None and saved.loss == "bce"
    if isinstance(answers, Classes) or subject.classes or binary:
        return _Shares(binary), ("scores", "probabilities")
    return _Scores(), ("scores",)


class _Scores(nn.Module):
    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        return (scores.clone(),)


class _Shares(nn.Module):
    """scores: (B, K).  returns: them, and the share of each class: independent ones by a sigmoid, else ones that add up to 1"""

    def __init__(self, independent: bool) -> None:
        super().__init__()
        self.independent = independent

    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        return scores, scores.sigmoid() if self.independent else scores.softmax(dim=1)


class _Restored(nn.Module):
    """Outputs become numbers in the data's units, (B, K) float32."""

    std: Tensor
    mean: Tensor

    def __init__(self, answers: Numbers) -> None:
        super().__init__()
        self.register_buffer("std", torch.tensor(answers.std))
        self.register_buffer("mean", torch.tensor(answers.mean))

    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        values = scores.reshape(scores.shape[0], -1) * self.std + self.mean
        return (values,)
