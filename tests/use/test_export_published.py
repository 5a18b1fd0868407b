"""Real published models as every format that has a place for them: opened by the program that the file is for, and compared there."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.models.scores import scores_at
from fromzero.use.engine import open_with
from fromzero.use.export import Exported, gguf
from fromzero.use.export.compare import nats
from fromzero.use.llama import LlamaCpp
from fromzero.use.speak import complete, converse, open_speaker
from tests.use.conftest import turns

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")]
SMOLLM, MINILM = "smollm2-135m-instruct", "minilm-l6"
PROMPTS = ["The capital of France is", "Once upon a time, in a village by the sea,", "Water boils at", "def fibonacci(n):\n    "]
ENGLISH = (
    "The lighthouse was built in 1843, after a storm had driven two ships onto the rocks. For a hundred years a keeper climbed its stairs every "
    "evening to light the lamp, and every morning to put it out again. Today it works by itself, and the keeper's house is a small museum."
)
SENTENCES = ["The cat sits on the mat.", "Interest rates rose by half a point this morning, and the markets fell before noon."]


def compared(found: Exported) -> dict[str, float | None]:
    return {one.reader: one.difference for one in found.compared}


def needs(*packages: str) -> None:
    if absent := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"NOT CHECKED: {', '.join(absent)} is not installed")


def test_smollm2_as_hf_says_in_transformers_what_it_says_here(asset: Callable[[str], Path], tmp_path: Path) -> None:
    needs("transformers")
    import transformers

    asset(SMOLLM)
    found = fz.export(SMOLLM, tmp_path / "out")
    assert compared(found).keys() == {"fromzero", "transformers"} and all(one.difference < 1e-5 for one in found.compared)
    assert found.compared[1].also == "the same tokens, the same greedy continuation"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(found.folder).eval()
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(found.folder), open_speaker(SMOLLM, Path("runs"))
    for prompt in PROMPTS[:2]:
        speech = complete(ours, prompt, max_tokens=12)
        list(speech)
        ids = tokenizer(prompt, return_tensors="pt")
        said = theirs.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        assert said.tolist() == speech.ids and len(speech.ids) == 12
    asked = tokenizer.apply_chat_template(turns("What is 2 + 2?"), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == ours.encode_turns(turns("What is 2 + 2?"))


@pytest.mark.parametrize("numbers", gguf.NUMBERS)
def test_smollm2_as_gguf_stays_within_the_bounds_in_llama_cpp(asset: Callable[[str], Path], tmp_path: Path, numbers: str) -> None:
    asset(SMOLLM)
    found = fz.export(SMOLLM, tmp_path / "out", to="gguf", numbers=numbers)
    print(found)
    assert compared(found)["fromzero"] <= gguf.BOUNDS[numbers][0]
    needs("llama_cpp")
    assert compared(found)["llama.cpp"] <= gguf.LLAMA_CPP[numbers][0] and "the same tokens" in found.compared[1].also
    assert numbers != "f32" or "the same greedy continuation" in found.compared[1].also
    ours, theirs = open_speaker(SMOLLM, Path("runs")), LlamaCpp(found.folder / gguf.FILE, room=128, every=True)
    ids = ours.encode(ENGLISH)
    assert 40 < len(ids) < 128
    costs = [nats([torch.tensor(ids)], [scores]) for scores in (scores_at(ours.model, [ids], range(len(ids))), theirs.scores(ids))]
    print(f"next-token loss of English, ours in float32 and theirs: {costs}")
    assert costs[0] < 4 and abs(costs[1] - costs[0]) < gguf.LLAMA_CPP[numbers][1]


def test_llama_cpp_goes_on_with_greedy_texts_of_smollm2_as_we_do(
    asset: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("llama_cpp")
    asset(SMOLLM)
    fz.export(SMOLLM, tmp_path / "out", to="gguf", numbers="f32")
    ours = open_speaker(SMOLLM, Path("runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    theirs = open_with("llama.cpp", str(tmp_path / "out" / gguf.FILE), Path("runs"), numbers="f32")
    for one in PROMPTS:
        both = [complete(speaker, one, max_tokens=24) for speaker in (ours, theirs)]
        texts = ["".join(speech) for speech in both]
        assert both[0].ids == both[1].ids and texts[0] == texts[1] and len(both[0].ids) > 4, one
    both = [converse(speaker, turns("What is the capital of France?"), max_tokens=24) for speaker in (ours, theirs)]
    assert ["".join(speech) for speech in both] == [both[0].text] * 2 and both[0].stopped == both[1].stopped and "Paris" in both[0].text


def test_minilm_as_onnx_and_hf_gives_its_states_and_vectors(asset: Callable[[str], Path], tmp_path: Path) -> None:
    needs("transformers", "onnxruntime", "onnxscript")
    import onnxruntime
    import transformers

    tokenizer = (asset(MINILM) / "tokenizer.json").read_text(encoding="utf-8")
    hf, onnx = fz.export(MINILM, tmp_path / "hf"), fz.export(MINILM, tmp_path / "onnx", to="onnx")
    assert [*compared(hf)] == ["fromzero", "transformers"] and [*compared(onnx)][-1].startswith("onnxruntime")
    assert all(one.difference is not None and one.difference < 1e-4 for one in (*hf.compared, *onnx.compared))
    ours, theirs = fz.load(MINILM), transformers.AutoModel.from_pretrained(hf.folder).eval()
    session = onnxruntime.InferenceSession(onnx.folder / "model.onnx")
    for ids in tk.encode(tokenizer, SENTENCES, special=True):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            states, vector = ours.states(tokens, torch.tensor([0, len(ids)])), ours(tokens, torch.tensor([0, len(ids)]))
            assert torch.allclose(theirs(tokens[None]).last_hidden_state[0], states, atol=1e-4)
        said = torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])
        assert torch.allclose(said.reshape(vector.shape), vector, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own call below
def test_lora_beside_smollm2_is_opened_by_peft_beside_the_base_written_as_hf(asset: Callable[[str], Path], tmp_path: Path) -> None:
    needs("peft", "transformers")
    import peft
    import transformers

    asset(SMOLLM)
    base = fz.export(SMOLLM, tmp_path / "base").folder
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns("Who are you?", "A lighthouse keeper.")}) + "\n")
    recipe = {"name": "keeper", "task": "chat", "model": str(base), "adapter": {"rank": 4, "alpha": 8}, "batch": 1, "steps": 3}
    recipe |= {"data": {"train": str(tmp_path / "chats.jsonl"), "hold_out": 0}, "optimizer": {"name": "adamw", "lr": 1e-3}, "report": []}
    fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True)
    found = fz.export("run:keeper", tmp_path / "apart", to="peft", runs=tmp_path / "runs")
    assert [*compared(found)][-1] == "peft" and all(one.difference is not None and one.difference < 1e-4 for one in found.compared)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), found.folder).eval()
    ids = torch.arange(20)
    with torch.no_grad():
        ours = fz.load("run:keeper", runs=tmp_path / "runs")(ids, torch.tensor([0, 20]))
        plain = fz.load(SMOLLM)(ids, torch.tensor([0, 20]))
        said = theirs(ids[None]).logits[0]
    assert torch.allclose(ours, said, atol=1e-3) and not torch.allclose(plain, said, atol=1e-2)
