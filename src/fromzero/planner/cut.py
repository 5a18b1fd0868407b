"""Cut: what is known of a model, and of what stands still in it, in; the module where steps may begin out, and what is kept there. Pure."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import NamedTuple

from fromzero.models import LayerFacts
from fromzero.planner.values import Facts
from fromzero.recipe.schema import Recipe
from fromzero.report.summary import format_bytes, format_seconds

_SHARE = 0.25  # of the free memory
LOST_SECONDS = 1.0  # that keeping may cost in all, beside a tenth of the run; trial steps are not more exact
_LOOKED_UP = ("Embedding", "EmbeddingBag")  # layers that take no time


class Cut(NamedTuple):
    """The first module that still runs, where what it reads is kept (memory, file), its bytes, and why; no module: all runs each time."""

    module: str = ""
    place: str = ""
    bytes: int = 0
    why: str = ""


NO_CUT = Cut()


def choose_cut(recipe: Recipe, facts: Facts, steps: int, *, again: bool) -> Cut:
    """Where steps begin. No reason either where nothing that takes time stands still before the first layer that learns.

    again:  examples are taken more than once
    """
    cut, why = _find(facts, recipe.head.layer or facts.model.head)
    if not cut:
        return Cut(why=why)
    if recipe.data.augment is not None:
        return Cut(why="data.augment changes the inputs every epoch")
    if facts.data.kind == "items":
        return Cut(why="a dataset of your own may give something else each time")
    if not again:
        return Cut(why="no example is taken twice")
    if cut not in facts.model.reads:
        return Cut(why=f"what {cut} reads is not one tensor with a row for each example")
    machine, seen, needs = facts.machine, facts.measured, _bytes(recipe, facts, cut)
    memory = machine.host_bytes if recipe.limits.memory == "auto" else min(recipe.limits.memory, machine.host_bytes)
    place = "memory" if needs <= memory * _SHARE else "file"
    if place == "file" and needs > machine.disk_bytes:
        room = f"more than a quarter of the memory, and than the {format_bytes(machine.disk_bytes)} of the disk"
        return Cut(why=f"what {cut} reads of all examples is {format_bytes(needs)}: {room}")
    gain = ""
    if seen is not None and seen.no_cut:
        return Cut(why=seen.no_cut)
    if seen is not None and seen.kept_step_seconds is not None and seen.pass_seconds is not None:
        once = (facts.data.train + facts.data.validation) * seen.pass_seconds
        lost = once + steps * (seen.kept_step_seconds - seen.step_seconds)
        if lost > LOST_SECONDS + steps * seen.step_seconds / 10:
            return Cut(why=f"kept before {cut}, the run would take {format_seconds(lost)} more")
        gain = f"; a step takes {format_seconds(seen.kept_step_seconds)} instead of {format_seconds(seen.step_seconds)}"
    held = "in memory" if place == "memory" else "in a file of the cache"
    return Cut(cut, place, needs, f"what {cut} reads is computed once, {format_bytes(needs)} {held}{gain}")


def _find(facts: Facts, head: str | None) -> tuple[str, str]:
    """The stage, or the layer between stages, with the first layer that learns or is no function of its input alone.

    In a model whose stages are not known, the head where it alone learns.
    """
    model, still, at_rest = facts.model, set(facts.frozen.parameters), set(facts.frozen.layers)
    moves = {*model.draws, *model.coupled} - at_rest

    def stands(layer: LayerFacts) -> bool:
        return still.issuperset(layer.tensors) and layer.name not in moves

    before = list(takewhile(stands, model.layers))
    if len(before) == len(model.layers):
        return "", ""
    first = model.layers[len(before)].name
    cut = next((stage for stage in model.stages if f"{first}.".startswith(f"{stage}.")), first)
    if not any(_takes_time(layer) for layer in before if not f"{layer.name}.".startswith(f"{cut}.")):
        return "", ""
    learn = {name for layer in model.layers for name in layer.tensors if name not in still}
    if not model.stages and learn != next((set(layer.tensors) for layer in model.layers if layer.name == head == cut), None):
        return "", f"where it ends is not known: {model.no_stages}"
    return cut, ""


def _takes_time(layer: LayerFacts) -> bool:
    return bool(layer.tensors) and layer.kind not in _LOOKED_UP and "Norm" not in layer.kind


def _bytes(recipe: Recipe, facts: Facts, cut: str) -> int:
    """Of what the cut reads of all examples; validation texts are taken to be as long as the others"""
    reads, data = facts.model.reads[cut], facts.data
    rows = data.train + data.validation
    if reads.per_token and data.text is not None:
        rows = math.ceil(rows * data.text.tokens / max(data.train, 1))
    return (8 if recipe.precision == "float64" else 4) * rows * math.prod(reads.shape)
