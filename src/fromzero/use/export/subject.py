"""Subject: a source in; the module that is exported, what it reads, and inputs with what it says of them out. Knows no format.

Dims: B batch, N tokens end to end, V vocabulary, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fromzero.data.tokens as tk
from fromzero.data import ChatFormat, Classes, ImageFormat, Inputs, Preparation, TextFormat
from fromzero.data.columns import Column, Columns
from fromzero.data.sources import ArrayFormat
from fromzero.data.table import table_of
from fromzero.errors import ModelError
from fromzero.models import Decoder
from fromzero.models.encoder import Encoder
from fromzero.models.foreign import Foreign
from fromzero.models.generate import generate
from fromzero.models.vit import ViT
from fromzero.runner.probe_inputs import read_probe
from fromzero.runner.saved import Design
from fromzero.runner.start import Start, build_published, find_start, published_of
from fromzero.use.export.compare import BOUND, compare
from fromzero.weights.tensors import first_not_finite

MADE, MADE_ROWS = (40, 24), 8  # tokens of two made-up documents; made-up images, arrays or rows of a table
CONTINUED = 12  # tokens of the greedy continuation
TEXTS = ("The capital of France is Paris.", "  2024: naïve café, 東京 🎉\n\n\tx = [1, 22, 333]; don't 'quote'")


@dataclass(frozen=True)
class Subject:
    """What is exported.

    model:    in eval mode on the CPU, with plain matrices in the place of adapters
    reads:    language (scores of the next token) | text | image | table | array
    inputs:   the arguments of the model;  said: its outputs for them
    real:     whether the inputs are examples of the run, and not made up
    numbers:  asked of the file's, where the format has several kinds
    """

    source: str
    start: Start
    model: nn.Module
    design: Design
    reads: str
    inputs: Inputs
    said: Tensor
    real: bool
    numbers: str = ""

    @property
    def documents(self) -> list[Tensor]:
        """The texts among the inputs, (T,) int64 each"""
        tokens, offsets = self.inputs
        return [tokens[begin:end] for begin, end in pairwise(offsets.tolist())]

    @property
    def each(self) -> list[Tensor]:
        """What was said of each of the documents: (T, V) of a language model, else (K,)"""
        if self.reads != "language":
            return list(self.said)
        return list(self.said.split([len(document) for document in self.documents]))

    @property
    def compared_on(self) -> str:
        count = len(self.inputs[0] if len(self.inputs) == 1 else self.documents)
        return f"{count} examples of its run" if self.real else f"{count} made-up inputs: none were kept with it"

    @property
    def preparation(self) -> Preparation | None:
        return None if self.start.saved is None else self.start.saved.preparation

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each output, where outputs are classes: of one output it is the second class, whose share it gives."""
        if self.preparation is not None:
            answers = self.preparation.answers
            names = answers.names if isinstance(answers, Classes) else ()
            return names[1:] if isinstance(answers, Classes) and answers.binary else names
        labels = self.start.config.get("id2label") or {}
        return tuple(str(labels[key]) for key in sorted(labels, key=int)) if self.reads in ("text", "image") else ()

    @property
    def texts(self) -> list[str]:
        """What tokenizers are compared on"""
        assert self.start.tokenizer is not None
        found = [tk.decode(self.start.tokenizer, document.tolist()) for document in self.documents] if self.real else []
        return [*TEXTS, *found]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        assert self.start.tokenizer is not None
        return tk.encode(self.start.tokenizer, texts, special=False)

    def continuation(self) -> tuple[list[int], list[int]]:
        """A language model's prompt, and its greedy continuation as far as each token is clearly the best: another order of additions
        may decide between two that are nearly as good."""
        prompt = self.documents[0][:8].tolist()
        made = list(generate(self.model, prompt, most=CONTINUED, stops=()))
        whole = torch.tensor([*prompt, *made])
        with torch.no_grad():
            scores = self.model(whole, torch.tensor([0, len(whole)]))[len(prompt) - 1 : -1]
        best = scores.topk(2).values
        clear = (best[:, 0] - best[:, 1] > 2 * BOUND * scores.abs().amax(1)).tolist()
        return prompt, made[: clear.index(False) if False in clear else len(made)]


