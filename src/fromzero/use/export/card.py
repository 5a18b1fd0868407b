"""Card: a subject and what was compared in, a README.md as model hubs read it out. It says what the run noted, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fromzero.data.columns import Columns
from fromzero.sources.cache import write_whole
from fromzero.use.export.compare import Compared
from fromzero.use.export.onnx import described
from fromzero.use.export.subject import Subject

_LIBRARIES = {"hf": "transformers", "peft": "peft", "gguf": "gguf", "onnx": "onnx", "torch": "pytorch", "safetensors": "fromzero"}
_TASKS = {("language", ""): "text-generation", ("text", "classify"): "text-classification", ("image", "classify"): "image-classification"}
_TASKS |= {("table", "classify"): "tabular-classification", ("table", "regress"): "tabular-regression"}


def write_card(folder: Path, subject: Subject, to: str, opens: str, compared: Sequence[Compared]) -> None:
    noted = _noted(subject)
    recipe, result, data = noted.get("recipe", {}), noted.get("result", {}), noted.get("data", {})
    task = "" if subject.reads == "language" else recipe.get("task", "")
    front: dict[str, Any] = {"library_name": _LIBRARIES[to], "tags": ["fromzero"]}
    front |= {"pipeline_tag": _TASKS[subject.reads, task]} if (subject.reads, task) in _TASKS else {}
    front |= {"base_model": base} if (base := _hub_name(subject)) else {}
    parameters = sum(p.numel() for p in subject.model.parameters())
    title = result.get("run") or Path(subject.source).name
    lines = [f"# {title}", "", f"{subject.design.name}, {parameters:,} parameters, written by fromzero as {to}. Open it with {opens}.", ""]
    lines += ["## Compared before it was kept", "", f"On {subject.compared_on}.", "", *(f"- {one}" for one in compared), ""]
    if data:
        counts = f"{data['train']:,} examples to train, {data['validation']:,} to validate"
        lines += ["## Data", "", f"- {Path(str(data['source'])).name}: {counts}; digest {data['digest']}"]
        lines += [f"- classes: {', '.join(subject.classes)}"] if subject.classes else []
        lines += [f"- {note}" for note in data.get("notes", ())] + [""]
    if result:
        lines += [
            "## Training",
            "",
            f"{result['steps']:,} steps, {result['epochs']:g} epochs, {result['seconds']:.0f} seconds; {result['status']}.",
        ]
        lines += ["", "| measured on validation data | |", "|---|---|"] * bool(result["validation"])
        lines += [f"| {name} | {value:.6g} |" for name, value in result["validation"].items()] + [""]
    if recipe:
        lines += ["```yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(), "```", ""]
    form = None if subject.preparation is None else subject.preparation.inputs
    if to == "onnx" and isinstance(form, Columns):
        lines += ["## Columns", "", "```json", json.dumps(described(form), indent=1, ensure_ascii=False), "```", ""]
    lines += ["What is not said here, such as a licence, what it is meant for and what it does badly, is for its author to add."]
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(lines) + "\n"
    write_whole(folder / "README.md", text.encode())


def _noted(subject: Subject) -> dict[str, Any]:
    """recipe, data facts and result, as far as the model lies in the folder of its run"""
    if subject.start.saved is None:
        return {}
    run, found = subject.start.saved.folder.parent, {}
    for file in ("plan.json", "result.json"):
        try:
            found[file] = json.loads((run / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    plan = found.get("plan.json", {})
    return {"recipe": plan.get("recipe", {}), "data": plan.get("facts", {}).get("data", {}), "result": found.get("result.json", {})}


def _hub_name(subject: Subject) -> str:
    """The published model that this began with, where a hub has it under that name"""
    recipe = _noted(subject).get("recipe", {})
    model = recipe.get("model", "")
    source = model if isinstance(model, str) else str(model.get("from", ""))
    source = source if subject.start.saved is not None else subject.source
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else ""
