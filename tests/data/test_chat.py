"""Chat: conversations become examples whose trained tokens are the answers; what is cut, empty or seen twice is counted, named and shown."""

import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from tokenizers import AddedToken, Tokenizer

import fromzero as fz
from fromzero.data import ChatAsked, DataFacts, Request, chat_again, load_chat
from fromzero.data import tokens as tk
from fromzero.data.examples import IGNORED
from fromzero.data.render import environment
from fromzero.errors import DataError
from fromzero.planner.xray import findings
from fromzero.use.examples import show_examples

TEMPLATE = (Path(__file__).parent / "templates/chatml.jinja").read_text()
SEEDS = Path(__file__).resolve().parents[2] / "../shared/data/self_instruct_seed_tasks.jsonl"


@cache
def tokenizer():
    made = Tokenizer.from_str(tk.byte_pairs(["what is three times four", "twelve of course"], 300))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    return made.to_str()


def ask(**asked):
    special = {"eos_token": "<|im_end|>"}
    return ChatAsked(tokenizer(), TEMPLATE, special, tuple(tk.encode(tokenizer(), ["<|im_end|>"], special=False)[0]), **asked)


@pytest.fixture
def child():
    """Asked for by tests that render as users do."""


@pytest.fixture(autouse=True)
def rendered_here(monkeypatch, request):
    """A process for each rendering would take most of the time; the tests of templates have it."""

    def render(template, special, jobs):
        made = environment().from_string(template)
        return [made.render({**special, **json.loads(job.line())}) for job in jobs]

    if "child" not in request.fixturenames:
        monkeypatch.setattr("fromzero.data.turns.render", render)


def rows(count=20):
    return [{"question": f"what is {i}?", "answer": f"{i} of course"} for i in range(count)]


