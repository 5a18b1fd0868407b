"""Compare: two plans in, the rows in which they differ out; and those rows as text of 80 columns. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from fromzero.planner.show import WIDTH, predicted_peak, predicted_time
from fromzero.planner.values import Plan
from fromzero.report.summary import format_count, printable

NAME_WIDTH = 28  # of a row's name, at most; longer ones go on below
PREDICTED = {"predicted seconds": predicted_time, "predicted peak bytes": predicted_peak}


@dataclass(frozen=True)
class Difference:
    """group: recipe | facts | choices | plan; a value is None where one side does not have it."""

    group: str
    name: str
    this: Any
    other: Any


def differences(this: Plan, other: Plan) -> tuple[Difference, ...]:
    """What differs, in the order in which it is decided; nothing where the plans are the same.

    A run's name changes nothing. Seconds and bytes are measured anew for each plan, so that they say something only beside
    another difference.
    """
    sides = ("recipe", _recipe), ("facts", _facts), ("choices", _choices), ("plan", _plan)
    found = [Difference(group, *row) for group, look in sides for row in _rows(look(this), look(other))]
    if found:
        found += [Difference("plan", *row) for row in _rows(_predicted(this), _predicted(other))]
    return tuple(found)


def show_differences(this: Plan, other: Plan, names: tuple[str, str]) -> str:
    """Three columns, a heading for each group.  names: what to call the two plans"""
    found = differences(this, other)
    if not found:
        return f"the plans are the same: {names[0]} and {names[1]}"
    name_width = min(max(len(row.name) for row in found) + 2, NAME_WIDTH)
    widths = (name_width, *[(WIDTH - name_width - 4) // 2] * 2)
    lines, group = _side_by_side(("", *names), widths), ""
    for row in found:
        lines += [row.group] if row.group != group else []
        group = row.group
        if row.name in PREDICTED:
            written = [PREDICTED[row.name](plan) or "not measured" for plan in (this, other)]
        else:
            written = [_written(value) for value in (row.this, row.other)]
        lines += _side_by_side((f"  {row.name}", *written), widths)
    return "\n".join(lines)


def _rows(this: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*this, *other]):
        if this.get(name) != other.get(name):
            yield name, this.get(name), other.get(name)


def _recipe(plan: Plan) -> dict[str, Any]:
    """Every key by its dotted path, left out or not."""
    flat = dict(_flat(plan.recipe.model_dump(mode="json", by_alias=True), ""))
    flat.pop("name", None)
    return flat


def _flat(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _facts(plan: Plan) -> dict[str, Any]:
    data, model = plan.facts.data, plan.facts.model
    return {"data": data.digest, "training examples": data.train, "validation examples": data.validation, "parameters": model.parameters}


def _choices(plan: Plan) -> dict[str, Any]:
    return {choice.name: choice.value for choice in plan.choices}


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "steps": plan.steps,
        "steps an epoch": plan.steps_per_epoch,
        "trainable parameters": plan.trainable_parameters,
        "grade": plan.grade,
        "refused": bool(plan.errors),
    }


def _predicted(plan: Plan) -> dict[str, Any]:
    return dict(zip(PREDICTED, (plan.predicted_seconds, plan.predicted_peak_bytes), strict=True))


def _written(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_written, value)) or "none"
    return format_count(value) if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else printable(str(value))


def _side_by_side(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Cells beside each other, two spaces apart; what does not fit into its column goes on below."""
    columns = [
        textwrap.wrap(cell, width, subsequent_indent=" " * (4 if number == 0 else 0), break_on_hyphens=False)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return [
        "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*columns, fillvalue="")
    ]
