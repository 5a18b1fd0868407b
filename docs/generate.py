"""Pages from code: the recipe's schema and the shell's commands in, docs/recipe.md and docs/commands.md out.

A test compares both pages with what this gives; `make docs` writes them anew.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from fromzero.cli import app
from fromzero.data.catalogue import NAMED_SETS
from fromzero.models import FAMILIES, MODELS, TEXT_MODELS
from fromzero.recipe.read import from_values, known_keys
from fromzero.recipe.schema import METRICS, Recipe
from fromzero.weights import SHORT_NAMES

HERE = Path(__file__).resolve().parent

# What a key does when it is left out, where None in the code does not say it.
LEFT_OUT = {
    "name": "the recipe file's name",
    "head.layer": "found",
    "data.input": "found",
    "data.target": "found",
    "data.classes": "all",
    "loss": "auto",
    "metrics": "auto",
    "epochs": "10",
    "steps": "not used",
    "tokens": "not used",
    "adapter": "none",
    "data.too_long": "refused",
    "head": "keep",
    "freeze": "none",
    "optimizer": "adamw",
    "schedule": "constant",
    "evaluate": "epoch",
    "save": "auto",
    "not_finite": "stop",
    "limits": "nothing limited",
}

# Short forms, each read by the product itself when the page is made.
SHORT = [
    "model: cnn",
    "model: {from: mlp, hidden: [128, 64]}",
    "head: new",
    "freeze: body",
    "freeze: {through: conv2}",
    "freeze: ['conv1.*', fc1.bias]",
    "adapter: lora",
    "adapter: {rank: 16, targets: [q_proj], layers: last-4}",
    "data: penguins.csv",
    "data: {train: penguins.csv, input: year}",
    "data: {train: photos, input: {size: 64}}",
    "data: {train: penguins.csv, limit: 500}",
    "data: {train: photos, limit: {per_class: 10}}",
    "data: {train: photos, augment: light}",
    "loss: huber",
    "loss: my_loss.py:weighted",
    "optimizer: sgd",
    "optimizer: {lr: 1e-4}",
    "schedule: cosine",
    "batch: {tokens: 8192}",
    "evaluate: 100",
    "save: epoch",
    "not_finite: {skip: 3}",
    "limits: {memory: 2GB}",
]


def recipe_page() -> str:
    schema = Recipe.model_json_schema(by_alias=True)
    rows = list(_rows(schema, schema["$defs"], ()))
    listed = {path for path, _, _, _ in rows}
    if listed != set(known_keys()):
        raise AssertionError(f"the page and the recipe disagree on {sorted(map('.'.join, listed ^ set(known_keys())))}")
    top = [row for row in rows if len(row[0]) == 1]
    text = [
        "# The keys of a recipe",
        "",
        "Made from the code by `make docs`; change `src/fromzero/recipe/schema.py`, not this page.",
        "",
        "A recipe is a YAML file of a page or less. It says what to train, completely, and nothing about how. Three keys are",
        "required: `task`, `model`, `data`. A key that is not on this page is refused, with the nearest one that is. YAML is read",
        "by the 1.2 core rules: `1e-4` is a number, `no` and `on` are words. On the command line every key can be set over the",
        "file with `dotted.key=value`, such as `optimizer.lr=1e-4` or `data.limit=500`. A *section* is the keys listed further",
        "down, or one of the short forms at the end.",
        "",
        "## The first level",
        "",
        *_table(top),
        "",
        "Metrics: " + "; ".join(f"{task}: {', '.join(f'`{name}`' for name in names)}" for task, names in METRICS.items()) + ".",
    ]
    for path in (row[0] for row in top):
        inner = [row for row in rows if len(row[0]) > 1 and row[0][:1] == path]
        if inner:
            text += ["", f"## `{path[0]}`", "", *_table(inner)]
    text += ["", "## Short forms", "", "| written | means |", "|---|---|"]
    text += [f"| `{short}` | `{_lengthened(short)}` |" for short in SHORT]
    text += [
        "",
        "## Models of the catalogue",
        "",
        "Inputs and outputs are sized from the data; what is left are options, written beside `from`.",
        "",
    ]
    text += ["| name | what it is | options |", "|---|---|---|"]
    text += [f"| `{name}` | {_what(model)} | {_options(model)} |" for name, model in (MODELS | TEXT_MODELS).items()]
    text += ["", "## Families that are read from and written to others' folders", ""]
    text += ["By the `model_type` of their config.json: " + ", ".join(f"`{name}`" for name in FAMILIES) + ".", ""]
    text += ["## Weights with a short name", "", "| name | what it is |", "|---|---|"]
    text += [f"| `{name}` | {known.origin} |" for name, known in SHORT_NAMES.items()]
    text += ["", "## Named sets", "", "| name | what it is |", "|---|---|"]
    text += [f"| `{name}` | {known.origin} |" for name, known in NAMED_SETS.items()]
    return "\n".join(text) + "\n"


def _what(model: Any) -> str:
    return (inspect.getdoc(getattr(model, "func", model)) or "").splitlines()[0]


def _options(model: Any) -> str:
    parameters = inspect.signature(model).parameters.values()
    sized = ("inputs", "outputs", "vocabulary", "per", "cell")
    return ", ".join(f"`{p.name}: {_flow(_listed(p.default))}`" for p in parameters if p.name not in sized)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Row = tuple[tuple[str, ...], str, str, str]  # path, meaning, values, default


def _rows(section: Mapping[str, Any], defs: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Row]:
    """Every key below a section, each once; keys that several choices share are told apart by the choice's name."""
    required = section.get("required", [])
    for name, said in section["properties"].items():
        full = (*path, name)
        default = "required" if name in required else _default(".".join(full), said.get("default"))
        meaning = known_keys().get(full, "") or "which one"
        sections = [defs[ref] for ref in _refs(said)]
        yield full, meaning, _values(said, defs), default
        if len(sections) > 1:  # optimizer, loss: one of several, told by name
            yield from _merged(sections, defs, full)
        else:
            for inner in sections:
                yield from _rows(inner, defs, full)


