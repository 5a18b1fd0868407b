"""llama.cpp in the place of our own engine: the same text by the same options, or a refusal by name.

What needs llama-cpp-python is run with it where it is installed. Everything around it (options, template, ends, the cached file) is always
run, with a stand-in that reads the same file with our own code.
"""

from __future__ import annotations

import inspect
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.cli import app, chat, generate
from fromzero.models.scores import Outside, context_of, scores_at
from fromzero.runner.start import build_published
from fromzero.use import engine, llama
from fromzero.use.engine import open_with
from fromzero.use.speak import complete, speak
from fromzero.weights import open_pretrained
from tests.use.conftest import BLUE, CONTEXT, FRANCE, JAPAN, PARIS, SKY, TOKYO, Terminal, turns
from tests.use.test_several import ASKED

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of llama-cpp-python, which leaves /dev/null open
NEEDS = "NOT CHECKED with llama.cpp: llama-cpp-python is not installed"
SCHEMA = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"], "additionalProperties": False}
# Every option of generate that says which tokens are made, with a value that changes the text of the talker.
OPTIONS: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 5},
    "temperature": {"temperature": 3.0},
    "seed": {"temperature": 3.0, "seed": 4},
    "top_k": {"temperature": 3.0, "top_k": 3},
    "top_p": {"temperature": 3.0, "top_p": 0.7},
    "min_p": {"temperature": 3.0, "min_p": 0.03},
    "repetition_penalty": {"repetition_penalty": 30.0},
    "stop": {"stop": ["déjà"]},
    "schema": {"schema": SCHEMA},
    "logprobs": {"logprobs": 3},
}
AROUND = {"model", "prompt", "engine", "quantize", "numbers", "runs", "as_json", "debug"}


class StandIn(Outside):
    """The file of the engine, read by our own code"""

    def __init__(self, path: Path, *, whole: bool = False) -> None:
        super().__init__()
        self.ours = build_published(open_pretrained(str(path)), {}, per_token=True)[0].eval()
        self.context = context_of(self.ours)

    def following(self, ids: Any) -> torch.Tensor:
        return scores_at(self.ours, [list(ids)], [-1])[0]


