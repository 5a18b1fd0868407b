"""The conversations about fromzero that recipes/ ships: lines that hold, name only what exists, and keep the examination unseen."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from fromzero.cli import app
from fromzero.recipe.read import known_keys

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TRAIN, CHOICE, EXACT = (f"fromzero_{name}.jsonl" for name in ("chats", "questions", "exact"))
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}
KEYS = {".".join(path) for path in known_keys()}
SECTIONS = {key.partition(".")[0] for key in KEYS}
PROSE = {"is", "does", "do", "divide", "read", "pad", "built", "only", "run"}  # words after `fromzero` that are no command


def lines(name):
    return [json.loads(line) for line in (RECIPES / name).read_text(encoding="ascii").splitlines()]


def plain(question):
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", question.lower()).split())


def conversations():
    return [[(turn["role"], turn["content"]) for turn in line["messages"]] for line in lines(TRAIN)]


def said_by(role):
    return [text for turns in conversations() for who, text in turns if who == role]


def every_text():
    held = [[line["question"], *line["choices"]] for line in lines(CHOICE)] + [[line["question"], *line["answer"]] for line in lines(EXACT)]
    return [text for turns in conversations() for _, text in turns] + [text for texts in held for text in texts]


def test_every_conversation_is_a_question_and_its_answer_in_turn():
    shapes = Counter("".join(role[0] for role, _ in turns) for turns in conversations())
    assert set(shapes) == {"ua", "uaua", "sua"}
    assert shapes.total() >= 180 and shapes["uaua"] >= 15 and shapes["sua"] >= 3
    assert all(text == text.strip() and text for turns in conversations() for _, text in turns)


def test_answers_are_short():
    assert all(8 <= len(answer.split()) <= 45 for answer in said_by("assistant"))


def test_each_answer_is_asked_for_in_several_ways():
    assert min(Counter(said_by("assistant")).values()) >= 3


def test_no_question_stands_in_training_twice_or_is_held_out_as_well():
    taught = [plain(text) for text in said_by("user")]
    held = [plain(line["question"]) for name in (CHOICE, EXACT) for line in lines(name)]
    assert len(set(taught)) == len(taught) and len(set(held)) == len(held) == 100
    assert not set(taught) & set(held)


def test_the_right_choice_stands_anywhere_and_looks_like_the_others():
    asked = lines(CHOICE)
    assert all(set(line) == {"question", "choices", "answer"} and len(set(line["choices"])) == 4 for line in asked)
    assert Counter(line["answer"] for line in asked) == {0: 15, 1: 15, 2: 15, 3: 15}
    assert all(max(map(len, line["choices"])) <= 1.3 * min(map(len, line["choices"])) for line in asked)
    longest = sum(len(line["choices"][line["answer"]]) == max(map(len, line["choices"])) for line in asked)
    assert longest <= 20  # who picks the longest must not be right


def test_the_right_choice_is_taught():
    taught = set(said_by("assistant"))
    assert all(line["choices"][line["answer"]] in taught for line in lines(CHOICE))


def test_a_short_answer_is_taught_and_not_given_away_by_its_question():
    asked, taught = lines(EXACT), said_by("assistant")
    assert len(asked) == 40 and all(set(line) == {"question", "answer"} for line in asked)
    assert all(any(word in text for word in line["answer"] for text in taught) for line in asked)
    assert not [line for line in asked for word in line["answer"] if word.lower() in line["question"].lower()]


def test_every_command_that_is_named_exists():
    named = {word for text in every_text() for word in re.findall(r"\bfromzero ([a-z]+)", text)} - PROSE
    assert named <= COMMANDS
    assert {"new", "plan", "train", "resume", "runs", "evaluate", "predict", "data", "fetch"} <= named


def test_every_dotted_key_that_is_named_exists():
    dotted = {key for text in every_text() for key in re.findall(r"(?<![\w./-])[a-z_]+(?:\.[a-z_]+)+", text)}
    named = {key for key in dotted if key.partition(".")[0] in SECTIONS and not key.endswith((".json", ".html"))}
    assert named <= KEYS
    assert len(named) >= 15


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_every_exit_code_is_taught(code):
    assert any(f"Exit code {code} means" in answer for answer in said_by("assistant"))
