"""Facts: a recipe in, what is known of machine, data and model out, with the data that was read on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fromzero.data import ImageFormat, Loaded, Request, TextAsked, TextExamples, load, load_corpus
from fromzero.data.opening import find_path
from fromzero.data.table import read_text
from fromzero.devices import look_at_machine
from fromzero.errors import DataError, ModelError
from fromzero.models import inspect_model
from fromzero.planner.values import Facts
from fromzero.recipe.schema import Given, ImageInput, Recipe
from fromzero.tuning import Frozen, find_frozen, new_head

PIECE = 256  # tokens of a piece of a corpus, where neither the recipe nor the model says
BuildModel = Callable[[Recipe, Loaded], nn.Module]  # the model as the recipe's source gives it, before head and freeze


@dataclass(frozen=True)
class Look:
    facts: Facts
    loaded: Loaded


@dataclass(frozen=True)
class Reader:
    """What the model's source says of text: its tokenizer.json, how many positions it has, whether it reads tokens at all."""

    tokenizer: str | None = None
    context: int | None = None
    reads_text: bool | None = None
    published: bool = False  # the weights were made for certain tokens


def look(recipe: Recipe, folders: tuple[Path, ...], build: BuildModel, reader: Reader) -> Look:
    """Read the data, build the model once and run two samples through it.

    folders: where relative paths are looked for, in this order
    """
    machine = look_at_machine(recipe.limits.device)
    asked = request(recipe, folders, reader)
    loaded = load_corpus(asked) if recipe.task == "language" else load(asked)
    _refuse_long_texts(loaded, reader)
    inputs, targets = loaded.train.take(_two(loaded))
    model = build(recipe, loaded)
    name = str(recipe.model.source)
    _refuse_unknown_tokens(model, loaded, name)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    two = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    seen = inspect_model(model, two, name, rows=len(targets))
    if recipe.head.new:
        model = new_head(model, recipe.head.layer or seen.head, loaded.facts.outputs, linears=seen.linears)
        seen = inspect_model(model, two, name, rows=len(targets))
    layers = {layer.name: tuple(layer.tensors) for layer in seen.layers}
    freeze = recipe.freeze
    parameters = [n for n, _ in model.named_parameters()]
    head = recipe.head.layer or seen.head
    still = (
        Frozen() if freeze.nothing else find_frozen(layers, parameters, head, body=freeze.body, through=freeze.through, names=freeze.names)
    )
    return Look(Facts(machine, loaded.facts, seen, still), loaded)


def _two(loaded: Loaded) -> torch.Tensor:
    """Two examples; of text the longest ones, so that memory is not guessed too low."""
    if isinstance(loaded.train, TextExamples):
        return loaded.train.lengths.argsort(descending=True)[:2]
    return torch.tensor([0, min(1, len(loaded.train) - 1)])


def _refuse_long_texts(loaded: Loaded, reader: Reader) -> None:
    """Nothing is cut unasked, and a model has no positions beyond its context."""
    if isinstance(loaded.train, TextExamples) and reader.context is not None and loaded.facts.text is not None:
        parts = [part.lengths for part in (loaded.train, loaded.validation) if isinstance(part, TextExamples)]
        lengths = torch.cat(parts)
        if (long := int((lengths > reader.context).sum())) > 0:
            raise DataError(
                f"{long} of {len(lengths)} texts have more tokens than the model has positions: up to {int(lengths.max())}, not {reader.context}",
                why="nothing is cut unasked",
                mend=f"data.max_tokens={reader.context} leaves their ends out",
                file=loaded.facts.source,
                key="data.max_tokens",
            )


def _refuse_unknown_tokens(model: nn.Module, loaded: Loaded, name: str) -> None:
    """A token id past the embedding would end in `index out of range` deep inside."""
    rows = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    text = loaded.facts.text
    if text is not None and rows is not None and text.vocabulary > rows:
        width = next(m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding))
        more = text.vocabulary - rows
        raise ModelError(
            f"the tokenizer has {text.vocabulary} tokens, the embedding of {name} only {rows}",
            why="it is the tokenizer of another model, or tokens were added to it",
            mend=f"use the model's own (data.tokenizer: auto); {more} more rows would be {more * width:,} untrained values",
            key="data.tokenizer",
        )


def _text(recipe: Recipe, folders: tuple[Path, ...], reader: Reader) -> TextAsked:
    data = recipe.data
    tokenizer = data.tokenizer
    if tokenizer == "auto" and reader.published and reader.reads_text and reader.tokenizer is None:
        raise ModelError(
            "brings no tokenizer.json", why="its weights mean nothing for other tokens", mend="name its own", key="data.tokenizer"
        )
    if tokenizer == "auto":
        tokenizer = reader.tokenizer or "bpe"
    elif tokenizer not in ("characters", "bpe"):
        tokenizer = read_text(find_path(tokenizer, folders))
    options = recipe.model.options
    context = reader.context or (options["context"] if isinstance(options.get("context"), int) else None)
    pieces = context or PIECE if recipe.task == "language" else None
    return TextAsked(tokenizer, data.vocabulary, data.max_tokens or pieces)


def request(recipe: Recipe, folders: tuple[Path, ...], reader: Reader) -> Request:
    """A recipe's data section as the data room wants it."""
    data = recipe.data
    limit = data.limit
    image = ImageFormat(data.input.size[0], data.input.size[1], data.input.channels) if isinstance(data.input, ImageInput) else None
    kinds = {"bce": "binary", "cross_entropy": "index", "own": "index" if recipe.task == "classify" else "number"}
    return Request(
        train=data.train.value if isinstance(data.train, Given) else data.train,
        validation=data.validation.value if isinstance(data.validation, Given) else data.validation,
        hold_out=data.hold_out,
        columns=data.input if isinstance(data.input, tuple) else None,
        image=image,
        target=data.target,
        classes=data.classes,
        limit=limit.examples if limit else None,
        per_class=limit.per_class if limit else None,
        missing=data.missing,
        scale_target=data.scale_target == "standard",
        skip_broken=data.skip_broken,
        answers=kinds.get(recipe.loss_name, "number"),
        text=_text(recipe, folders, reader),
        reads_text=reader.reads_text,
        keep_shared=data.shared == "keep",
        seed=recipe.seed,
        folders=folders,
    )