@pytest.fixture(params=["stand-in", "llama.cpp"])
def llama_cpp(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who runs the file. The cache is a folder of the test's own"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "stand-in":
        monkeypatch.setattr(engine, "LlamaCpp", StandIn)
        monkeypatch.setattr(engine, "library", lambda: SimpleNamespace(__version__="of nobody"))
    elif find_spec("llama_cpp") is None:
        pytest.skip(NEEDS)
    return "llama.cpp"


@pytest.fixture
def file(talker: Path, tmp_path: Path) -> Path:
    fz.export(str(talker), tmp_path / "file", to="gguf", numbers="f32")
    return tmp_path / "file" / "model.gguf"


# ------------------------------------------------------------------------------------------- the same text


def test_every_option_that_the_shell_has_is_tried_below() -> None:
    assert len(OPTIONS) == 10
    assert {*inspect.signature(generate).parameters} == {*OPTIONS} | AROUND
    assert {*inspect.signature(chat).parameters} - {*OPTIONS} == AROUND - {"prompt"} | {"system"}


def test_every_option_means_in_both_engines_the_same(llama_cpp: str, talker: Path) -> None:
    speakers = [open_with("fromzero", str(talker), Path("runs")), open_with(llama_cpp, str(talker), Path("runs"), numbers="f32")]
    texts = []
    for asked in ({}, *OPTIONS.values()):
        speeches = [complete(speaker, ASKED[0], **{"max_tokens": 20, "seed": 0, **asked}) for speaker in speakers]
        both = [("".join(speech), speech.as_json())[1] for speech in speeches]
        if "logprobs" in asked:
            ours, theirs = ([one["logprob"] for one in told.pop("logprobs")] for told in both)
            assert theirs == pytest.approx(ours, abs=2e-5) and len(ours) == both[0]["tokens"] > 5
            continue
        assert both[0] == both[1], asked
        texts.append(both[1]["text"])
    assert texts[0] == PARIS and len({*texts}) == len(OPTIONS), "each option changed the text"


def test_answers_go_through_the_template_and_end_at_its_terminator(llama_cpp: str, talker: Path) -> None:
    who = {"engine": llama_cpp, "numbers": "f32"}
    assert fz.chat(str(talker), turns(FRANCE), **who) == PARIS
    assert fz.chat(str(talker), turns(FRANCE, PARIS, JAPAN), **who) == TOKYO
    assert fz.chat(str(talker), turns(FRANCE, system="Be brief."), stop="vu", **who) == "Paris, déjà "


def test_several_texts_are_made_one_after_the_other_and_are_those_that_each_gets_alone(llama_cpp: str, talker: Path) -> None:
    speaker = open_with(llama_cpp, str(talker), Path("runs"), numbers="f32")
    speeches = [complete(speaker, one) for one in ASKED]
    heard = [speeches.index(speech) for speech, _ in speak(speeches)]
    assert heard == sorted(heard) and {*heard} == {0, 1} and [speech.text for speech in speeches] == [PARIS, BLUE]


def test_a_text_ends_where_the_model_reads_no_more(llama_cpp: str, talker: Path, file: Path) -> None:
    found = [
        fz.generate(source, "a" * (CONTEXT - 4), logprobs=1, **who)
        for source, who in ((str(talker), {}), (str(file), {"engine": llama_cpp}))
    ]
    assert [(one["text"], one["stopped"]) for one in found] == [(found[0]["text"], "context")] * 2
    with pytest.raises(fz.ModelError, match=f"the prompt has {CONTEXT} tokens, the model reads {CONTEXT}; shorten it"):
        fz.generate(str(file), "a" * CONTEXT, engine=llama_cpp)


def test_the_shell_says_in_one_line_what_runs_and_talks_with_it(
    llama_cpp: str, talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["generate", str(talker), "--prompt", ASKED[1], "--engine", "llama.cpp", "--json"], standalone_mode=False)
    said = capsys.readouterr()
    told, speed, _ = said.err.split("\n")
    assert json.loads(said.out)["text"] == BLUE and speed.endswith(" tokens/s, reading the prompt included")
    assert told.startswith("llama.cpp (llama-cpp-python ") and told.endswith(" MB, q8_0, written and compared now)")
    monkeypatch.setattr("sys.stdin", Terminal(f"{SKY}\n/exit\n"))
    app(["chat", str(talker), "--engine", "llama.cpp"], standalone_mode=False)
    said = capsys.readouterr()
    assert BLUE in said.out and "q8_0, written before)" in said.err


# ------------------------------------------------------------------------------------------- which file


def test_a_file_that_was_written_is_kept_until_model_numbers_or_code_change(
    llama_cpp: str, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, heard = tmp_path / "own", list[str]()
    shutil.copytree(talker, own)

    def run(**asked: Any) -> None:
        assert open_with(llama_cpp, str(own), Path("runs"), say=heard.append, **asked).context == CONTEXT

    run()
    run()
    run(numbers="f16")
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    run()
    code = tmp_path / "newer.py"
    code.touch()
    monkeypatch.setattr(engine.gguf, "__file__", str(code))
    run()
    assert [line.split(", ", 1)[1] for line in heard] == [
        f"{kind}, written {when})"
        for kind, when in [
            ("q8_0", "and compared now"),
            ("q8_0", "before"),
            ("f16", "and compared now"),
            ("q8_0", "and compared now"),
            ("q8_0", "and compared now"),
        ]
    ]
    assert sorted(path.suffix for path in (tmp_path / "cache" / "fromzero" / "gguf").iterdir()) == [".gguf"] * 4


def test_a_gguf_file_is_run_as_it_is_unless_other_numbers_are_asked_for(llama_cpp: str, file: Path, tmp_path: Path) -> None:
    heard = list[str]()
    for asked in ({}, {"numbers": "q8_0"}):
        speaker = open_with(llama_cpp, str(file), Path("runs"), say=heard.append, **asked)
        assert "".join(complete(speaker, ASKED[1])) == BLUE
    assert f" runs {file} (" in heard[0] and heard[0].endswith(" MB, as it is)") and str(file) not in heard[1]
    assert len(list((tmp_path / "cache").rglob("*.gguf"))) == 1


def test_an_adapter_of_others_is_written_anew_each_time_because_its_base_lies_elsewhere(
    llama_cpp: str, talker: Path, tmp_path: Path
) -> None:
    rows = [{"messages": turns(FRANCE, PARIS)}, {"messages": turns(SKY, BLUE)}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"name": "a", "task": "chat", "model": str(talker), "adapter": {"rank": 2}, "batch": 2, "steps": 1}
    recipe["data"] = {"train": str(tmp_path / "chats.jsonl"), "hold_out": 0}
    fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True)
    fz.export("run:a", tmp_path / "apart", to="peft", runs=tmp_path / "runs")
    heard = list[str]()
    for source in ("run:a", "run:a", str(tmp_path / "apart"), str(tmp_path / "apart")):
        open_with(llama_cpp, source, tmp_path / "runs", say=heard.append)
    assert ["now" in line for line in heard] == [True, False, True, True]


# ------------------------------------------------------------------------------------------- refused


def test_another_engine_and_numbers_of_none_are_refused_by_name(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["--engine", "llama.ccp"], "engine: 'llama.ccp' is no engine; did you mean 'llama.cpp'?"),
        (["--engine", "vllm"], "engine: 'vllm' is no engine; there is fromzero, llama.cpp"),
        (
            ["--numbers", "q8_0"],
            "numbers: numbers q8_0 are of another engine; fromzero runs the numbers that the model has; --engine llama.cpp",
        ),
    ):
        for asked in (["generate", str(talker), "--prompt", "a"], ["chat", str(talker)]):
            with pytest.raises(SystemExit) as caught:
                app([*asked, *given], standalone_mode=False)
            assert caught.value.code == 2 and capsys.readouterr().err == said + "\n"