def _merged(sections: list[Any], defs: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Row]:
    found: dict[tuple[str, ...], list[tuple[str, Row]]] = {}
    for section in sections:
        for row in _rows(section, defs, path):
            found.setdefault(row[0], []).append((section["properties"]["name"]["const"], row))
    for full, rows in found.items():
        _, (_, meaning, values, default) = rows[0]
        if full[-1] == "name":
            yield full, meaning, " \\| ".join(name for name, _ in rows), "auto" if path == ("loss",) else "adamw"
            continue
        if len(rows) < len(sections):
            meaning = f"{', '.join(name for name, _ in rows)}: {meaning}"
        defaults = dict.fromkeys(row[3] for _, row in rows)
        if len(defaults) > 1:
            default = "; ".join(f"{d} ({', '.join(name for name, row in rows if row[3] == d)})" for d in defaults)
        yield full, meaning, values, default


def _refs(said: Any) -> list[str]:
    """The sections that a value may be, in order; lists of sections do not exist."""
    choices = [said, *said.get("anyOf", []), *said.get("oneOf", [])]
    choices += [inner for choice in choices[1:] for inner in choice.get("oneOf", [])]
    return list(dict.fromkeys(c["$ref"].rpartition("/")[2] for c in choices if "$ref" in c))


_BOUNDS = {"minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}", "exclusiveMaximum": "below {}"}


def _values(said: Any, defs: Mapping[str, Any]) -> str:
    if "anyOf" in said or "oneOf" in said:
        parts = [_values(choice, defs) for choice in said.get("anyOf", said.get("oneOf")) if choice.get("type") != "null"]
        return " \\| ".join(dict.fromkeys(part for part in parts if part))
    if "$ref" in said:
        return "section"
    if "const" in said:
        return str(said["const"])
    if "enum" in said:
        return " \\| ".join(map(str, said["enum"]))
    kind = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true \\| false",
        "string": "text",
        "array": "list",
        "object": "name → value",
    }.get(said.get("type"), "text")
    return ", ".join([kind, *(words.format(f"{said[key]:,}") for key, words in _BOUNDS.items() if key in said and said[key] < 2**53)])


def _default(key: str, value: Any) -> str:
    if key in LEFT_OUT:
        return LEFT_OUT[key]
    if isinstance(value, dict):
        return ""
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value)).replace('"', "") if value else "none"
    return (
        "none"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _table(rows: list[Row]) -> list[str]:
    lines = ["| key | meaning | values | default |", "|---|---|---|---|"]
    return lines + [
        f"| `{'.'.join(path)}` | {meaning.replace('|', chr(92) + '|')} | {values} | {default} |" for path, meaning, values, default in rows
    ]


def _lengthened(short: str) -> str:
    """The long form that the product itself makes of a short one."""
    given = yaml.safe_load(short.replace("1e-4", "1.0e-4"))
    key = next(iter(given))
    task = {"task": "regress"} if short == "loss: huber" else {"task": "classify"}
    recipe = from_values({"model": "mlp", "data": "x.csv", **task, **_tuples(given)})
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)[key]
    return f"{key}: {_flow(values)}"


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return (
        "none"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else _number(value)
        if isinstance(value, float)
        else str(value)
    )


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "") if value >= 1e6 and value.is_integer() else f"{value:g}"


def commands_page() -> str:
    group = typer.main.get_command(app)
    text = [
        "# The commands",
        "",
        "Made from the code by `make docs`; change `src/fromzero/cli.py`, not this page.",
        "",
        str(group.help),
        "",
        str(group.epilog),
        "",
        "With `--json` a command prints exactly one JSON value on standard output, and everything else on standard error.",
        "An override is `dotted.key=value`, the value written as in a recipe.",
    ]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["fromzero", name, *(_metavar(p) for p in arguments), "[OPTIONS]"])
        text += ["", f"## {name}", "", str(command.help), "", "```text", usage, "```", ""]
        text += ["| | meaning | default |", "|---|---|---|"]
        text += [f"| `{_metavar(p)}` | {p.help or ''} | {_left_out(p)} |" for p in arguments]
        text += [f"| `{_option(p)}` | {p.help or ''} | {_left_out(p)} |" for p in options]
    return "\n".join(text) + "\n"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(parameter: Any) -> str:
    takes = (
        "" if isinstance(parameter.default, bool) else f" {parameter.metavar or ('N' if isinstance(parameter.default, int) else 'TEXT')}"
    )
    return "/".join(parameter.opts) + takes


def _left_out(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default is None or isinstance(parameter.default, bool) else str(parameter.default)


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page}


def main() -> None:
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
