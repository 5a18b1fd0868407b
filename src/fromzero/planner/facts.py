"""Facts: a recipe in, what is known of machine, data and model out, with the data that was read on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fromzero.data import (
    ChatAsked,
    ImageFormat,
    Inputs,
    Loaded,
    Request,
    TextAsked,
    TextExamples,
    largest_batch,
    load,
    load_chat,
    load_corpus,
)
from fromzero.data.opening import find_path
from fromzero.data.table import read_text
from fromzero.data.tokens import add_tokens
from fromzero.devices import give_back_memory, held_memory, look_at_machine
from fromzero.errors import DataError, ModelError
from fromzero.models import Decoder, Encoder, ModelFacts, inspect_model
from fromzero.planner.values import Facts
from fromzero.recipe.schema import Adapter, BatchTokens, Given, ImageInput, Recipe
from fromzero.sources.cache import cache_folder, free_disk, room
from fromzero.tuning import Frozen, add_adapters, choose_targets, find_frozen, frozen_beside, new_head

PIECE = 256  # tokens of a piece of a corpus, where neither the recipe nor the model says
LARGE = 2**26  # bytes of a model whose copy is worth collecting at once
INSPECTED = 256  # tokens of a document that are run through the model to see what it keeps in memory
Built = tuple[nn.Module, Mapping[str, tuple[int, ...]]]  # the model, and the rows of the parts of its joined matrices
BuildModel = Callable[[Recipe, Loaded], Built]  # as the recipe's source gives it, before head, adapters and freeze


@dataclass(frozen=True)
class Look:
    facts: Facts
    loaded: Loaded


@dataclass(frozen=True)
class Reader:
    """What the model's source says of text: its tokenizer.json, how many positions it has, whether it reads tokens at all;
    its chat template, special tokens as texts, and the ids that end an answer."""

    tokenizer: str | None = None
    context: int | None = None
    reads_text: bool | None = None
    published: bool = False  # the weights were made for certain tokens
    template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    stops: tuple[int, ...] = ()


def look(recipe: Recipe, folders: tuple[Path, ...], build: BuildModel, reader: Reader, runs: Path) -> Look:
    """Read the data, build the model once and run two samples through it.

    folders: where relative paths are looked for, in this order.  runs: where the run will be
    """
    machine = replace(look_at_machine(recipe.limits.device), disk_bytes=room(cache_folder() / "kept"))
    asked = request(recipe, folders, reader)
    loaded = load_corpus(asked) if recipe.task == "language" else load_chat(asked) if recipe.task == "chat" else load(asked)
    inputs, targets = _two(loaded)
    model, joined = build(recipe, loaded)
    _refuse_long_texts(loaded, _context(recipe, reader, model))
    name = str(recipe.model.source)
    _refuse_unknown_tokens(model, loaded, name)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    two = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    seen = _looked_at(model, two, name, len(targets))
    if recipe.head.new:
        model = new_head(model, recipe.head.layer or seen.head, loaded.facts.outputs, linears=seen.linears)
        seen = _looked_at(model, two, name, len(targets))
    head = recipe.head.layer or seen.head
    adapted: dict[str, tuple[int, ...]] = {}
    if recipe.adapter is not None:
        adapted = _adapted(recipe.adapter, model, seen, joined)
        model = add_adapters(model, adapted, **adapter_options(recipe.adapter), seed=recipe.seed)
        seen = _looked_at(model, two, name, len(targets))
    layers, freeze, still = {layer.name: tuple(layer.tensors) for layer in seen.layers}, recipe.freeze, Frozen()
    if recipe.adapter is not None:
        rows = _vocabulary(model) if recipe.data.add_tokens is not None else ()
        still = frozen_beside(model, layers, learn=(*recipe.adapter.train, *rows), head=head if recipe.head.new else None)
    elif not freeze.nothing:
        parameters = [n for n, _ in model.named_parameters()]
        still = find_frozen(layers, parameters, head, body=freeze.body, through=freeze.through, names=freeze.names)
    if recipe.data.add_tokens is not None and (stuck := set(_vocabulary(model)) & set(still.parameters)):
        why = "the rows of added tokens would stay as they are made, the mean of all others"
        raise ModelError(f"freezes {', '.join(sorted(stuck))}", why=why, mend="freeze less, or add no tokens", key="freeze")
    del model
    return Look(Facts(machine, loaded.facts, seen, still, adapted, held_memory(), free_disk(runs), _largest(recipe, loaded)), loaded)


def adapter_options(asked: Adapter) -> dict[str, Any]:
    """A recipe's adapter as the tuning room wants it."""
    return {
        "rank": asked.rank,
        "alpha": asked.alpha,
        "rank_stabilised": asked.rank_stabilised,
        "dora": asked.name == "dora",
        "dropout": asked.dropout,
        "base": asked.base,
    }


def _vocabulary(model: nn.Module) -> tuple[str, ...]:
    """The parameters with a row for each token"""
    return model.vocabulary if isinstance(model, Decoder) else ()


def _looked_at(model: nn.Module, inputs: Inputs, name: str, rows: int) -> ModelFacts:
    seen = inspect_model(model, inputs, name, rows=rows)
    if seen.parameter_bytes > LARGE:
        give_back_memory()
    return seen