def open_subject(source: str, runs: Path, *, given: nn.Module | None = None, numbers: str = "") -> Subject:
    """raises: SourceError, ModelError where the source is not there, has no weights, or no longer says what it said in its run"""
    start = find_start(source, (Path(),), runs)
    if start.saved is not None:
        saved = start.saved
        model, design = saved.load(given, merge=saved.design.adapted is not None), saved.design
    else:
        model, design = build_published(published_of(start, source), {})
        model.eval()
    if wrong := first_not_finite(model.state_dict()):
        raise ModelError(f"'{source}': {wrong}", why="whoever opened the folder would get NaN for every input", mend="export another run")
    reads = _reads(start, model, design)
    probe = None if start.saved is None else read_probe(start.saved.folder)
    inputs = _made_up(start, model, reads) if probe is None else probe.inputs
    with torch.no_grad():
        said = model(*inputs)
    if probe is not None:
        compare(f"'{source}', opened again,", probe.outputs, said[probe.rows])
    return Subject(source, start, model, design, reads, inputs, said, probe is not None, numbers)


def _reads(start: Start, model: nn.Module, design: Design) -> str:
    if start.saved is not None:
        form = start.saved.preparation.inputs
        if start.saved.task in ("language", "chat"):
            return "language"
        kinds = {TextFormat: "text", ChatFormat: "text", ImageFormat: "image", Columns: "table"}
        image = isinstance(form, ArrayFormat) and form.divisor is not None
        return "image" if image else kinds.get(type(form), "array")
    if isinstance(model, Foreign):
        return "language" if model.per_token else "text" if model.theirs.main_input_name == "input_ids" else "image"
    if isinstance(model, Decoder):
        return "language" if model.outputs is None else "text"
    return "text" if design.family is not None and design.family.reads == "text" else "image"


def _made_up(start: Start, model: nn.Module, reads: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    if reads in ("language", "text"):
        vocabulary = _vocabulary(start, model)
        parts = [torch.randint(vocabulary, (length,), generator=generator) for length in MADE]
        return torch.cat(parts), torch.tensor([0, *MADE]).cumsum(0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if start.saved is not None and isinstance(form := start.saved.preparation.inputs, Columns):
        return (form.apply(table_of({column.name: _cells(column) for column in form.columns}, name="made-up rows")).to(dtype),)
    shape = _shape(start, model)
    pixels = torch.randint(256, (MADE_ROWS, *shape), generator=generator).to(dtype) / 255
    return (pixels,)


def _cells(column: Column) -> list[Any]:
    if column.kind == "number":
        return [column.mean + column.std * (row - 3.5) / 2 for row in range(MADE_ROWS)]
    return [column.categories[row % len(column.categories)] for row in range(MADE_ROWS)]


def _vocabulary(start: Start, model: nn.Module) -> int:
    if isinstance(model, (Decoder, Encoder)):
        return model.config.vocabulary
    if isinstance(model, Foreign):
        return int(model.theirs.config.vocab_size)
    if start.tokenizer is None:
        raise ModelError("says nowhere how many tokens it knows, so that nothing can be compared", mend="train it in a run")
    return tk.vocabulary_size(start.tokenizer)


def _shape(start: Start, model: nn.Module) -> tuple[int, ...]:
    if start.saved is not None:
        form = start.saved.preparation.inputs
        assert not isinstance(form, Columns)
        return form.shape
    if isinstance(model, ViT):
        return model.embedding.shape
    size: Any = start.config.get("image_size") or 224
    height, width = (size, size) if isinstance(size, int) else size
    return (int(start.config.get("num_channels", 3)), height, width)
