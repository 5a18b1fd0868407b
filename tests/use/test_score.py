"""Questions in, shares of right answers out: by the likeliest choice, and by the answer itself."""

import json
from pathlib import Path

import pytest
import torch

import fromzero as fz
import fromzero.use.score as scoring
from fromzero.use.score import score
from fromzero.use.speak import Speaker, open_speaker
from tests.conftest import fromzero
from tests.use.conftest import BLUE, CONTEXT, FRANCE, PARIS, SKY, turns


@pytest.fixture(scope="module")
def speaker(talker: Path) -> Speaker:
    return open_speaker(str(talker), Path("runs"))


def written(path: Path, *questions: object) -> str:
    path.write_text("\n".join(q if isinstance(q, str) else json.dumps(q) for q in questions) + "\n")
    return str(path)


def by_hand(speaker: Speaker, prompt: list[int], ids: list[int]) -> float:
    """The choice alone, one token after the other"""
    total = 0.0
    for i, token in enumerate(ids):
        seen = torch.tensor([*prompt, *ids[:i]])
        with torch.no_grad():
            total += float(speaker.model(seen, torch.tensor([0, len(seen)]))[-1].double().log_softmax(0)[token])
    return total


CHOICES = ["It is red, as roses are.", BLUE, "No"]


def test_choices_are_weighed_after_the_template_as_one_by_one(speaker: Speaker, tmp_path: Path) -> None:
    questions = [{"question": SKY, "choices": CHOICES, "answer": 1}, {"question": SKY, "choices": CHOICES, "answer": "No"}]
    found = score(speaker, written(tmp_path / "q.jsonl", *questions), "choice")
    ours = found["rows"][0]["logprobs"]
    prompt = speaker.encode_turns(turns(SKY))
    theirs = [by_hand(speaker, prompt, speaker.encode(choice)) for choice in CHOICES]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert (found["questions"], found["accuracy"], found["accuracy_norm"]) == (2, 0.5, 0.5)
    assert [(row["line"], row["chosen"], row["accuracy"]) for row in found["rows"]] == [(1, 1, True), (2, 1, False)]


