"""Conversations: the shapes in which they are found become the same messages, and no text is changed on the way."""

import json
from pathlib import Path

import pytest

from fromzero.data.conversations import holds_conversations, read_conversations
from fromzero.data.describe import describe
from fromzero.errors import DataError
from fromzero.recipe.new import first_recipe

HERE = (Path(),)
USER, ANSWER = " What is it?\n\u2028", "A “test”.\r\n\t 🙂"
ASKED = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
SYSTEM = {"role": "system", "content": "Be short."}
SEEDS = Path(__file__).resolve().parents[2] / "../shared/data/self_instruct_seed_tasks.jsonl"


def read(rows, mapping=None):
    return read_conversations(rows, mapping, HERE)


def messages(row, mapping=None):
    (one,) = read([row], mapping).items
    return list(one.messages)


SHAPES = {
    "messages (role, content)": [
        {"messages": ASKED},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": USER[:5]}, {"type": "text", "text": USER[5:]}]}, ASKED[1]]},
    ],
    "conversations (from, value)": [
        {"conversations": [{"from": "human", "value": USER}, {"from": name, "value": ANSWER}]}
        for name in ("gpt", "chatgpt", "bard", "Assistant")
    ],
    "conversations (role, content)": [{"conversations": ASKED}],
    "instruction/instances": [{"instruction": USER, "instances": [{"input": "", "output": ANSWER}], "id": 3}],
    "instruction/output": [{"instruction": USER, "input": "", "output": ANSWER}, {"instruction": USER, "input": None, "output": ANSWER}],
    "instruction/response": [{"instruction": USER, "context": "", "response": ANSWER}],
    "prompt/completion": [{"prompt": USER, "completion": ANSWER}],
    "prompt/response": [{"prompt": USER, "response": ANSWER}],
    "question/answer": [{"question": USER, "answer": ANSWER}],
    "query/response": [{"query": USER, "response": ANSWER}],
    "user/assistant": [{"user": USER, "assistant": ANSWER}],
    "input/output": [{"input": USER, "output": ANSWER}],
}


@pytest.mark.parametrize(("shape", "row"), [(shape, row) for shape, rows in SHAPES.items() for row in rows])
def test_every_shape_becomes_the_same_messages_letter_for_letter(shape, row):
    found = read([row])
    assert found.shape == shape
    assert [list(one.messages) for one in found.items] == [ASKED]
    with_system = {**row, "system": "Be short."}
    assert messages(with_system) == [SYSTEM, *ASKED]


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"])
def test_every_kind_of_file_gives_the_same_with_its_line(tmp_path, ending):
    import csv

    import polars

    flat = ending in (".csv", ".tsv")
    rows = [
        {"question": f"{USER}{i}", "answer": ANSWER} if flat else {"messages": [{**ASKED[0], "content": f"{USER}{i}"}, ASKED[1]]}
        for i in range(3)
    ]
    path = tmp_path / f"chats{ending}"
    if flat:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    elif ending == ".parquet":
        polars.DataFrame(rows).write_parquet(path)
    else:
        path.write_text(json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    items = read(str(path)).items
    assert [[m["content"] for m in one.messages] for one in items] == [[f"{USER}{i}", ANSWER] for i in range(3)]
    assert items[0].where == f"{path}:{1 if not flat else 2}" and len({one.where for one in items}) == 3


def test_an_instruction_and_its_input_are_one_turn_and_instances_are_conversations_of_their_own():
    assert messages({"instruction": "Add.", "input": "1 and 2", "output": "3"})[0]["content"] == "Add.\n\n1 and 2"
    instances = [{"input": "1 and 2", "output": "3"}, {"input": "", "output": "?"}]
    found = read([{"instruction": "Add.", "instances": instances, "name": "sum"}])
    assert [[m["content"] for m in one.messages] for one in found.items] == [["Add.\n\n1 and 2", "3"], ["Add.", "?"]]
    assert found.unused == ("name",)


def test_tools_calls_their_results_and_names_are_kept():
    call = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": [2]}'}}
    talk = [
        {"role": "user", "content": "1+2?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "a1", "name": "add"},
        {"role": "assistant", "content": "3.", "weight": 0, "tool_calls": None},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, json.dumps(tools)):
        (one,) = read([{"messages": talk, "tools": given}]).items
        assert one.tools == tuple(tools)
    kept = {**call, "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}  # an object, which a template writes as JSON once
    assert list(one.messages) == [
        talk[0],
        {"role": "assistant", "content": "", "tool_calls": [kept]},
        talk[2],
        {"role": "assistant", "content": "3.", "weight": 0},
    ]
    shared = [("human", "1+2?"), ("function_call", '{"name": "add", "arguments": {"x": 1}}'), ("observation", "3"), ("gpt", "3.")]
    said = messages({"conversations": [{"from": who, "value": what} for who, what in shared]})
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "assistant"]
    assert said[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]


def test_a_mapping_names_columns_of_any_other_shape():
    row = {"frage": USER, "antwort": ANSWER, "rahmen": "Be short.", "text": "x", "chosen": 1, "rejected": 2}
    assert messages(row, {"user": "frage", "assistant": "antwort", "system": "rahmen"}) == [SYSTEM, *ASKED]
    assert messages(row, {"user": "frage", "assistant": "antwort"}) == ASKED
    talk = [{"wer": "human", "was": USER}, {"wer": "model", "was": ANSWER}]
    assert messages({"dialog": talk}, {"messages": "dialog", "role": "wer", "content": "was"}) == ASKED
    assert messages({"dialog": ASKED}, {"messages": "dialog"}) == ASKED


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"user": "questoin", "assistant": "answer"}, "has no column 'questoin'; did you mean 'question'?"),
        ({"user": "question", "assistant": "zzz"}, "has no column 'zzz'; the columns are question, answer"),
        ({"user": "question"}, "data.mapping: has the keys user; {user: COLUMN"),
        ({"user": "question", "assistant": "answer", "role": "x"}, "has the keys user, assistant, role"),
    ],
)
def test_a_mapping_that_does_not_fit_says_what_would(mapping, said):
    with pytest.raises(DataError) as caught:
        read([{"question": "a", "answer": "b"}], mapping)
    assert said in str(caught.value)


