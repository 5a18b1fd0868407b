"""Changes: the recipe that a run was begun with and the one it is to go on with in, what differs out, or why it may not. Knows no run.

The two tables are the whole rule; docs/resume.md shows them, and a test holds that every key of a recipe stands in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fromzero.errors import Fault, RecipeError
from fromzero.recipe.read import Written
from fromzero.recipe.schema import Recipe

_LENGTH = "longer or shorter; what that does to a schedule is said below"
_HOW = "how it is carried out, not what is computed; sums may be added in another order"
MAY_CHANGE = {
    "epochs": _LENGTH,
    "steps": _LENGTH,
    "tokens": _LENGTH,
    "evaluate.stop_after": "when to stop early; evaluations without a gain are counted on",
    "evaluate.samples": "texts to read along; nothing is learned from them",
    "save.every": "when checkpoints are written; no number depends on it",
    "save.keep": "how many checkpoints stay",
    "save.full": "what happens where the disk is full; no number depends on it",
    "not_finite.skip": "how many steps may be skipped; those that were are counted on",
    "limits.seconds": "seconds of training over all restarts together",
    "limits.memory": _HOW,
    "limits.threads": _HOW,
    "limits.micro_batch": _HOW,
    "limits.compile": _HOW,
    "report": "who hears of the run",
}

_TAKEN = "the steps already taken were taken with the other value, and no run from the start would give these weights"
STAYS = {
    "name": "the run's folder has its name",
    "task": "it is another task",
    "model": "the weights of the checkpoint belong to the model that the run began with",
    "head": "the weights of the checkpoint belong to the model that the run began with",
    "freeze": "the optimizer's state belongs to the parameters that learned so far",
    "adapter": "the weights of the checkpoint belong to the model that the run began with",
    "data": "the order of the examples and what was held out follow from it",
    "loss": _TAKEN,
    "metrics": "figures before and after could not be compared",
    "optimizer": _TAKEN,
    "schedule": _TAKEN,
    "batch": "the position in the epoch and the number of steps are counted in batches",
    "clip": _TAKEN,
    "precision": _TAKEN,
    "seed": "order, split and dropout follow from it",
    "evaluate.every": "which weights can be the best, and what stop_after counts, follow from it",
    "evaluate.keep": "the weights kept so far were kept by the other rule",
    "limits.device": "sums are added in another order on another device; auto takes the device of the machine it goes on with",
    "certificate": "it was taken, or left out, before the first step",
    "trust": "it was given when the run began",
}


def changes(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key → its value then and now, defaults written out; a section whose name has changed is named by that alone."""
    then, now = (dict(_leaves(recipe.model_dump(by_alias=True))) for recipe in (before, after))
    found = {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
    renamed = {key.rpartition(".")[0]: key for key in found if key.endswith((".name", ".from"))}
    return {key: pair for key, pair in found.items() if renamed.get(key.partition(".")[0], key) == key}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What is none, or empty, is as if it were not there."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif value is not None:
        yield key, value


def rule(key: str) -> tuple[bool, str]:
    """Whether a key, or a section around it, may change in a run that goes on; and what that means, or why not."""
    words = key.split(".")
    nearest = next(around for n in range(len(words), 0, -1) if (around := ".".join(words[:n])) in MAY_CHANGE or around in STAYS)
    return nearest in MAY_CHANGE, MAY_CHANGE.get(nearest) or STAYS[nearest]


def refuse_changes(changed: Mapping[str, Sequence[Any]], written: Written, run: str) -> None:
    """raises: RecipeError with every change that may not be"""
    refused = {key: pair for key, pair in changed.items() if not rule(key)[0]}
    faults = []
    for number, (key, (then, now)) in enumerate(refused.items(), 1):
        file, line = written.place(tuple(key.split(".")))
        what = f"cannot become {shown(now)} in a run that was begun with {shown(then)}"
        mend = f"for a run that begins with these weights: model: run:{run} in a new recipe" if number == len(refused) else ""
        faults.append(Fault(what, rule(key)[1], mend, file, line, key))
    if faults:
        raise RecipeError(faults)


def shown(value: Any) -> str:
    """A value as a recipe would hold it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value).removesuffix(".0") if isinstance(value, float) else str(value)