def test_without_the_package_one_message_says_how_to_install_it_and_nothing_is_written(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for error in (ImportError("No module named 'llama_cpp'"), RuntimeError("Failed to load shared library"), OSError("libgomp.so.1")):

        def missing(name: str, error: Exception = error) -> object:
            raise error

        monkeypatch.setattr(llama.importlib, "import_module", missing)
        with pytest.raises(SystemExit) as caught:
            app(["generate", str(talker), "--prompt", "a", "--engine", "llama.cpp"], standalone_mode=False)
        why = f"llama-cpp-python cannot be imported ({error})"
        assert (
            caught.value.code == 2
            and capsys.readouterr().err == f"engine: llama.cpp is not installed; {why}; pip install 'fromzero[llama]'\n"
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_gguf_has_no_place_for_or_llama_cpp_nothing_to_say_of_is_refused(llama_cpp: str, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the lazy dog sees the fox. " * 20)
    (tmp_path / "t.csv").write_text("text,kind\n" + "".join(f"rain and wind {i},a\nbread and tea {i},b\n" for i in range(9)))
    common = {"model": {"from": "gru", "width": 8}, "steps": 1, "batch": 4, "report": ()}
    runs = tmp_path / "runs"
    data = {"train": str(tmp_path / "corpus.txt"), "tokenizer": "characters", "max_tokens": 16}
    for own in ({"name": "tells", "task": "classify", "data": str(tmp_path / "t.csv")}, {"name": "says", "task": "language", "data": data}):
        fz.run(fz.plan({**common, **own}, runs=runs, probe=False), quiet=True)
    with pytest.raises(fz.ModelError, match="'run:tells' does not go on with text; it was trained to classify; fromzero predict"):
        fz.generate("run:tells", "a", engine=llama_cpp, runs=runs)
    with pytest.raises(fz.ModelError, match="'run:says' cannot become gguf: it is no language model that fromzero writes itself"):
        fz.generate("run:says", "a", engine=llama_cpp, runs=runs)


# ------------------------------------------------------------------------------------------- llama.cpp alone


def test_what_it_has_read_is_not_read_again_and_its_memory_grows_with_the_text(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not llama.installed():
        pytest.skip(NEEDS)
    theirs, ours = llama.LlamaCpp(file, room=16, whole=True), build_published(open_pretrained(str(file)), {}, per_token=True)[0].eval()
    assert theirs.context == CONTEXT
    sizes, evaluate = list[int](), type(theirs._theirs).eval
    monkeypatch.setattr(type(theirs._theirs), "eval", lambda self, ids: (sizes.append(len(ids)), evaluate(self, ids))[1])
    ids = torch.randint(260, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    for text in (ids[:10], ids[:11], ids[:11], ids[:12], [*ids[:6], 9, 9], ids[:40], ids[:41], ids):
        assert torch.allclose(theirs.following(text), scores_at(ours, [text], [-1])[0], atol=1e-3)
    assert sizes == [10, 1, 1, 1, 2, 40, 1, CONTEXT]
    assert ids[6] != 9


def test_a_file_that_llama_cpp_does_not_open_is_named(tmp_path: Path) -> None:
    if not llama.installed():
        pytest.skip(NEEDS)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(fz.ModelError, match=r"broken.gguf: llama.cpp does not open it; .*; --engine fromzero"):
        llama.LlamaCpp(tmp_path / "broken.gguf")