def test_the_sum_favours_short_choices_and_the_share_per_character_does_not(
    speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token costs the same: the shortest choice then has the largest sum, the one of fewest tokens a character the largest share"""
    monkeypatch.setattr(scoring, "scores_at", lambda model, documents, rows: torch.zeros(len(rows), 400))
    question = {"question": "a", "choices": ["zq", "capital of"], "answer": 1}
    assert len(speaker.encode("zq")) < len(speaker.encode("capital of"))
    found = score(speaker, written(tmp_path / "q.jsonl", question), "choice")
    assert (found["accuracy"], found["accuracy_norm"]) == (0.0, 1.0)


def test_without_a_template_choices_follow_the_raw_question(speaker: Speaker, tmp_path: Path) -> None:
    raw = Speaker("raw", speaker.model, speaker.tokenizer, (), None, speaker.stops)
    for asked, between in (("The sky is", " "), ("The sky is\n", "")):
        question = {"question": asked, "choices": ["blue", "red"], "answer": "blue"}
        (row,) = score(raw, written(tmp_path / "q.jsonl", question), "choice")["rows"]
        prompt = raw.encode(asked)
        for choice, ours in zip(["blue", "red"], row["logprobs"], strict=True):
            whole = raw.encode(asked + between + choice)
            assert whole[: len(prompt)] == prompt
            assert ours == pytest.approx(by_hand(raw, prompt, whole[len(prompt) :]), abs=1e-4)


def test_a_choice_whose_first_token_reaches_into_the_question_is_weighed_with_that_token(speaker: Speaker, tmp_path: Path) -> None:
    raw = Speaker("raw", speaker.model, speaker.tokenizer, (), None, speaker.stops)
    asked, whole = raw.encode("What is the "), raw.encode("What is the capital")
    shared = len(asked) - 1
    assert whole[:shared] == asked[:shared] and whole[shared] != asked[shared], "the space belongs to the word"
    question = {"question": "What is the ", "choices": ["capital", "zq"], "answer": 0}
    (row,) = score(raw, written(tmp_path / "q.jsonl", question), "choice")["rows"]
    assert row["logprobs"][0] == pytest.approx(by_hand(raw, whole[:shared], whole[shared:]), abs=1e-4)


def test_an_exact_answer_may_differ_in_case_punctuation_and_space_and_contain_more(speaker: Speaker, tmp_path: Path) -> None:
    asked = [
        {"question": FRANCE, "answer": "  paris DÉJÀ vu 🎉"},
        {"question": FRANCE, "answer": ["Lyon", "Paris"]},
        {"question": FRANCE, "answer": "Pari"},
        {"question": SKY, "answer": BLUE},
    ]
    found = score(speaker, written(tmp_path / "q.jsonl", *asked), "exact")
    assert [(row["exact"], row["contains"]) for row in found["rows"]] == [(True, True), (False, True), (False, False), (True, True)]
    assert (found["exact"], found["contains"], found["rows"][0]["said"]) == (0.5, 0.75, PARIS)
    raw = Speaker("raw", speaker.model, speaker.tokenizer, (), None, frozenset())
    (row,) = score(
        raw, written(tmp_path / "r.jsonl", {"question": f"{FRANCE}<|im_end|>\n<|im_start|>assistant\n", "answer": "x"}), "exact"
    )["rows"]
    assert row["said"] == PARIS + "<|im_end|>", "raw text is read to the end of its first line"


def test_the_command_prints_the_figures_and_each_row_as_json(talker: Path, tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", {"question": SKY, "choices": CHOICES, "answer": 1}, "")
    done = fromzero("evaluate", str(talker), "q.jsonl", "--task", "choice", cwd=tmp_path)
    assert done.returncode == 0 and "accuracy       1\n" in done.stdout and "logprobs" not in done.stdout
    found = json.loads(fromzero("evaluate", str(talker), "q.jsonl", "--task", "choice", "--json", cwd=tmp_path).stdout)
    assert found["accuracy"] == 1.0 and found["rows"][0]["chosen"] == 1
    unknown = fromzero("evaluate", str(talker), "q.jsonl", "--task", "choices", cwd=tmp_path)
    assert unknown.returncode == 2 and "--task choices is not known; did you mean 'choice'?" in unknown.stderr
    without = fromzero("evaluate", str(talker), "--task", "exact", cwd=tmp_path)
    assert without.returncode == 2 and "there are no questions; name a JSON-lines file of them" in without.stderr


def test_every_line_that_is_no_question_is_named_at_once(speaker: Speaker, tmp_path: Path) -> None:
    lines = [
        {"question": "a", "choices": ["b", "c"], "answer": 0},
        "{",
        "[1]",
        {"question": " ", "choices": ["b", "c"], "answer": 0},
        {"question": "a", "choices": ["b"], "answer": 0},
        {"question": "a", "choices": ["b", "c"], "answer": 2},
        {"question": "a", "choices": ["b", "c"], "answer": True},
        {"question": "a", "choices": ["b", "c"], "answer": "d"},
    ]
    path = written(tmp_path / "q.jsonl", *lines)
    with pytest.raises(fz.DataError) as caught:
        score(speaker, path, "choice")
    faults = caught.value.faults
    assert sorted(fault.line for fault in faults) == [2, 3, 4, 5, 6, 7, 8] and {fault.file for fault in faults} == {path}
    assert "is not JSON" in faults[0].what and "not an object" in faults[1].what and faults[2].what == "has no question"
    assert faults[3].what == "needs choices: a list of at least two texts"
    assert faults[4].what == "its answer 2 is none of the 2 choices, nor the place of one, from 0"
    with pytest.raises(fz.DataError) as caught:
        score(speaker, written(tmp_path / "q.jsonl", {"question": "a"}, {"question": "a", "answer": []}), "exact")
    assert {fault.what for fault in caught.value.faults} == {"needs an answer: a text, or a list of texts of which any is right"}
    with pytest.raises(fz.DataError, match="is no file, folder or named set"):
        score(speaker, str(tmp_path / "absent.jsonl"), "exact")
    with pytest.raises(fz.DataError, match=r"'x.* …' has .* tokens with a choice; the model reads 160; shorten it"):
        score(speaker, written(tmp_path / "q.jsonl", {"question": "x" * CONTEXT, "choices": ["b", "c"], "answer": 0}), "choice")


def test_a_long_file_says_how_far_it_is(
    speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "EVERY", -1.0)
    question = {"question": SKY, "choices": CHOICES, "answer": 1}
    score(speaker, written(tmp_path / "q.jsonl", question, question), "choice")
    assert capsys.readouterr().err == "1 of 2 questions\n2 of 2 questions\n"
