"""Reading: YAML text and overrides in, a Recipe out, or every fault at once with its file and line.

YAML is read by the 1.2 core rules: `1e-4` is a number, `no` and `on` are words. Knows no torch and no data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fromzero.errors import Fault, RecipeError, nearest
from fromzero.recipe.schema import Given, Recipe

MOST_BYTES = 256 * 1024  # a recipe is a page; this keeps a hostile one from costing time
MOST_DEPTH = 20
MOST_NODES = 10_000  # after aliases are expanded

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}

_TAGS = frozenset(["map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value"])

KeyPath = tuple[Any, ...]


@dataclass
class Written:
    """A recipe as it was written: plain values, and where each key stands (file, line)."""

    values: dict[str, Any]
    places: dict[KeyPath, tuple[str, int]] = field(default_factory=dict)

    def place(self, path: KeyPath) -> tuple[str, int]:
        """File and line of a key, or of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, ("", 0))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    overrides:  `dotted.key=value`, the value as YAML
    raises:     RecipeError with every fault found
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError("is a folder, not a recipe", file=str(path), mend="name the .yaml file") from None
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        mend = f"did you mean {path.parent / close[0]}?" if close else "fromzero new DATA > recipe.yaml writes a first one"
        raise RecipeError("no such recipe", file=str(path), mend=mend) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", file=str(path)) from None
    written = parse(data, str(path))
    override(written, overrides)
    if "name" not in written.values and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", path.stem):
        written.values["name"] = path.stem
    return check(written)


def from_values(values: Mapping[str, Any]) -> Recipe:
    """A Recipe from Python values; faults name the key, and no file."""
    plain = _plain(values)
    data = plain.get("data")
    if isinstance(data, dict) and "train" in data:
        plain["data"] = {key: _held(value) if key in ("train", "validation") else value for key, value in data.items()}
    elif data is not None:
        plain["data"] = _held(data)
    return check(Written(plain))


def _held(source: Any) -> Any:
    """Text names a source; everything else that Python hands over is the data itself."""
    return source if source is None or isinstance(source, (str, Given)) else Given(source)


def given_again(values: Mapping[str, Any], model: Any = None, data: Any = None) -> dict[str, Any]:
    """The values of a recipe with a model and data from Python in their places; None leaves what stands there."""
    found = dict(values)
    for key, inner, value in (("model", "from", model), ("data", "train", data)):
        if value is not None:
            section = found.get(key)
            found[key] = {**(section if isinstance(section, Mapping) else {}), inner: Given(value)}
    return found


