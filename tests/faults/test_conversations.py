"""Faults 21 and 22: conversations of malformed lines, renamed keys, drifting types and mixed shapes. Every bad row in one pass."""

import json
from pathlib import Path

import pytest

from fromzero.data.conversations import read_conversations
from fromzero.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHARED = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
PAIR = {"prompt": "a", "completion": "b"}


def refused(path, *said, count=None):
    with pytest.raises(DataError) as caught:
        read_conversations(path if isinstance(path, list) else str(path), None, (Path(),))
    for piece in said:
        assert piece in str(caught.value)
    assert count is None or len(caught.value.faults) == count
    return caught.value


@pytest.fixture
def lines(tmp_path):
    def write(*rows):
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return path

    return write


def messages(*turns):
    return {"messages": [turn if not isinstance(turn, tuple) else {"role": turn[0], "content": turn[1]} for turn in turns]}


BAD = [
    ({"mesages": GOOD["messages"]}, "messages: has no 'messages'; other rows are messages (role, content); did you mean 'mesages'?"),
    ({"messages": "a"}, "messages: is str 'a', not a list of messages"),
    ({"messages": None}, "messages: is null, not a list of messages"),
    (messages("a", ("assistant", "b")), "messages[0]: is str 'a', not an object {role, content}"),
    (messages({"rol": "user", "content": "a"}, ("assistant", "b")), "messages[0]: has no 'role'; did you mean 'rol'?"),
    (messages(("user", "a"), {"role": "assistant", "contents": "b"}), "messages[1]: has no 'content'; did you mean 'contents'?"),
    (messages(("user", "a"), ("asistant", "b")), "messages[1]: has the unknown role 'asistant'; known: user"),
    (messages(("user", "a"), ("asistant", "b")), "did you mean 'assistant'?"),
    (messages((3, "a"), ("assistant", "b")), "messages[0].role: is int 3, not text"),
    (messages(("user", "a"), ("assistant", 4.5)), "messages[1].content: is float 4.5, not text"),
    (messages(("user", "a"), ("assistant", None)), "messages[1].content: is null, not text"),
    (
        messages(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b")),
        "messages[0].content: has a part of type 'image_url'; only text",
    ),
    (messages(("user", [{"type": "text", "text": 1}]), ("assistant", "b")), "messages[0].content: has a part of type 'text'"),
    (messages(("user", "a")), "has no turn of the assistant; there is nothing to learn"),
    (messages(), "has no turn of the assistant"),
    (messages(("system", "s"), ("assistant", "b"), ("user", "a")), "begins with the assistant; no question"),
    (messages(("user", "a"), {"role": "assistant", "tool_calls": [{"x": 1}]}), "messages[1].tool_calls: is no call {name, arguments}"),
    (
        messages(("user", "a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}),
        "messages[1].tool_calls.arguments: is not JSON",
    ),
    ({**GOOD, "tools": "[1]"}, "tools: is list [1], not a list of objects"),
    ({**GOOD, "tools": "add"}, "tools: is not JSON"),
    (SHARED, "messages: has no 'messages'; it is of the shape conversations (from, value), other rows are messages (role, content)"),
    (ALPACA, "it is of the shape instruction/output"),
    (PAIR, "it is of the shape prompt/completion"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it is of the shape chosen/rejected"),
    ('{"messages": [', "column 15 is not JSON"),
    ("[1]", "is list, not an object"),
    ('{"messages": 1, "messages": 2}', "names 'messages' twice"),
    ('{"messages": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
    ('{"messages": ' + "[" * 100_000 + "}", "is nested more than 64 deep"),
    ('{"messages": "\\ud800"}', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_17_is_named_with_its_key_and_so_is_the_next_one(lines, row, said):
    error = refused(lines(*[GOOD] * 16, row, GOOD, row), said, count=2)
    assert [fault.line for fault in error.faults] == [17, 19]


def test_faults_of_both_kinds_come_in_one_pass_in_the_order_of_the_lines(lines):
    error = refused(lines(GOOD, GOOD, SHARED, GOOD, '{"messages": [', messages(("user", "a")), GOOD, "null"), count=4)
    assert [fault.line for fault in error.faults] == [3, 5, 6, 8]


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (
            ALPACA,
            {"instruction": "a", "input": "", "outptu": "b"},
            "output: has no 'output'; other rows are instruction/output; did you mean 'outptu'?",
        ),
        (ALPACA, {**ALPACA, "output": 3}, "output: is int 3, not text"),
        (ALPACA, {**ALPACA, "input": 3}, "input: is int 3, not text"),
        (SHARED, GOOD, "it is of the shape messages (role, content)"),
        (
            {"instruction": "a", "instances": [{"output": "b"}]},
            {"instruction": "a", "instances": [{"outputs": "b"}]},
            "output: has no 'output'",
        ),
        ({"instruction": "a", "instances": [{"output": "b"}]}, {"instruction": "a", "instances": []}, "instances: is no list of objects"),
    ],
)
def test_other_shapes_name_their_bad_rows_too(good, bad, said):
    rows = [dict(good) for _ in range(5)]
    refused([*rows, bad], "conversations given from Python:6", said, count=1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "holds preferences, not conversations; shapes understood: messages (role, content), conversations",
        ),
        ({"text": "a", "id": 1}, "is plain text, no conversation; shapes understood"),
        ({"text": "a"}, "task: language"),
        ({"qestion": "a", "answr": "b"}, "is in no known shape: its columns are qestion, answr; shapes understood: messages"),
        ({"qestion": "a", "answr": "b"}, "'qestion': did you mean 'question'?"),
        ({"x": "a", "y": "b"}, "data.mapping: {user: COLUMN, assistant: COLUMN}"),
    ],
)
def test_a_file_of_no_known_shape_is_told_what_is_understood(row, said):
    refused([row] * 3, said)


@pytest.mark.parametrize(
    ("source", "said"),
    [([], "the list is empty"), ([GOOD, 3], "Python:2: is int, not a dict")],
)
def test_rows_from_python_are_looked_at_too(source, said):
    refused(source, said)
    with pytest.raises(DataError, match="dict is no list of conversations"):
        read_conversations(GOOD, None, (Path(),))


def test_one_object_alone_is_told_to_become_a_list(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(GOOD))
    refused(tmp_path / "t.json", "t.json: is no list of objects; put [ ] around it")
    (tmp_path / "t.json").write_text("[]")
    refused(tmp_path / "t.json", "t.json: has no rows")