def _adapted(asked: Adapter, model: nn.Module, seen: ModelFacts, joined: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The Linears that get adapters, each with the rows of its parts: as many adapters as the published model has matrices there."""
    last = None if asked.layers == "all" else int(asked.layers.removeprefix("last-"))
    chosen = choose_targets(seen.linears, stages=seen.stages, head=seen.head, targets=asked.targets, last=last)
    modules = dict(model.named_modules())
    return {name: joined.get(name) or (int(modules[name].out_features),) for name in chosen}


def _largest(recipe: Recipe, loaded: Loaded) -> int:
    """Tokens of the largest batch among the run's first epochs; 0 where the examples are not of text"""
    train = loaded.train
    if not isinstance(train, TextExamples):
        return 0
    asked, count = recipe.batch, len(train)
    batch = count if asked == "all" or isinstance(asked, BatchTokens) else min(asked, count)
    tokens = asked.tokens if isinstance(asked, BatchTokens) else None
    return int(train.lengths[largest_batch(train.lengths, recipe.seed, recipe.epochs or math.inf, batch, tokens)].sum())


def _two(loaded: Loaded) -> tuple[Inputs, torch.Tensor]:
    """Two examples; of text the longest ones, so that memory is not guessed too low, and only their beginnings."""
    train = loaded.train
    if not isinstance(train, TextExamples):
        return train.take(torch.tensor([0, min(1, len(train) - 1)]))
    longest = train.lengths.argsort(descending=True)[:2]
    (tokens, offsets), targets = train.take(longest)
    kept = [offsets[i] + torch.arange(min(int(length), INSPECTED)) for i, length in enumerate(offsets.diff())]
    places = torch.cat(kept)
    short = torch.tensor([0, *map(len, kept)]).cumsum(0)
    return (tokens[places], short), targets[places] if train.answers is None else targets


def _context(recipe: Recipe, reader: Reader, model: nn.Module) -> int | None:
    """The tokens that a document may have; of conversations that are too long for a published model the plan speaks"""
    if reader.context is not None:
        return reader.context if recipe.task != "chat" else None
    if isinstance(model, Decoder):
        return None if model.embedding.positions is None else model.embedding.positions.num_embeddings
    return model.config.context if isinstance(model, Encoder) else None


def _refuse_long_texts(loaded: Loaded, context: int | None) -> None:
    """Nothing is cut unasked, and a model has no positions beyond its context."""
    if isinstance(loaded.train, TextExamples) and context is not None and loaded.facts.text is not None:
        parts = [part.lengths for part in (loaded.train, loaded.validation) if isinstance(part, TextExamples)]
        lengths = torch.cat(parts)
        if (long := int((lengths > context).sum())) > 0:
            raise DataError(
                f"{long} of {len(lengths)} texts have more tokens than the model has positions: up to {int(lengths.max())}, not {context}",
                why="nothing is cut unasked",
                mend=f"data.max_tokens={context} leaves their ends out",
                file=loaded.facts.source,
                key="data.max_tokens",
            )


def _refuse_unknown_tokens(model: nn.Module, loaded: Loaded, name: str) -> None:
    """A token id past the embedding would end in `index out of range` deep inside."""
    rows = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    text = loaded.facts.text
    if text is not None and rows is not None and text.vocabulary > rows:
        width = next(m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding))
        more, grow = text.vocabulary - rows, "or let it grow (data.add_tokens: auto), where " if isinstance(model, Decoder) else ""
        raise ModelError(
            f"the tokenizer has {text.vocabulary} tokens, the embedding of {name} only {rows}",
            why="it is the tokenizer of another model, or tokens were added to it",
            mend=f"use the model's own (data.tokenizer: auto); {grow}{more} more rows would be {more * width:,} untrained values",
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
    if data.add_tokens and data.add_tokens != "auto":
        if tokenizer in ("characters", "bpe"):
            mend = "they are in its texts; take data.add_tokens out, or name a tokenizer.json"
            raise DataError("adds tokens to a tokenizer that is made from the data", mend=mend, key="data.add_tokens")
        tokenizer = add_tokens(tokenizer, data.add_tokens)
    options = recipe.model.options
    context = reader.context or (options["context"] if isinstance(options.get("context"), int) else None)
    pieces = context or PIECE if recipe.task == "language" else None
    return TextAsked(tokenizer, data.vocabulary, data.max_tokens or pieces, stream=data.documents == "stream")


def _chat(recipe: Recipe, folders: tuple[Path, ...], reader: Reader, tokenizer: str) -> ChatAsked | None:
    data = recipe.data
    if recipe.task != "chat":
        return None
    template = reader.template if data.template == "auto" else read_text(find_path(data.template, folders))
    if template is None:
        mend = "name one: data.template: chat.jinja, or start from a model that was made to converse"
        raise ModelError("brings no chat template", why="turns would have no form", mend=mend, key="data.template")
    return ChatAsked(
        tokenizer=tokenizer,
        template=template,
        special=dict(reader.special),
        stops=reader.stops,
        context=reader.context,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        turns=data.turns,
        mapping=data.mapping,
    )


def request(recipe: Recipe, folders: tuple[Path, ...], reader: Reader) -> Request:
    """A recipe's data section as the data room wants it."""
    data = recipe.data
    limit = data.limit
    text = _text(recipe, folders, reader)
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
        text=text,
        reads_text=reader.reads_text,
        keep_shared=data.shared == "keep",
        chat=_chat(recipe, folders, reader, text.tokenizer),
        seed=recipe.seed,
        folders=folders,
    )