def talk(*said):
    return {"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]}


def load(train, *, limit=None, validation=None, hold_out=0.0, keep_shared=False, **asked):
    return load_chat(Request(train, validation, hold_out=hold_out, limit=limit, keep_shared=keep_shared, chat=ask(**asked)))


def trained(examples, form, i):
    """What example i is to say."""
    _, targets = examples.take(torch.tensor([i]))
    return tk.decode(form.tokenizer, [t for t in targets.tolist() if t != IGNORED])


def test_each_example_is_one_conversation_whose_answers_alone_are_asked_for():
    loaded = load([talk("a b", "c d", "e", "f g"), talk("h", "")])
    form = loaded.preparation.inputs
    inputs, targets = loaded.train.take(torch.tensor([0, 1]))
    assert inputs[1].tolist() == [0, *(loaded.train.lengths.cumsum(0).tolist())] and len(targets) == len(inputs[0])
    whole = "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc d<|im_end|>\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf g<|im_end|>\n"
    flat, length = loaded.train.flat.tolist(), loaded.train.lengths[0] + 1
    assert tk.decode(form.tokenizer, flat[:length]) == whole
    assert inputs[0][: length - 1].tolist() == flat[: length - 1]
    counts = targets != IGNORED
    assert targets[: length - 1][counts[: length - 1]].tolist() == [
        t for t, flag in zip(flat, loaded.train.trained.tolist()[:length], strict=False) if flag
    ]
    assert trained(loaded.train, form, 0) == "c d<|im_end|>f g<|im_end|>" and trained(loaded.train, form, 1) == "<|im_end|>"
    assert loaded.train.bytes == len("c d<|im_end|>f g<|im_end|><|im_end|>")
    assert trained(load([talk("a", "b", "c", "d")], turns="last").train, form, 0) == "d<|im_end|>"
    assert loaded.facts.outputs == tk.vocabulary_size(form.tokenizer) and loaded.facts.train == 2 and loaded.validation is None


def test_the_facts_are_counted_by_hand():
    said = ["c d", "f g", "h", ""]
    facts = load([talk("a", said[0], "e", said[1]), talk("x", said[2]), talk("y", said[3])]).facts
    seen, adapter = facts.chat, TypeAdapter(DataFacts)
    assert adapter.validate_json(adapter.dump_json(facts)) == facts  # as a plan is kept
    sizes = [len(tk.encode(tokenizer(), [text], special=False)[0]) + 1 for text in said]
    each = sorted([sizes[0] + sizes[1], sizes[2], sizes[3]])
    assert (seen.conversations, seen.one_turn, seen.trained) == (3, 2, sum(sizes))
    assert [seen.least, seen.median, seen.most] == each
    assert seen.terminator == "<|im_end|>" and seen.empty == 1 and seen.empty_at[0].endswith(":3")
    assert seen.untrained == 0 and seen.too_long == 0 and seen.shape == "messages (role, content)"
    assert f"trained: {sum(sizes)} of {seen.tokens} tokens" in "\n".join(seen.lines())


def test_conversations_are_split_by_content_and_what_stands_in_train_is_not_measured_on():
    loaded = load(rows(20) * 2, hold_out=0.2)
    form = loaded.preparation.inputs
    sides = [{trained(part, form, i) for i in range(len(part))} for part in (loaded.train, loaded.validation)]
    assert len(loaded.validation) == 8 and not sides[0] & sides[1] and loaded.facts.repeats == 16
    assert load(rows(20), hold_out=0.2).facts.digest == load(rows(20), hold_out=0.2).facts.digest
    spaced = [{"question": f"what  is\n{i}?", "answer": f"{i} of course "} for i in range(15, 25)]
    apart = load(rows(20), validation=spaced)
    assert (apart.facts.shared, apart.facts.validation) == (5, 5)
    kept = load(rows(20), validation=spaced, keep_shared=True)
    assert (kept.facts.shared, kept.facts.validation) == (5, 10)
    with pytest.raises(DataError, match="every one of its 3 validation examples stands in the training data too"):
        load(rows(20), validation=rows(3))
    limited = load(rows(20), limit=7, hold_out=0.2)
    assert (limited.facts.train, limited.facts.validation) == (7, 4) and "keeps 7 of 16" in limited.facts.notes[0]


def test_what_changes_a_token_or_its_training_changes_the_digest():
    long = [talk("a", "b " * 60, "c", "d"), talk("e", "f")]
    made = [
        load(long),
        load(long, turns="last"),
        load(long[::-1]),
        *(load(long, max_tokens=40, too_long=way) for way in ("cut", "drop", "split")),
    ]
    assert len({one.facts.digest for one in made}) == 6


def test_cut_drop_and_split_do_what_their_price_says():
    data = [*rows(3), talk("a", "b c d e f g h " * 8)]
    data = [{"messages": talk(row["question"], row["answer"])["messages"]} if "question" in row else row for row in data]
    whole = load(data)
    all_trained, size = whole.facts.chat.trained, int(whole.train.lengths[3]) + 1
    for room in (size - 2, 40):
        made = {way: load(data, max_tokens=room, too_long=way) for way in ("cut", "drop", "split")}
        for way, loaded in made.items():
            seen = loaded.facts.chat
            assert (seen.too_long, seen.room, seen.longest) == (1, room, size)
            assert int((loaded.train.take(torch.arange(len(loaded.train)))[1] != IGNORED).sum()) == all_trained - seen.lost[way][1]
            assert int(loaded.train.lengths.max()) <= room
        assert seen.lost["cut"][0] == size - room - 1 and seen.lost["drop"][0] == size
        assert made["cut"].facts.train == 4 and made["drop"].facts.train == 3
    form = made["split"].preparation.inputs
    pieces = [trained(made["split"].train, form, i) for i in range(3, len(made["split"].train))]
    assert len(pieces) > 3 and "".join(pieces) == trained(whole.train, form, 3)  # every token is predicted once
    assert load(data, context=size - 1).facts.chat.too_long == 0  # its last token is only predicted
    assert load(data, max_tokens=500, context=40).facts.chat.room == 40


def test_a_piece_that_asks_for_nothing_is_left_out():
    data = [talk("a b c " * 30, "d"), talk("a", "b")]
    loaded = load(data, max_tokens=40, too_long="split")
    assert len(loaded.train) == 2 and trained(loaded.train, loaded.preparation.inputs, 0) == "d<|im_end|>"


def test_where_every_conversation_is_too_long_the_mends_are_named():
    with pytest.raises(DataError, match=r"all 20 have more than 5 tokens; raise data\.max_tokens, or set data\.too_long: cut or split"):
        load(rows(), max_tokens=5)
    form = load(rows()).preparation.inputs
    with pytest.raises(DataError, match="none of its 20 conversations has at most 5 tokens"):
        chat_again(rows(), replace(form, max_tokens=5), Request(rows(), chat=ask()))


def test_a_row_that_the_template_refuses_is_named(tmp_path, child):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [talk("a", "b"), talk("a", "no"), talk("c", "d")]))
    template = "{% if messages[1].content == 'no' %}{{ raise_exception('that was refused') }}{% endif %}" + TEMPLATE
    with pytest.raises(DataError) as caught:
        load_chat(Request(str(path), hold_out=0.0, chat=replace(ask(), template=template)))
    assert "t.jsonl:2" in str(caught.value) and "that was refused" in str(caught.value)


