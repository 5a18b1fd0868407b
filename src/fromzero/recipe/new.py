"""New: a description of data in, the text of a first recipe out, each guess with its reason beside it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fromzero.errors import listed


class Description(Protocol):
    """What the data room saw (fromzero.data.describe)."""

    @property
    def source(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def task(self) -> str: ...
    @property
    def target(self) -> str | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def set_aside(self) -> dict[str, str]: ...
    @property
    def image(self) -> Any: ...
    @property
    def same_size(self) -> bool: ...
    @property
    def why(self) -> dict[str, str]: ...
    @property
    def latin(self) -> bool: ...


STEPS_WANTED = 600  # enough for a small table; a large one sees each row fewer times


def first_recipe(seen: Description, *, model: str | None = None) -> str:
    """The recipe as YAML that can be trained as it stands."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(seen.source).stem).strip("-.") or "first"
    batch = 32 if seen.rows < 2000 else 64
    if seen.kind == "corpus":
        return _language(seen, name, model)
    if seen.kind == "chat":
        return _chat(seen, name, model)
    images = seen.image is not None
    epochs = 10 if images else max(5, min(100, round(STEPS_WANTED * batch / max(seen.rows, 1))))
    chosen, because = _model(seen)
    lines = [
        f"# A first recipe for {seen.source}: {seen.rows} rows.",
        "# Look at it with `fromzero plan`, then `fromzero train`.",
        *_line("name", name, ""),
        *_line("task", seen.task, seen.why.get("task", "as asked")),
        *_line("model", model or chosen, "as asked" if model else because),
        *(["head: new  # the model brings none for these answers", "freeze: body"] if (model or chosen) == "minilm-l6" else []),
        "data:",
        *_line("  train", _quoted(seen.source), ""),
    ]
    share = 0.2 if seen.rows < 1000 else 0.1
    lines += _line(
        "  hold_out", share, "kept aside to measure on; few rows need a larger share" if share == 0.2 else "kept aside to measure on"
    )
    if seen.target is not None:
        lines += _comment(seen.why.get("data.target", ""))
        lines += _line("  target", _quoted(seen.target), "")
        lines += [
            "  # every other column that can be used" if seen.kind == "table" else "  # the column of text",
            "  input:",
            *(f"  - {_quoted(name)}" for name in seen.inputs),
        ]
        lines += [f"  # left out: {column} {why}" for column, why in seen.set_aside.items()]
    if seen.kind == "images" and not seen.same_size:
        lines.append(
            f"  input: {{size: [{seen.image.height}, {seen.image.width}], channels: {seen.image.channels}}}  # sizes differ; this is the middle one"
        )
    if seen.task == "regress":
        lines += _line("  scale_target", "standard", "learn in standard deviations; figures are in the data's own units")
    if seen.classes:
        lines += textwrap.wrap(
            f"{len(seen.classes)} classes: {listed(seen.classes, 12)}", 76, initial_indent="# ", subsequent_indent="#   "
        )
    lines += _line("optimizer", "{name: adamw, lr: 1e-3}", "the plan says if the loss rises with it")
    lines += _line("batch", batch, "samples per step")
    lines += _line("epochs", epochs, f"about {epochs * max(round(seen.rows * (1 - share) / batch), 1)} steps")
    return "\n".join(lines) + "\n"


def _model(seen: Description) -> tuple[str, str]:
    if seen.kind == "text" and seen.latin:
        return "minilm-l6", "a small English sentence encoder, fetched once (80 MB); freeze: none trains all of it"
    if seen.kind == "text":
        return "encoder-4m", "from zero: the small pretrained encoder at hand reads English only"
    if seen.image is not None:
        return "cnn", "small convolutions, for images"
    return "mlp", "two hidden layers of 64, enough for most tables"


def _language(seen: Description, name: str, model: str | None) -> str:
    """A corpus: a small decoder that learns to go on with it."""
    characters = seen.rows < 5_000_000
    steps = max(200, min(5000, seen.rows // 1000))
    lines = [
        f"# A first recipe for {seen.source}: {seen.rows} characters.",
        "# Look at it with `fromzero plan`, then `fromzero train`.",
        *_line("name", name, ""),
        *_line("task", "language", seen.why.get("task", "as asked")),
        *_line(
            "model",
            model or "{from: decoder, width: 192, layers: 4, heads: 6, context: 256}",
            "as asked" if model else "small enough for a laptop",
        ),
        "data:",
        *_line("  train", _quoted(seen.source), ""),
        *_line("  hold_out", 0.1, "the end of the text, to measure on"),
        *_line(
            "  tokenizer",
            "auto" if model else "characters" if characters else "bpe",
            "" if model else "few and small tokens for a short text" if characters else "learned from the text",
        ),
        *_line("optimizer", "{name: adamw, lr: 1e-3}", "the plan says if the loss rises with it"),
        *_line("schedule", "{name: cosine, warmup: 0.05}", ""),
        *_line("batch", 16, "pieces of text per step"),
        *_line("steps", steps, ""),
        *_line("evaluate", f"{{every: {max(50, steps // 10)}}}", ""),
    ]
    return "\n".join(lines) + "\n"


def _chat(seen: Description, name: str, model: str | None) -> str:
    """Conversations: a small published model with thin matrices beside its own."""
    epochs = 3 if seen.rows < 2000 else 1
    share = 0.2 if seen.rows < 100 else 0.1
    lines = [
        f"# A first recipe for {seen.source}: {seen.rows} conversations.",
        "# Look at it with `fromzero data` and `fromzero plan`, then `fromzero train`.",
        *_line("name", name, ""),
        *_line("task", "chat", seen.why.get("task", "as asked")),
        *_line(
            "model", model or "smollm2-135m-instruct", "as asked" if model else "small enough for a laptop, and it can converse already"
        ),
        *_line("adapter", "{name: lora, rank: 8, alpha: 16, targets: all-linear}", "the model itself stays as it is"),
        "data:",
        *_line("  train", _quoted(seen.source), ""),
        *_line("  hold_out", share, "kept aside to measure on, by distinct content"),
        *(f"  # not used: {column} {why}" for column, why in seen.set_aside.items()),
        *_line("optimizer", "{name: adamw, lr: 2e-4}", "an adapter starts at zero and bears ten times what the whole model does"),
        *_line("schedule", "{name: cosine, warmup: 0.05}", "ends with small steps, so that the last conversations do not outweigh"),
        *_line("batch", 8, "conversations per step"),
        *_line("epochs", epochs, f"about {epochs * max(round(seen.rows * (1 - share) / 8), 1)} steps; more would learn them by heart"),
    ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 76, initial_indent="  # ", subsequent_indent="  #   ")


def _line(key: str, value: Any, why: str) -> list[str]:
    return [f"{key}: {value}" + (f"  # {why}" if why else "")]


def _quoted(text: str) -> str:
    """Text that YAML reads back as the same text."""
    plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and text.lower() not in _WORDS
    return text if plain else "'" + text.replace("'", "''") + "'"


_WORDS: Mapping[str, None] = dict.fromkeys(["true", "false", "null", "none", "yes", "no", "on", "off", "all", "auto"])