def test_a_first_recipe_is_for_conversations_only_where_nothing_else_is_meant(tmp_path):
    def file(rows, name="t.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    pair = {"question": "a", "answer": "b"}
    assert holds_conversations(file([{"messages": ASKED, "id": 1}]), HERE)
    assert holds_conversations(file([{"instruction": "a", "output": "b", "id": 1}]), HERE)
    assert holds_conversations(file([{**pair, "system": "x"}]), HERE)
    assert not holds_conversations(file([{**pair, "score": 1}]), HERE)
    assert not holds_conversations(file([{"text": "a"}]), HERE) and not holds_conversations(file([{"x": 1, "y": 2}]), HERE)
    scored = file([{**pair, "words": i % 3, "score": i % 7 + i / 3} for i in range(20)])
    assert describe(scored).kind == "table" and describe(scored, task="chat").kind == "chat"
    for answers in ("12345678", ["yes", "no"] * 4, range(8)):  # numbers and labels
        assert describe(file([{"input": i % 3 + i / 2, "output": answer} for i, answer in enumerate(answers)])).kind == "table"


def test_a_first_recipe_for_conversations_gives_each_guess_with_its_reason(tmp_path):
    import yaml

    path = tmp_path / "my chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": ASKED, "id": i}) for i in range(300)))
    text = first_recipe(describe(str(path)))
    assert yaml.safe_load(text) == {
        "name": "my-chats",
        "task": "chat",
        "model": "smollm2-135m-instruct",
        "adapter": {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
        "data": {"train": str(path), "hold_out": 0.1},
        "optimizer": {"name": "adamw", "lr": "2e-4"} | {"lr": yaml.safe_load("2e-4")},
        "schedule": {"name": "cosine", "warmup": 0.05},
        "batch": 8,
        "epochs": 3,
    }
    assert "recognised by messages (role, content)" in text and "not used: id" in text and "about 102 steps" in text
    assert "model: hf:a/b  # as asked" in first_recipe(describe(str(path)), model="hf:a/b")


@pytest.mark.skipif(not SEEDS.exists(), reason="../shared/data is not here")
def test_the_seed_tasks_of_self_instruct_are_read_whole():
    found = read(str(SEEDS))
    assert len(found.items) == 175 and found.shape == "instruction/instances"
    assert found.unused == ("id", "name", "is_classification")
    assert found.items[1].messages[0]["content"].endswith("pairs?\n\nNight : Day :: Right : Left")
    assert "task: chat" in first_recipe(describe(str(SEEDS)))