def test_other_data_is_encoded_as_the_run_was_for_evaluation():
    loaded = load(rows(5), max_tokens=400)
    again = chat_again(rows(5), loaded.preparation.inputs, Request("elsewhere", chat=ask()))
    torch.testing.assert_close(again.flat, loaded.train.flat)
    torch.testing.assert_close(again.trained, loaded.train.trained)
    assert again.bytes == loaded.train.bytes > 0


# ------------------------------------------------------------------------------------------ findings


@cache
def plan():
    return fz.plan({"task": "classify", "model": "mlp", "data": {"train": (torch.randn(20, 4), torch.arange(20) % 2)}}, probe=False).plan


def found(loaded, **facts):
    seen = replace(plan().facts, data=replace(loaded.facts, **facts))
    return {f.code: f for f in findings(plan().recipe, seen)}


def test_sound_conversations_have_only_a_note_about_their_end():
    seen = found(load(rows(), hold_out=0.2))
    assert {code for code, f in seen.items() if f.severity != "note"} <= {"outputs"}  # of the model that stands in here
    assert "every answer ends with '<|im_end|>', which is trained; the model stops there" in str(seen["terminator"])
    assert seen["terminator"].severity == "note" and "several-answers" not in seen and "crossing-tokens" not in seen


def test_conversations_that_train_nothing_are_an_error_that_names_them():
    silent = {"messages": [talk("x")["messages"][0], {"role": "assistant", "content": "y", "weight": 0}]}
    seen = found(load([talk("a", "b"), silent]))["nothing-trained"]
    assert seen.severity == "error" and "no token is trained in 1 of 2 conversations: conversations given from Python:2" in str(seen)
    assert seen.mend == "remove them"
    cut = found(load([*(talk("a b c " * 30, "d"),) * 11, talk("a", "b")], max_tokens=40, too_long="cut"))["nothing-trained"]
    assert (
        "11 of 12" in cut.what
        and "Python:8 and 3 more" in cut.what
        and "lie beyond data.max_tokens" in cut.why
        and "drop or split" in cut.mend
    )
    assert "nothing-trained" not in found(load([talk("a b c " * 30, "d"), talk("a", "b")], max_tokens=40, too_long="split"))


