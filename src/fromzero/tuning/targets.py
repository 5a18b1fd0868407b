"""Targets: the Linears of a model and what a recipe asks for in, the names of those that get an adapter out."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from fromzero.errors import RecipeError, nearest

KINDS = {"attention": {"attention", "attn", "self_attn"}, "mlp": {"mlp", "ffn", "feed_forward"}}  # components of a name


def choose_targets(
    linears: Sequence[str], *, stages: Sequence[str], head: str | None, targets: str | Sequence[str], last: int | None = None
) -> tuple[str, ...]:
    """Decide which Linears get an adapter.

    linears:  names, in the order they run
    stages:   the chain that the model is
    head:     the Linear that `all-linear` leaves out
    targets:  attention, mlp, all-linear, globs or last components of names; one or several
    last:     only inside so many of the last stages that hold a target
    raises:   RecipeError for each target that matches no Linear, with the nearest
    """
    asked = [targets] if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for target in asked:
        hits = {name for name in linears if _means(target, name, head)}
        if not hits:
            close = nearest(target.strip("*."), [*KINDS, "all-linear", *linears, *(name.rpartition(".")[2] for name in linears)], count=3)
            mend = f"did you mean {' or '.join(repr(name) for name in close)}?" if close else f"they are {', '.join(linears[:8])} …"
            raise RecipeError(f"'{target}' matches no Linear of the model", mend=mend, key="adapter.targets")
        found |= hits
    if last is not None:
        holding = [stage for stage in stages if any(_inside(name, stage) for name in found)][-last:]
        found = {name for name in found if any(_inside(name, stage) for stage in holding)}
        if not found:
            raise RecipeError(
                "no target lies inside a stage of the model",
                why="its stages are not known" if not stages else f"they are {', '.join(stages)}",
                mend="name the targets with globs instead",
                key="adapter.layers",
            )
    return tuple(name for name in linears if name in found)


def _means(target: str, name: str, head: str | None) -> bool:
    if target == "all-linear":
        return name != head
    parts = name.split(".")
    return not KINDS[target].isdisjoint(parts) if target in KINDS else fnmatch.fnmatchcase(name, target) or parts[-1] == target


def _inside(name: str, stage: str) -> bool:
    return name == stage or name.startswith(f"{stage}.")
