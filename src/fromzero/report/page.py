"""Page: a run's folder in, one self-contained page.html out: curves, evaluations, result, warnings, recipe.

No scripts, nothing loaded from elsewhere. Everything read from the folder is escaped. Knows nothing of training.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromzero.report.events import Event
from fromzero.report.jsonlines import EVENTS, read_events
from fromzero.report.summary import NOTHING, finite, format_count, format_number, format_seconds, history, metric_names

MOST_POINTS = 500  # of one curve
_WIDTH, _HEIGHT = 640, 260  # of a chart, in SVG units; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 14, 42  # margins for ticks and labels
_LOG_RATIO = 100.0  # a loss that falls further than this is drawn on a logarithmic axis
_MOST_DOTS = 60  # a curve with more points is a line only

Point = tuple[float, float]


@dataclass(frozen=True)
class _Curve:
    name: str
    points: list[Point]
    style: str = "a"


class Page:
    """An observer that writes the page when it is closed, if it heard anything: else the folder is another process's."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._heard = folder, False

    def __call__(self, event: Event) -> None:
        self._heard = True

    def close(self) -> None:
        """raises: OSError that names the page"""
        if self._heard:
            try:
                write_page(self._folder)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._folder / "page.html")) from error


def write_page(folder: Path | str) -> Path:
    """Write page.html from events.jsonl, and recipe.yaml where there is one; returns its path.

    raises: DataError if the events are missing or broken
    """
    folder = Path(folder)
    events = history(read_events(folder / EVENTS))
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    page = folder / "page.html"
    fresh = folder / "page.html.part"
    fresh.write_bytes(_page(folder.resolve().name, events, text).encode("utf-8", "replace"))
    os.replace(fresh, page)  # whoever has the page open never sees half of it
    return page


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points that keep the first, the last, and the lowest and highest of every slice between."""
    if len(points) <= most:
        return list(points)
    slices = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for i in range(slices):
        part = inner[len(inner) * i // slices : len(inner) * (i + 1) // slices]
        if part:
            kept.extend(sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}))
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) within low and high."""
    rough = (high - low) / count
    if not rough > 0 or math.isinf(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _page(folder_name: str, events: list[dict[str, Any]], recipe: str) -> str:
    last = {str(event.get("event")): event for event in events}
    name = str(last.get("Started", last.get("Planned", {})).get("run") or folder_name)
    ends = [event for event in events if event.get("event") in ("Started", "Finished")]
    finished = ends[-1] if ends and ends[-1].get("event") == "Finished" else {}
    evaluations = [event for event in events if event.get("event") == "Evaluated"]
    warnings = [event for event in events if event.get("event") == "Warned"]
    body = [
        f"<h1>{_escape(name)}</h1>",
        f"<p class=lead>{_lead(finished, last.get('Planned', {}))}</p>",
        _section("Warnings", _warnings(warnings)),
        _section("Curves", "".join(_charts(events, evaluations))),
        _section("Evaluations", _evaluations(evaluations)),
        _section("Result", _result(finished.get("result"))),
        _section("Recipe", f"<pre>{_escape(recipe)}</pre>" if recipe else ""),
    ]
    head, foot = _PAGE.split("{body}")
    return head.replace("{title}", _escape(name)) + "\n".join(part for part in body if part) + foot


def _lead(finished: dict[str, Any], planned: dict[str, Any]) -> str:
    said = [str(finished.get("status") or "not finished")]
    for event, key, unit in (
        (finished, "step", "steps"),
        (planned, "parameters", "parameters"),
        (planned, "trainable_parameters", "trained"),
    ):
        if (count := finite(event.get(key))) is not None:
            said.append(f"{format_count(count)} {unit}")
    if (seconds := finite(finished.get("seconds"))) is not None:
        said.append(format_seconds(seconds))
    return _escape(" · ".join(said))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _warnings(warnings: list[dict[str, Any]]) -> str:
    said = dict.fromkeys((str(event.get("what") or ""), str(event.get("mend") or "")) for event in warnings)
    items = (f"<li>{_escape(what)}" + (f" <em>{_escape(mend)}</em>" if mend else "") for what, mend in said)
    return f"<ul class=warn>{''.join(items)}</ul>" if said else ""


def _charts(events: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[str]:
    steps = [event for event in events if event.get("event") == "StepDone"]
    training, validation = _points(steps, "loss"), _points(evaluations, "loss")
    curves = [("loss", [_Curve("training", training), _Curve("validation", validation, "b")])]
    for name in metric_names(evaluations):
        flat = [{"step": event.get("step"), "value": (event.get("metrics") or {}).get(name)} for event in evaluations]
        curves.append((name, [_Curve(name, _points(flat, "value"), "b")]))
    curves.append(("learning rate", [_Curve("learning rate", _points(steps, "lr"))]))
    charts = [_chart(title, drawn) for title, lines in curves if (drawn := [line for line in lines if line.points])]
    judged = len(evaluations) if validation else 0  # without validation data every one is null
    if lost := len(steps) + judged - len(training) - len(validation):
        charts.append(f"<p>{format_count(lost)} losses were no finite numbers and are not drawn.</p>")
    return charts


def _points(events: list[dict[str, Any]], key: str) -> list[Point]:
    pairs = ((finite(event.get("step")), finite(event.get(key))) for event in events)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _chart(title: str, curves: list[_Curve]) -> str:
    """One SVG with axes, ticks, and a legend where there are two curves."""
    curves = [_Curve(curve.name, thin(curve.points), curve.style) for curve in curves]
    values = [value for curve in curves for _, value in curve.points]
    steps = [step for curve in curves for step, _ in curve.points]
    logarithmic = title == "loss" and min(values) > 0 and max(values) > _LOG_RATIO * min(values)
    heights = _Axis.over(values, _HEIGHT - _BOTTOM, _TOP, logarithmic=logarithmic)
    across = _Axis.over(steps, _LEFT, _WIDTH - _RIGHT)
    parts = [_grid(across, heights), f'<text class=label x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}">step</text>']
    label = _escape(title + (", logarithmic" if logarithmic else ""))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class=label transform="translate(13 {middle:.0f}) rotate(-90)">{label}</text>')
    for curve in curves:
        places = [(across.place(step), heights.place(value)) for step, value in curve.points]
        parts.append(f'<polyline class="{curve.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if len(places) <= _MOST_DOTS:
            parts.extend(f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_escape(title)} per step">{"".join(parts)}</svg>'
    names = "".join(f'<span class="{curve.style}">{_escape(curve.name)}</span>' for curve in curves)
    legend = f" <small>{names}</small>" if len(curves) > 1 else ""
    return f"<figure><figcaption>{_escape(title)}{legend}</figcaption>{picture}</figure>"


@dataclass(frozen=True)
class _Axis:
    """Numbers from low to high onto places from start to end."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, *, logarithmic: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if high / 2 - low / 2 <= 1e-9 * max(abs(low), abs(high)):  # one number but for rounding: give it some room
            room = abs(low) * 0.1 or 1.0
            low, high = low - room, high + room
        return _Axis(low, high, start, end, logarithmic)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        # Halved, so that the difference of two huge numbers stays finite.
        return self.start + (value / 2 - low / 2) / (high / 2 - low / 2) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high)
        powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        if len(powers) > 3:
            return [10.0**power for power in powers[:: math.ceil(len(powers) / 8)]]
        between = (factor * 10.0**power for power in range(powers.start - 1, powers.stop) for factor in (1, 2, 5))
        return [value for value in between if self.low <= value <= self.high]


def _grid(across: _Axis, heights: _Axis) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in heights.ticks():
        y = heights.place(value)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class=y x="{_LEFT - 7}" y="{y + 4:.1f}">{value:.6g}</text>')
    for value in across.ticks():
        if value != round(value):
            continue
        x = across.place(value)
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
        parts.append(f'<text class=x x="{x:.1f}" y="{bottom + 18}">{format_count(value)}</text>')
    return f"<g>{''.join(parts)}</g>"


def _evaluations(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return ""
    names = metric_names(evaluations)
    head = "".join(f"<th>{_escape(title)}</th>" for title in ("step", "epoch", "training loss", "validation loss", *names, ""))
    rows = []
    for event in evaluations:
        metrics = event.get("metrics") or {}
        counts = [finite(event.get("step")), finite(event.get("epoch"))]
        numbers = [event.get("train_loss"), event.get("loss"), *(metrics.get(name) for name in names)]
        cells = [NOTHING if count is None else format_count(count) for count in counts]
        cells += [format_number(finite(number)) for number in numbers]
        cells.append("best" if event.get("best") else "")
        rows.append("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _result(result: object) -> str:
    if not isinstance(result, dict):
        return ""
    rows = (f"<tr><th>{_escape(key)}</th><td>{_escape(value)}</td></tr>" for key, value in _flat(result))
    return f"<div class=wide><table class=pairs>{''.join(rows)}</table></div>" if result else ""


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs.extend(_flat(value, f"{before}{key}."))
        elif isinstance(value, float):
            pairs.append((f"{before}{key}", format_number(value)))
        else:
            pairs.append((f"{before}{key}", f"{value:,}" if type(value) is int else NOTHING if value is None else str(value)))
    return pairs


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root { --page: #fff; --ink: #1d2329; --soft: #5c6670; --rule: #e1e5e9; --a: #2f6fb5; --b: #c2500a; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e4e8ec; --soft: #98a3ad; --rule: #2c333a; --a: #6eaef0; --b: #f29a55; --warn: #e6b450 } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 720px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.lead, small { color: var(--soft) } .lead { margin-top: .2rem } .warn { color: var(--warn) }
figure { margin: 0 0 1.2rem } figcaption { font-weight: 600 } small { font-weight: 400 }
small span::before { content: ""; display: inline-block; width: 1.1em; height: 3px; margin: 0 .4em 0 .9em; vertical-align: middle }
small .a::before { background: var(--a) } small .b::before { background: var(--b) }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums }
svg .x, svg .label { text-anchor: middle } svg .y { text-anchor: end } svg line { stroke: var(--rule) }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round } polyline.a { stroke: var(--a); stroke-width: 1.2; opacity: .8 } polyline.b { stroke: var(--b) }
circle.a { fill: var(--a) } circle.b { fill: var(--b) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { color: var(--soft); font-weight: 500 } .pairs th { text-align: left }
pre { border: 1px solid var(--rule); border-radius: 6px; padding: .8rem; overflow-x: auto; font-size: 13px }
</style></head><body>
{body}
</body></html>
"""