def test_too_long_without_a_word_is_an_error_with_the_price_of_each_way_and_a_warning_with_one():
    data = [*(talk("a", "b"),) * 3, talk("a", "b c d e f g h " * 8)]
    whole = load(data).facts.chat
    size, most = whole.longest, whole.trained - 6
    seen = found(load(data, max_tokens=40))["too-long"]
    lost, price = size - 41, whole.tokens
    assert seen.severity == "error" and f"1 of 4 conversations have more than 40 tokens, up to {size}" in seen.what
    assert f"cut would lose {lost} of {price} tokens ({lost / price:.1%}) and {lost - 1} of {whole.trained} trained ones" in seen.why
    assert f"drop {size} of {price} tokens ({size / price:.1%}) and {most} of {whole.trained} trained ones" in seen.why
    assert "split none" in seen.why and seen.mend == "set data.too_long: cut, drop or split"
    for way, said in (("cut", f"loses {lost} of"), ("drop", f"loses {size} of"), ("split", "no token is lost, but later pieces")):
        warned = found(load(data, max_tokens=40, too_long=way))["too-long"]
        assert warned.severity == "warning" and said in str(warned)


def test_empty_answers_and_two_answers_are_said():
    loaded = load([talk("a", "b"), talk("a", "c"), talk("d", "")])
    seen = found(loaded)
    assert seen["empty-answers"].severity == "warning" and "1 conversations have an answer without words" in seen["empty-answers"].what
    assert "Python:3" in seen["empty-answers"].what and "weight: 0" in seen["empty-answers"].mend
    assert "1 prompts have more than one answer" in str(seen["several-answers"]) and "conflicting-labels" not in seen
    on = found(loaded, chat=replace(loaded.facts.chat, crossing=2))
    assert "2 tokens hold the end of a prompt and the beginning of an answer" in str(on["crossing-tokens"])
    twice = found(load(rows(5) * 2, validation=[*rows(2), *rows(9)[7:]]))
    assert "5 rows repeat" in str(twice["repeats"]) and "2 validation examples stand in the training data too" in str(twice["leak"])


# --------------------------------------------------------------------------------------------- X-ray


def test_the_x_ray_marks_what_is_trained_and_keeps_to_80_columns(monkeypatch):
    loaded = load([talk("what\nis it?", "it is 你好 🙂\n\nof course " * 9, "and?", "no"), *rows_as_talks()])
    text, values = show_examples(loaded, 2)
    assert "⟦it is 你好" in text and "no<|im_end|>⟧" in text and "<|im_start|>user⏎" in text
    shown = text.split("\n\nexample 1")[0].split("\n", 1)[1][2:].replace("\n  ", "")
    flat = loaded.train.flat[: loaded.train.lengths[0] + 1].tolist()
    assert shown.replace("⏎", "\n").translate({ord("⟦"): None, ord("⟧"): None}) == tk.decode(tokenizer(), flat)
    assert max(map(len, text.split("\n"))) <= 80
    assert values[0]["tokens"] == flat and len(values[0]["pieces"]) == len(values[0]["trained"]) == len(flat)
    assert [t for t, flag in zip(flat, values[0]["trained"], strict=True) if flag] == [
        t for t in loaded.train.take(torch.tensor([0]))[1].tolist() if t >= 0
    ]
    assert "4 conversations, 3 of one turn" in text and "an answer ends with '<|im_end|>'" in text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = show_examples(loaded, 2)[0]
    assert (
        "\x1b[1;32mit is" in coloured
        and "⟦" not in coloured
        and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text.replace("⟦", "").replace("⟧", "")
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_examples(loaded, 2)[0] == text


def rows_as_talks():
    return [talk(row["question"], row["answer"]) for row in rows(3)]


@pytest.mark.skipif(not SEEDS.exists(), reason="../shared/data is not here")
def test_the_seed_tasks_are_examples_without_a_fault(child):
    loaded = load(str(SEEDS), hold_out=0.1)
    seen = loaded.facts.chat
    assert (loaded.facts.train, loaded.facts.validation, seen.conversations) == (157, 18, 175)
    assert seen.untrained == seen.empty == seen.crossing == 0 and seen.one_turn == 175
    answers = [json.loads(line)["instances"][0]["output"] for line in SEEDS.read_text().splitlines()]
    ours = {trained(part, loaded.preparation.inputs, i) for part in (loaded.train, loaded.validation) for i in range(len(part))}
    assert ours == {f"{answer}<|im_end|>" for answer in answers}
