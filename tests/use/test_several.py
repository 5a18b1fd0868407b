"""Several texts at once, and what a person may ask of each: stop strings, logprobs, penalties; in Python and at the command line."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

import fromzero as fz
import fromzero.use.speak as speaking
from fromzero.data import tokens as tk
from fromzero.models.scores import scores_at
from fromzero.use.speak import complete, converse, open_speaker, speak
from tests.conftest import fromzero
from tests.use.conftest import BLUE, FRANCE, PARIS, SKY, Terminal, turns
from tests.use.test_speak import command

ASKED = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in (FRANCE, SKY)]


@pytest.fixture(scope="module")
def speaker(talker: Path) -> speaking.Speaker:
    return open_speaker(str(talker), Path("runs"))


def test_several_prompts_get_the_texts_that_each_gets_alone(talker: Path) -> None:
    assert fz.generate(str(talker), ASKED) == [PARIS, BLUE]
    assert fz.generate(str(talker), ASKED[0]) == PARIS and fz.generate(str(talker), []) == []
    warm = {"temperature": 1.5, "max_tokens": 12, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 3}
    prompts = ["Which", "It is", "Paris, "]
    assert fz.generate(str(talker), prompts, **warm) == [fz.generate(str(talker), one, **warm) for one in prompts]
    assert fz.generate(str(talker), prompts[0], **warm) != fz.generate(str(talker), prompts[0], **{**warm, "repetition_penalty": 50.0})


def test_more_prompts_than_fit_are_begun_as_others_end(speaker: speaking.Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    step, sizes = speaking.Batch.step, []

    def counted(batch):
        sizes.append(len(batch))
        return step(batch)

    monkeypatch.setattr(speaking.Batch, "step", counted)
    monkeypatch.setattr(speaking, "TOGETHER", 3)
    speaker = replace(speaker, stops=frozenset())
    speeches = [complete(speaker, "It is", max_tokens=most) for most in (2, 9, 4, 3, 1, 5)]
    pieces = list(speak(speeches))
    assert max(sizes) == 3 and sizes == [3] * 5 + [2] * 4 + [1]
    whole = complete(speaker, "It is", max_tokens=9)
    text = "".join(whole)
    for speech in speeches:
        assert text.startswith(speech.text) and speech.text == "".join(piece for one, piece in pieces if one is speech)


def test_a_text_ends_before_its_stop_string(speaker: speaking.Speaker, talker: Path) -> None:
    assert fz.generate(str(talker), ASKED[0], stop="déjà") == "Paris, "
    assert fz.chat(str(talker), turns(FRANCE), stop=["vu", "🎉"]) == "Paris, déjà "
    speech = converse(speaker, turns(FRANCE), stop=["is, d"])
    assert "".join(speech) == "Par" and speech.stopped == "stop"
    assert tk.decode(speaker.tokenizer, speech.ids).startswith("Paris, d"), "its tokens are those that were made"
    last = complete(speaker, ASKED[0], stop=["ris"], max_tokens=len(tk.encode(speaker.tokenizer, ["Paris"], special=False)[0]))
    assert "".join(last) == "Pa" and last.stopped == "stop", "also where the last token completes it"
    with pytest.raises(fz.UserError, match="a stop string is empty; leave it out"):
        complete(speaker, "a", stop=[""])


def test_logprobs_stand_beside_each_token(speaker: speaking.Speaker, talker: Path, tmp_path: Path) -> None:
    found = fz.generate(str(talker), ASKED[1], logprobs=2)
    assert found["text"] == BLUE and found["stopped"] == "stop" and len(found["logprobs"]) == found["tokens"]
    (ids,) = tk.encode(speaker.tokenizer, [ASKED[1]], special=False)
    for told in found["logprobs"]:
        logs = scores_at(speaker.model, [ids], [-1])[0].double().log_softmax(0)
        assert told["logprob"] == pytest.approx(float(logs[told["id"]]), abs=1e-4)
        assert told["likeliest"][0] == {name: told[name] for name in ("id", "text", "logprob")} and len(told["likeliest"]) == 2
        ids.append(told["id"])
    assert "".join(told["text"] for told in found["logprobs"]) == BLUE
    done = fromzero("generate", str(talker), "--prompt", ASKED[1], "--logprobs", "2", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["logprobs"] == found["logprobs"]


def test_the_command_line_takes_several_prompts_and_stop_strings(talker: Path, tmp_path: Path) -> None:
    both = ["--prompt", ASKED[0], "--prompt", ASKED[1]]
    done = fromzero("generate", str(talker), *both, "--stop", "vu", "--stop", "blue", "--json", cwd=tmp_path)
    assert [(one["text"], one["stopped"]) for one in json.loads(done.stdout)] == [("Paris, déjà ", "stop"), ("It is ", "stop")]
    done = fromzero("generate", str(talker), *both, cwd=tmp_path)
    assert done.stdout == f"» {ASKED[0]}\n{PARIS}\n\n» {ASKED[1]}\n{BLUE}\n"
    done = fromzero("generate", str(talker), *both, "--repetition-penalty", "0", cwd=tmp_path)
    assert done.returncode == 2 and "repetition_penalty is 0.0; it is above 0; 1 changes nothing" in done.stderr
    assert fromzero("generate", str(talker), *both, "--min-p", "2", cwd=tmp_path).returncode == 2


def test_ctrl_c_where_nothing_is_being_said_ends_no_conversation_at_a_terminal(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pressed(Terminal):
        def readline(self, *size: int) -> str:
            if not presses:
                presses.append(1)
                raise KeyboardInterrupt
            return super().readline(*size)

    presses: list[int] = []
    done = command(monkeypatch, f"{SKY}\n", "chat", str(talker), cwd=tmp_path, kind=Pressed)
    assert done.returncode == 0 and BLUE in done.stdout and "(/exit or Ctrl-D ends)" in done.stderr

    class Piped(Pressed):
        def isatty(self) -> bool:
            return False

    presses.clear()
    assert command(monkeypatch, f"{SKY}\n", "chat", str(talker), cwd=tmp_path, kind=Piped).returncode == 130


def test_a_chat_is_asked_as_generate_is(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("chat", str(talker), "--stop", "blue", "--min-p", "0.1", "--temperature", "0.01", "--repetition-penalty", "1.01", "--json")
    done = command(monkeypatch, f"{SKY}\n", *asked, cwd=tmp_path, kind=io.StringIO)
    assert [(turn["answer"], turn["stopped"]) for turn in json.loads(done.stdout)["turns"]] == [("It is ", "stop")]
