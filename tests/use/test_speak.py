"""Text in, text out: whole characters as they come, answers that end by themselves, and a terminal that can be talked to."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models

import fromzero as fz
import fromzero.use.speak as speak
from fromzero.data import tokens as tk
from fromzero.models.scores import scores_at
from fromzero.use.speak import complete, converse, open_speaker
from fromzero.use.spelling import as_text
from tests.conftest import Done, fromzero
from tests.use.conftest import BLUE, CONTEXT, FRANCE, JAPAN, PARIS, SKY, TEMPLATE, TOKYO, Terminal, turns

MANY = "naïve 東京 🎉👩‍👩‍👧  end\n\n ·"


@pytest.fixture(scope="module")
def speaker(talker: Path) -> speak.Speaker:
    return open_speaker(str(talker), Path("runs"))


def sentencepiece() -> Tokenizer:
    words = ["<unk>", "▁a", "▁b", "c", "▁", *(f"<0x{byte:02X}>" for byte in "é🎉".encode())]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


def test_characters_of_several_tokens_come_whole_and_half_a_one_never() -> None:
    tokenizer = tk.byte_pairs(["end of it"], 258)
    (ids,) = tk.encode(tokenizer, [MANY], special=False)
    pieces = list(as_text(tokenizer, ids))
    assert "".join(pieces) == MANY and len(ids) > len(pieces) > 15 and not any("\ufffd" in piece for piece in pieces)
    assert "東" in pieces and "🎉" in pieces
    for cut in range(len(ids)):
        said = "".join(as_text(tokenizer, ids[:cut]))
        assert MANY.startswith(said) and tk.decode(tokenizer, ids[:cut]).rstrip("\ufffd") == said


def test_the_space_before_a_word_stays_where_a_tokenizer_strips_the_first_one() -> None:
    tokenizer, ids = sentencepiece().to_str(), [1, 2, 3, 5, 6, 4, 2, 7, 8, 9, 10, 1]
    whole = tk.decode(tokenizer, ids)
    assert whole == "a bcé  b🎉 a"
    for begin in range(1, 4):
        assert "".join(as_text(tokenizer, ids[begin:], ids[:begin])) == whole[len(tk.decode(tokenizer, ids[:begin])) :]
    assert list(as_text(tokenizer, [2, 3])) == ["b", "c"]


def test_a_chat_answer_is_what_was_learned_and_ends_at_the_templates_own_terminator(speaker: speak.Speaker, talker: Path) -> None:
    speech = converse(speaker, turns(FRANCE))
    pieces = list(speech)
    assert "".join(pieces) == PARIS and len(pieces) > 5 and (speech.stopped, speech.dropped) == ("stop", 0)
    assert tk.decode(speaker.tokenizer, sorted(speaker.stops)) == "<|endoftext|><|im_end|>", "no card names the second"
    assert fz.chat(str(talker), turns(FRANCE, PARIS, JAPAN)) == TOKYO
    assert fz.chat(str(talker), turns(FRANCE, system="Be brief.")) == PARIS


def test_a_prompt_is_raw_text_and_the_greedy_tokens_are_those_without_a_cache(speaker: speak.Speaker, talker: Path) -> None:
    prompt = f"<|im_start|>user\n{SKY}<|im_end|>\n<|im_start|>assistant\nIt"
    speech = complete(speaker, prompt)
    assert "".join(speech) == BLUE[2:] == fz.generate(str(talker), prompt) and speech.stopped == "stop"
    (ids,) = tk.encode(speaker.tokenizer, [prompt], special=False)
    for token in speech.ids:
        assert token == int(scores_at(speaker.model, [ids], [-1])[0].argmax())
        ids.append(token)
    drawn = [fz.generate(str(talker), "Which", temperature=2.0, seed=seed, max_tokens=9) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_says_why_it_stopped_and_refuses_what_leaves_no_room(speaker: speak.Speaker) -> None:
    short = converse(speaker, turns(FRANCE), max_tokens=3)
    assert PARIS.startswith("".join(short)) and (len(short.ids), short.stopped) == (3, "length")
    endless = complete(replace(speaker, stops=frozenset()), "a" * (CONTEXT - 4))
    list(endless)
    assert (len(endless.ids), endless.stopped) == (4, "context")
    with pytest.raises(fz.ModelError, match=f"the prompt has {CONTEXT} tokens, the model reads {CONTEXT}; shorten it"):
        complete(speaker, "a" * CONTEXT)
    with pytest.raises(fz.UserError, match="there is nothing to go on with"):
        list(complete(speaker, ""))


def test_the_oldest_turns_give_room_to_the_answer_but_not_the_system_message(speaker: speak.Speaker, talker: Path) -> None:
    long = turns(*["x" * 20, "y" * 20] * 3, FRANCE, system="Be brief.")
    speech = converse(speaker, long)
    assert speech.dropped in (2, 4) and len(speech.prompt) + CONTEXT // 4 <= CONTEXT
    assert speech.prompt == speaker.encode_turns([long[0], *long[1 + speech.dropped :]])
    fuller = speaker.encode_turns([long[0], *long[speech.dropped - 1 :]])
    assert len(fuller) + CONTEXT // 4 > CONTEXT
    with pytest.raises(fz.ModelError, match=r"the conversation has .* tokens, the model reads 160; shorten it"):
        converse(speaker, turns("x" * 200))
    with pytest.raises(fz.ModelError, match=r"the conversation has .* tokens"):
        fz.chat(str(talker), turns(*["x" * 40, "y" * 40] * 3, FRANCE))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("the lazy dog sees the fox. " * 100)
    (tmp_path / "t.csv").write_text("text,kind\n" + "".join(f"rain and wind {i},a\nbread and tea {i},b\n" for i in range(20)))
    data = {"train": str(tmp_path / "corpus.txt"), "tokenizer": "characters", "max_tokens": 32}
    common = {"batch": 8, "optimizer": {"lr": 1e-2}, "report": (), "limits": {"threads": 1}}
    for name, model in (
        ("decoder", {"from": "decoder", "width": 16, "layers": 1, "heads": 2, "context": 64}),
        ("gru", {"from": "gru", "width": 24}),
    ):
        recipe = {"name": name, "task": "language", "model": model, "data": data, "steps": 120, **common}
        fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True)
    recipe = {
        "name": "names",
        "task": "classify",
        "model": {"from": "gru", "width": 8},
        "data": str(tmp_path / "t.csv"),
        "steps": 2,
        **common,
    }
    fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True)
    return tmp_path / "runs"


def test_runs_of_raw_text_go_on_with_it_and_others_name_the_command_that_they_are_for(runs: Path, talker: Path, tmp_path: Path) -> None:
    for name in ("decoder", "gru"):
        assert fz.generate(f"run:{name}", "the lazy d", max_tokens=20, runs=runs) == "og sees the fox. the"
    done = fromzero("chat", "run:gru", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "'run:gru' has no chat template; it knows no turns of a conversation; fromzero generate run:gru" in done.stderr
    )
    done = fromzero("generate", "run:names", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 2
    assert "'run:names' does not go on with text; it was trained to classify; fromzero predict run:names INPUT" in done.stderr
    (talker / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(fz.ModelError, match="has no tokenizer, so that no text becomes tokens; there is no tokenizer"):
            fz.generate(str(talker), "a")
    finally:
        (tmp_path / "tokenizer.json").rename(talker / "tokenizer.json")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=30, **shape)).save_pretrained(tmp_path / "bert")
    with pytest.raises(fz.ModelError, match="does not go on with text; it reads its input whole"):
        fz.generate(str(tmp_path / "bert"), "a")
    with pytest.raises(fz.ModelError, match="'decoder' has no weights; train it first, or name a published model"):
        fz.generate("decoder", "a")


def test_a_run_of_conversations_is_talked_to_in_the_template_that_it_was_trained_with(talker: Path, tmp_path: Path) -> None:
    said = [turns("Who are you?", "I am small."), turns(SKY, BLUE)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in said))
    recipe = {"name": "c", "task": "chat", "model": str(talker), "data": {"train": str(tmp_path / "c.jsonl"), "hold_out": 0}, "steps": 30}
    recipe |= {"optimizer": {"lr": 3e-3}, "report": (), "limits": {"threads": 1}}
    fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True)
    assert fz.chat("run:c", said[0][:1], runs=tmp_path / "runs") == "I am small."
    speech = converse(open_speaker(str(tmp_path / "runs" / "c" / "model"), tmp_path / "runs"), said[0][:1])
    assert "".join(speech) == "I am small." and speech.stopped == "stop"


def test_a_template_that_nothing_can_be_trained_with_is_still_spoken_through(talker: Path, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path / "open")
    card = tmp_path / "open" / "tokenizer_config.json"
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    card.write_text(json.dumps({**json.loads(card.read_text()), "chat_template": plain}))
    speaker = open_speaker(str(tmp_path / "open"), tmp_path)
    assert tk.decode(speaker.tokenizer, list(speaker.stops)) == tk.END
    assert tk.decode(speaker.tokenizer, speaker.encode_turns(turns(SKY))) == f"user: {SKY}\n"


TOOL = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}}


def test_tools_go_through_a_template_that_writes_them_and_are_not_dropped_by_one_that_does_not(talker: Path, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path / "caller")
    card = tmp_path / "caller" / "tokenizer_config.json"
    calls = "{% for tool in tools or [] %}<tool>{{ tool.function | tojson }}</tool>\n{% endfor %}" + TEMPLATE
    card.write_text(json.dumps({**json.loads(card.read_text()), "chat_template": calls}))
    speaker = open_speaker(str(tmp_path / "caller"), tmp_path)
    plain, speech = converse(speaker, turns(SKY)), converse(speaker, turns(SKY), [TOOL], max_tokens=3)
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "caller").apply_chat_template(
        turns(SKY), tools=[TOOL], add_generation_prompt=True, tokenize=False
    )
    assert tk.decode(speaker.tokenizer, speech.prompt) == written and '<tool>{"name": "capital"' in written
    assert speech.prompt[-len(plain.prompt) :] == plain.prompt
    said = fz.chat(str(tmp_path / "caller"), turns(SKY), tools=[TOOL], max_tokens=3)
    assert said == "".join(speech) and fz.chat(str(tmp_path / "caller"), turns(SKY)) == fz.chat(
        str(tmp_path / "caller"), turns(SKY), tools=[]
    )
    long = turns(*["x" * 20, "y" * 20] * 3, FRANCE)
    assert converse(speaker, long, [TOOL]).dropped > converse(speaker, long).dropped, "the tools take room and stay"
    with pytest.raises(fz.ModelError, match=r"the chat template of '.*' writes no tools; describe them in a system message"):
        fz.chat(str(talker), turns(SKY), tools=[TOOL])
    with pytest.raises(fz.DataError, match=r"a tool is str, no object; write \{\"type\": \"function\""):
        fz.chat(str(tmp_path / "caller"), turns(SKY), tools=["capital"])  # type: ignore[list-item]


def command(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str, cwd: Path, kind: type[io.StringIO] = io.StringIO) -> Done:
    monkeypatch.setattr(sys, "stdin", kind(typed))
    return fromzero(*arguments, cwd=cwd)


def test_generate_streams_text_or_prints_one_value(talker: Path, tmp_path: Path) -> None:
    prompt = f"<|im_start|>user\n{FRANCE}<|im_end|>\n<|im_start|>assistant\n"
    assert fromzero("generate", str(talker), "--prompt", prompt, cwd=tmp_path).stdout == PARIS + "\n"
    found = json.loads(fromzero("generate", str(talker), "--prompt", prompt, "--max-tokens", "2", "--json", cwd=tmp_path).stdout)
    assert PARIS.startswith(found["text"]) and (found["tokens"], found["stopped"]) == (2, "length")
    wrong = fromzero("generate", str(talker), "--prompt", prompt, "--temperature", "1", "--top-p", "0", cwd=tmp_path)
    assert wrong.returncode == 2 and "top_p is 0.0; it is above 0 and at most 1" in wrong.stderr


def test_chat_in_a_pipe_answers_each_line_and_obeys_its_commands(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = f"{FRANCE}\n\n{JAPAN}\n/tokens\n/save kept.json\n/reset\n{SKY}\n/help\n/exit\nnever asked\n"
    done = command(monkeypatch, typed, "chat", str(talker), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[:3] == [PARIS, TOKYO, BLUE]
    held = len(open_speaker(str(talker), Path("runs")).encode_turns(turns(FRANCE, PARIS, JAPAN, TOKYO)))
    assert f"{held} of {CONTEXT} tokens" in done.stderr and "4 messages in kept.json" in done.stderr and "/reset" in done.stderr
    assert json.loads((tmp_path / "kept.json").read_text()) == {"messages": turns(FRANCE, PARIS, JAPAN, TOKYO)}
    done = command(monkeypatch, f"{FRANCE}\n", "chat", str(talker), "--system", "Be brief.", "--json", cwd=tmp_path)
    (turn,) = json.loads(done.stdout)["turns"]
    assert (turn["question"], turn["answer"], turn["stopped"]) == (FRANCE, PARIS, "stop") and turn["tokens"] > 5
    wrong = command(monkeypatch, "/rest\n", "chat", str(talker), cwd=tmp_path)
    assert wrong.returncode == 2 and "'/rest' is no command here; did you mean '/reset'?" in wrong.stderr


def test_at_a_terminal_a_mistake_is_said_and_ctrl_c_stops_one_answer(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = speak.Batch.step, []

    def interrupted(batch):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(speak.Batch, "step", interrupted)
    typed = f"{FRANCE}\n/rest\n{'x' * 200}\n/save kept.json\n/reset\n{FRANCE}\n"
    said = command(monkeypatch, typed, "chat", str(talker), cwd=tmp_path, kind=Terminal)
    assert said.returncode == 0 and said.stdout.count("»") == 7 and PARIS in said.stdout
    assert "(interrupted)" in said.stderr and "did you mean '/reset'?" in said.stderr and "tokens, the model reads 160" in said.stderr
    question, answer = json.loads((tmp_path / "kept.json").read_text())["messages"]
    assert question["content"] == FRANCE and PARIS.startswith(answer["content"]) and answer["content"] != PARIS


def test_a_conversation_that_outgrows_the_context_goes_on_and_says_so_once(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = f"{'x' * 70}\n{FRANCE}\n{JAPAN}\n"
    done = command(monkeypatch, typed, "chat", str(talker), "--max-tokens", "30", "--json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("the oldest 2 messages are left out: the model reads 160 tokens") == 1
    assert [turn["answer"] for turn in json.loads(done.stdout)["turns"]][1:] == [PARIS, TOKYO]


def test_smollm2_says_paris_and_then_what_it_says_without_a_cache(asset) -> None:
    asset("smollm2-135m-instruct")
    speaker = open_speaker("smollm2-135m-instruct", Path("runs"))
    speech = complete(replace(speaker, stops=frozenset()), "The capital of France is", max_tokens=16)
    pieces = list(speech)
    assert pieces[0] == " Paris"
    whole = [*speech.prompt, *speech.ids]
    assert scores_at(speaker.model, [whole], range(4, 20)).argmax(dim=1).tolist() == speech.ids and len(whole) == 21
    answer = converse(speaker, turns("What is the capital of France?"), max_tokens=40)
    assert "Paris" in "".join(answer) and answer.stopped == "stop"
