"""Facts: a recipe in, what is known of machine, data and model out, with the data that was read on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fromzero.data import ImageFormat, Loaded, Request, load
from fromzero.devices import look_at_machine
from fromzero.models import inspect_model
from fromzero.planner.values import Facts
from fromzero.recipe.schema import Given, ImageInput, Recipe
from fromzero.tuning import Frozen, find_frozen, new_head

BuildModel = Callable[[Recipe, Loaded], nn.Module]  # the model as the recipe's source gives it, before head and freeze


@dataclass(frozen=True)
class Look:
    facts: Facts
    loaded: Loaded


def look(recipe: Recipe, folders: tuple[Path, ...], build: BuildModel) -> Look:
    """Read the data, build the model once and run two samples through it.

    folders: where relative paths are looked for, in this order
    """
    machine = look_at_machine(recipe.limits.device)
    loaded = load(request(recipe, folders))
    inputs, targets = loaded.train.take(torch.tensor([0, min(1, len(loaded.train) - 1)]))
    model = build(recipe, loaded)
    name = str(recipe.model.source)
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


def request(recipe: Recipe, folders: tuple[Path, ...]) -> Request:
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
        seed=recipe.seed,
        folders=folders,
    )
