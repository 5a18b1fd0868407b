"""Parameter groups: names, parameters and learning-rate multipliers in, the groups of an optimizer out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Parameter

from fromzero.errors import Fault, RecipeError, nearest


def parameter_groups(named_parameters: Iterable[tuple[str, Parameter]], lr: float, lr_scale: Mapping[str, float]) -> list[dict[str, Any]]:
    """One group for each distinct multiplier, in the order in which the parameters first need it.

    The first glob that matches decides; a glob matches a parameter by its name or by that of a module around it
    (`body.conv?` matches body.conv1.weight). What no glob matches has multiplier 1.

    named_parameters: those that train; frozen ones are not among them
    returns:          groups with `params`, `lr`, and `base_lr`, the lr that a schedule's factor multiplies
    raises:           RecipeError with every glob that matches nothing
    """
    named = list(named_parameters)
    _require_matches([name for name, _ in named], lr_scale)
    by_scale: dict[float, list[Parameter]] = {}
    for name, parameter in named:
        by_scale.setdefault(lr_multiplier(name, lr_scale), []).append(parameter)
    return [{"params": params, "lr": lr * scale, "base_lr": lr * scale} for scale, params in by_scale.items()]


def lr_multiplier(name: str, lr_scale: Mapping[str, float]) -> float:
    """What the learning rate of one parameter is multiplied by: the first glob that matches, else 1."""
    return next((scale for glob, scale in lr_scale.items() if _matches(glob, name)), 1.0)


def _matches(glob: str, name: str) -> bool:
    return any(fnmatchcase(part, glob) for part in _paths(name))


def _paths(name: str) -> list[str]:
    """The name and the modules around it: a.b.c → a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _require_matches(names: list[str], lr_scale: Mapping[str, float]) -> None:
    known = list(dict.fromkeys(path for name in names for path in _paths(name)))
    faults = []
    for glob in lr_scale:
        if any(fnmatchcase(path, glob) for path in known):
            continue
        close = nearest(glob, known, count=3)
        faults.append(
            Fault(
                f"'{glob}' matches no parameter that trains",
                why="a frozen parameter has no learning rate",
                mend=("nearest are " if close else "there are ") + ", ".join(close or names[:5]),
                key="optimizer.lr_scale",
            )
        )
    if faults:
        raise RecipeError(faults)