def parse(data: bytes, file: str) -> Written:
    """YAML bytes → values and places, refusing what makes YAML surprising or costly."""
    if len(data) > MOST_BYTES:
        raise RecipeError(f"is larger than {MOST_BYTES // 1024} kB", file=file, mend="a recipe is a page of keys; is this the data?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError("is not UTF-8 text", file=file, line=line, mend="save it as UTF-8") from None
    try:
        _refuse_depth(text, file)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 0
        what = f"is not YAML: {': '.join(said for said in (error.context, error.problem) if said)}"
        raise RecipeError(what, file=file, line=line, mend="check the indentation and the quotes there") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {error}", file=file) from None
    if root is None:
        raise RecipeError("is empty", file=file, mend="it needs at least task, model and data")
    builder = _Builder(file)
    values = builder.build(root, ())
    if not isinstance(values, dict):
        mend = (
            f"this looks like data: fromzero new {file} > recipe.yaml"
            if Path(file).suffix not in (".yaml", ".yml")
            else "write key: value lines"
        )
        builder.faults.append(Fault("is no recipe", "a recipe is lines of key: value", mend, file, 1))
    if builder.faults:
        raise RecipeError(builder.faults)
    return Written(values, builder.places)


def _line_of(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 0


def _refuse_depth(text: str, file: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > MOST_DEPTH:
                raise RecipeError(f"is nested more than {MOST_DEPTH} deep", file=file, line=_line_of(event))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1


class _Builder:
    """Turns YAML nodes into plain values, keeping each key's line and every fault."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[KeyPath, tuple[str, int]] = {}
        self.faults: list[Fault] = []
        self.nodes = 0

    def fault(self, node: yaml.Node, path: KeyPath, what: str, mend: str = "") -> None:
        key = ".".join(map(str, path))
        self.faults.append(Fault(what, mend=mend, file=self.file, line=node.start_mark.line + 1, key=key))

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES or len(path) > MOST_DEPTH:
            raise RecipeError(
                "grows too large when its aliases are expanded", file=self.file, line=node.start_mark.line + 1, mend="write the values out"
            )
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
            self.fault(node, path, f"has the tag {node.tag!r}", "a recipe holds plain values; remove the tag")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"', "|", ">")
        return node.value if quoted else self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key == "<<":
                self.fault(key_node, path, "a key here is not a word", "write key: value")
                continue
            line = key_node.start_mark.line + 1
            if key in values:
                self.fault(key_node, (*path, key), f"stands twice (first in line {lines[key]})", "keep one of them")
            self.places[(*path, key)] = (self.file, line)
            lines[key] = line
            values[key] = self.build(value_node, (*path, key))
        return values

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text = str(node.value)
        if text in ("", "~", "null", "Null", "NULL"):
            self.fault(node, path, "has no value", "write one, or none, or leave the key out")
            return None
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text.lower() == "true"
        if len(text) <= 100:
            if _INTEGER.fullmatch(text):
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if _FLOAT.fullmatch(text):
                return float(text)
        return _SPECIAL.get(text.lower(), text)


def override(written: Written, overrides: Sequence[str]) -> None:
    """Lay `dotted.key=value` over what was written; the values are YAML too."""
    faults: list[Fault] = []
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].count(".")):  # a section before what lies in it
        dotted, equals, value = text.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            faults.append(Fault(f"'{text}' is not an override", mend="write key=value, such as optimizer.lr=1e-4", file="command line"))
            continue
        try:
            parsed = parse(f"x: {value}".encode("utf-8", "surrogateescape"), "command line")
        except RecipeError as error:
            faults.extend(Fault(f.what, f.why, f.mend, "command line", 0, dotted) for f in error.faults)
            continue
        section = written.values
        for depth, key in enumerate(keys[:-1]):
            inner = section.get(key)
            if not isinstance(inner, dict):
                inner = _lengthened(tuple(keys[: depth + 1]), inner)
                section[key] = inner
            section = inner
        for rival in _RIVALS.get(dotted, ()):
            written.values.pop(rival, None)
        section[keys[-1]] = parsed.values["x"]
        for depth in range(1, len(keys) + 1):
            written.places[tuple(keys[:depth])] = ("command line", 0)
    if faults:
        raise RecipeError(faults)


_RIVALS = {
    "steps": ("epochs", "tokens"),
    "epochs": ("steps", "tokens"),
    "tokens": ("epochs", "steps"),
}  # naming one on the command line takes the other back
_SHORT_FOR = {
    "model": "from",
    "data": "train",
    "optimizer": "name",
    "schedule": "name",
    "loss": "name",
    "evaluate": "every",
    "save": "every",
    "adapter": "name",
}


def _lengthened(path: KeyPath, short: Any) -> dict[str, Any]:
    """`optimizer: sgd` with the override `optimizer.lr=…` becomes {name: sgd, lr: …}."""
    long_key = _SHORT_FOR.get(path[0]) if len(path) == 1 else None
    return {long_key: short} if short is not None and long_key else {}


def check(written: Written) -> Recipe:
    """Values → Recipe, or RecipeError with every fault and its place."""
    try:
        return Recipe.model_validate(_tuples(written.values))
    except ValidationError as error:
        raise RecipeError(list(_faults(error, written))) from None


def _faults(error: ValidationError, written: Written) -> Iterator[Fault]:
    seen: set[KeyPath] = set()
    for item in error.errors():
        path, value = _real_path(item["loc"], written.values)
        missing = item["type"] in ("missing", "union_tag_not_found")
        full: KeyPath = (*path, item["loc"][-1]) if missing and item["loc"] else path
        if full in seen:  # a union says one thing per member; one fault per key is enough
            continue
        seen.add(full)
        file, line = written.place(full)
        what, why, mend = _worded(item, full, value)
        key = ".".join(map(str, full))
        yield Fault(what, why, mend, file or written.place(())[0] or _any_file(written), line, key)


def _any_file(written: Written) -> str:
    return next((file for file, _ in written.places.values() if file != "command line"), "")


def _worded(item: Any, path: KeyPath, value: Any) -> tuple[str, str, str]:
    """A validation error as what, why, mend in this project's words."""
    kind = item["type"]
    meaning = describe(path)
    if kind == "missing":
        return "is missing", f"it says: {meaning}" if meaning else "", "add it"
    if kind == "extra_forbidden":
        return "is no key of a recipe here", "", _where_it_belongs(path)
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = f"'{shown[:60]}'" if isinstance(value, str) else str(shown)[:60]
    if kind == "value_error":
        said = str(item["ctx"]["error"])
        return (f"{shown} {said}" if said.startswith("is ") and path else said), "", ""
    if kind == "union_tag_invalid":
        expected = [name.strip("'") for name in item["ctx"]["expected_tags"].split(", ")]
        close = nearest(str(item["ctx"]["tag"]), expected)
        mend = f"did you mean '{close[0]}'?" if close else ""
        return f"'{item['ctx']['tag']}' is none of {', '.join(expected)}", "", mend
    if kind == "literal_error":
        words = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        close = nearest(str(value), words) if isinstance(value, str) else []
        mend = f"did you mean '{close[0]}'?" if close else ""
        return f"{shown} is not {item['ctx']['expected']}", f"it says: {meaning}" if meaning else "", mend
    bounds = {
        "greater_than": "above {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}",
        "less_than_equal": "at most {le}",
    }
    if kind in bounds:
        return f"{shown} is not {bounds[kind].format(**item['ctx'])}", f"it says: {meaning}" if meaning else "", ""
    return f"{shown} does not fit", f"it says: {meaning}" if meaning else item["msg"], ""


def _real_path(loc: Sequence[Any], values: Any) -> tuple[KeyPath, Any]:
    """The part of pydantic's location that the user wrote, and the value there."""
    path: list[Any] = []
    for part in loc:
        if (isinstance(values, Mapping) and part in values) or (
            isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        ):
            values = values[part]
        else:
            continue
        path.append(part)
    return tuple(path), values


def _where_it_belongs(path: KeyPath) -> str:
    """The nearest key, in this section first, then in any."""
    key = str(path[-1])
    here = [p[-1] for p in known_keys() if p[:-1] == path[:-1]]
    close = nearest(key, here)
    if close:
        return f"did you mean '{'.'.join(map(str, (*path[:-1], close[0])))}'?"
    elsewhere = {p[-1]: p for p in known_keys()}
    close = nearest(key, elsewhere)
    if close:
        return f"did you mean '{'.'.join(elsewhere[close[0]])}'?"
    return f"the keys here are {', '.join(here)}" if here else "remove it"


def known_keys() -> dict[tuple[str, ...], str]:
    """Every key of a recipe as a path → its meaning."""
    keys: dict[tuple[str, ...], str] = {}
    _collect(Recipe, (), keys)
    return keys


def _collect(section: type[BaseModel], path: tuple[str, ...], keys: dict[tuple[str, ...], str]) -> None:
    for name, info in section.model_fields.items():
        full = (*path, info.alias or name)
        keys.setdefault(full, info.description or "")
        for inner in _sections_in(info.annotation):
            _collect(inner, full, keys)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_in(argument)


def describe(path: KeyPath) -> str:
    """What a key means, in one line; an empty string for an unknown one."""
    return known_keys().get(tuple(str(p) for p in path if not isinstance(p, int)), "")


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Python arguments → the values a file would hold."""
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_unset=False)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def write(recipe: Recipe) -> str:
    """A Recipe as YAML that reads back to the same Recipe (what was given from Python is only named)."""
    values = _for_yaml(recipe.model_dump(by_alias=True, exclude_unset=True))
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None))


def _for_yaml(value: Any) -> Any:
    if isinstance(value, Given):
        return str(value)
    if isinstance(value, dict):
        return {key: _for_yaml(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_yaml(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(_FLOAT, value):
        return _Quoted(value)
    return "none" if value is None else value


class _Quoted(str):
    """Text that looks like a number, kept as text by quotes."""


yaml.SafeDumper.add_representer(_Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="'"))
