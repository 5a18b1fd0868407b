"""Summaries: a run's events or a list of runs in, a text table of at most 80 columns out. Prints nothing.

Also the one way in which numbers are written for people: `format_number`, `format_count`, `format_seconds`, `format_bytes`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

WIDTH = 80
NOTHING = "-"  # stands where a value is missing
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 48
_NAME_WIDTH = 28  # a run's name in a table, at most; longer ones lose their middle
_METRIC_WIDTH = 21  # kept free for the longest metric, `token_accuracy 0.9812`


def curve_table(events: Sequence[dict[str, Any]]) -> str:
    """One line per evaluation under a sparkline of the training loss; metrics that do not fit are named below."""
    events = history(events)
    evaluations = [event for event in events if event.get("event") == "Evaluated"]
    losses = [finite(event.get("loss")) for event in events if event.get("event") == "StepDone"]
    known = [loss for loss in losses if loss is not None] or [
        loss for event in evaluations if (loss := finite(event.get("loss"))) is not None
    ]
    lines = [f"loss {sparkline(known)}  {format_number(known[0])} → {format_number(known[-1])}"] if known else []
    if not evaluations:
        return "\n".join([*lines, "no evaluation yet"])
    names = metric_names(evaluations)
    shown = list(names)
    while shown and _widest(table := _curve_rows(evaluations, shown)) > WIDTH:
        shown.pop()
    table = _curve_rows(evaluations, shown)
    left_out = [name for name in names if name not in shown]
    note = textwrap.wrap(printable(f"no room for: {', '.join(left_out)}"), WIDTH, subsequent_indent="  ") if left_out else []
    return "\n".join([*lines, *table, *note])


def runs_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per run, the newest last. Rows: run, status, task, steps, seconds, validation {loss, metrics}, created."""
    if not rows:
        return "no runs yet"
    rows = sorted(rows, key=lambda row: (row.get("created") is not None, str(row.get("created"))))
    fixed = [
        [
            cut(printable(str(row.get("status") or NOTHING)), 11),
            cut(printable(str(row.get("task") or NOTHING)), 8),
            NOTHING if row.get("steps") is None else format_count(row["steps"]),
            NOTHING if row.get("seconds") is None else format_seconds(row["seconds"]),
        ]
        for row in rows
    ]
    states = _align([["status", "task", "steps", "time"], *fixed], left=2)
    name_width = min(_NAME_WIDTH, WIDTH - _widest(states) - _METRIC_WIDTH - 4)
    names = ["run", *(cut(printable(str(row.get("run") or NOTHING)), name_width) for row in rows)]
    table = _align(list(zip(names, states, strict=True)), left=2)
    width = _widest(table)
    room = WIDTH - width - 2
    lasts = ["validation", *(_last_metrics(row.get("validation") or {}, room) for row in rows)]
    return "\n".join(f"{line:<{width}}  {last}".rstrip() for line, last in zip(table, lasts, strict=True))


def predictions_table(rows: Sequence[dict[str, Any]], medians: dict[str, float | None]) -> str:
    """One line per run: predicted and actual seconds and peak memory, how far off in per cent; then the medians of the errors.

    rows: run, status, predicted_seconds, seconds, seconds_error, predicted_peak_bytes, peak_bytes, peak_error; + is predicted too high
    """
    figures = [
        [
            *(_or_nothing(row.get(name), format_seconds) for name in ("predicted_seconds", "seconds")),
            _or_nothing(row.get("seconds_error"), _per_cent),
            *(_or_nothing(row.get(name), format_bytes) for name in ("predicted_peak_bytes", "peak_bytes")),
            _or_nothing(row.get("peak_error"), _per_cent),
        ]
        for row in rows
    ]
    table = _align([["predicted", "time", "error", "predicted", "peak", "error"], *figures], left=0)
    marks = ["" if row.get("status") == "done" else "*" for row in rows]
    width = min(_NAME_WIDTH, WIDTH - _widest(table) - 2)
    names = ["run", *(cut(printable(str(row.get("run"))), width - len(mark)) + mark for row, mark in zip(rows, marks, strict=True))]
    lines = _align(list(zip(names, table, strict=True)), left=1)
    if any(marks):
        lines.append("* stopped or interrupted: not in the medians")
    said = [
        f"{what} {medians[name]:.1%}"
        for what, name in (("time", "seconds_error"), ("peak memory", "peak_error"))
        if medians[name] is not None
    ]
    return "\n".join([*lines, f"median of the absolute errors: {', '.join(said) or 'no run is done yet'}"])


def _or_nothing(value: object, written: Callable[[float], str]) -> str:
    return NOTHING if (number := finite(value)) is None else written(number)


def _per_cent(share: float) -> str:
    return f"{share:+.0%}"


def history(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that count: a run that went on from step s did the steps after s again, so the first ones are dropped."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == "Started":
            first = finite(event.get("step")) or 0
            kept = [
                old for old in kept if old.get("event") not in ("StepDone", "Evaluated", "Saved") or (finite(old.get("step")) or 0) <= first
            ]
        kept.append(event)
    return kept


def metric_names(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Every metric that any evaluation has, in the order in which they appear."""
    return list(dict.fromkeys(str(name) for event in evaluations for name in event.get("metrics") or {}))


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Finite values as block characters, the mean of each slice where there are more values than `width`."""
    count = min(width, len(values))
    bounds = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [math.fsum(value / (end - start) for value in values[start:end]) for start, end in pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = high / 2 - low / 2 or 1.0  # halved, so that the difference of two huge numbers stays finite
    return "".join(_SPARKS[round((mean / 2 - low / 2) / span * (len(_SPARKS) - 1))] for mean in means)


def finite(value: object) -> float | None:
    """A finite number as a float, anything else as None: events come from a file."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def printable(text: str) -> str:
    """One line without control characters: a run's name must not be able to drive a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def cut(text: str, width: int) -> str:
    """At most `width` letters; what is too long loses its middle, because names differ at both ends."""
    if len(text) <= width:
        return text
    head = max(0, width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def format_number(value: float | None) -> str:
    """`0.1234`, `123.4`, `1.2e-05`; `-` for None."""
    if value is None:
        return NOTHING
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.1f}" if size >= 100 else f"{value:.4f}"


def format_count(count: float) -> str:
    """`1,199,882`"""
    return f"{round(count):,}" if math.isfinite(count) else "?"


def format_seconds(seconds: float) -> str:
    """`4 ms`, `0.8 s`, `12 s`, `3 min 5 s`, `2 h 4 min`, `1 d 3 h`."""
    if not math.isfinite(seconds):
        return "?"
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else f"{seconds * 1000:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def format_bytes(count: float) -> str:
    """`512 B`, `1.2 GB`: powers of 1000, as disks and vendors count."""
    if not math.isfinite(count):
        return "?"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if round(size) < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" and size < 99.95 else f"{size:.0f} {unit}"


def _curve_rows(evaluations: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[str]:
    rows = [["step", "epoch", "train", "validation", *(printable(name) for name in metrics), ""]]
    for event in evaluations:
        values = event.get("metrics") or {}
        numbers = [event.get("train_loss"), event.get("loss"), *(values.get(name) for name in metrics)]
        steps = [NOTHING if (count := finite(event.get(key))) is None else format_count(count) for key in ("step", "epoch")]
        rows.append([*steps, *(format_number(finite(number)) for number in numbers), "best" if event.get("best") else ""])
    return _align(rows, left=0)


def _align(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Columns two spaces apart; the first `left` of them flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _widest(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def _last_metrics(validation: dict[str, Any], room: int) -> str:
    """As many `name value` as fit; a metric says more than the loss, so metrics come first."""
    names = [*(name for name in validation if name != "loss"), *(["loss"] if "loss" in validation else [])]
    text = ""
    for name in names:
        value = finite(validation[name])
        longer = f"{text}  {printable(str(name))} {format_number(value)}".strip()
        if value is None or len(longer) > room:
            continue
        text = longer
    return text or NOTHING


_USES = {"chat": ("chat", ""), "language": ("generate", " --prompt TEXT")}  # of a run, by its task; predict else


def closing(result: Mapping[str, Any], folder: Path, runs: str) -> str:
    """What a run came to, and the commands that use it.  runs: the folder of the runs, as it was asked for"""
    where = "" if runs == "runs" else f" --runs {runs}"
    use, more = _USES.get(result["task"], ("predict", " INPUT"))
    measured = ", ".join(f"{name} {value:.4g}" for name, value in result["validation"].items())
    lines = [
        f"{result['run']}: {format_count(result['steps'])} steps in {format_seconds(result['seconds'])}"
        + (f"; validation {measured}" if measured else ""),
        f"  {use:<9} fromzero {use} run:{result['run']}{more}{where}",
        f"  curves    fromzero runs {result['run']}{where}   or open {folder / 'page.html'}",
    ]
    return "\n".join(lines)
