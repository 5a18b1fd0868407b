"""A folder in PEFT's format is a source like any other: its base with the adapter summed into it, or a refusal that says what is missing."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fromzero as fz
from fromzero.tuning import LowRank
from fromzero.weights import open_pretrained
from tests.use.conftest import FRANCE, PARIS, TEMPLATE, turns

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers between themselves
TOKENS, OFFSETS = torch.arange(30), torch.tensor([0, 9, 30])
Q, A, B = "base_model.model.model.layers.0.self_attn.q_proj", "lora_A.weight", "lora_B.weight"


@pytest.fixture
def adapter(talker: Path, tmp_path: Path) -> Path:
    """adapter/ beside its base, each as its own library writes it; A and B are random"""
    shutil.copytree(talker, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    return rewritten(tmp_path / "adapter", base_model_name_or_path="../base")


def rewritten(folder: Path, **keys: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def by_peft(folder: Path) -> torch.Tensor:
    """The scores of the merged model"""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None]).logits[0] for part in TOKENS.split(OFFSETS.diff().tolist())])


def scores(source: object, **more: object) -> torch.Tensor:
    with torch.no_grad():
        return fz.load(str(source), **more)(TOKENS, OFFSETS)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def refusal(folder: Path) -> str:
    with pytest.raises(fz.SourceError) as caught:
        fz.load(str(folder))
    return str(caught.value)


def test_it_says_what_peft_says_and_speaks_and_is_exported(adapter: Path, tmp_path: Path) -> None:
    theirs = by_peft(adapter)
    assert far(scores(adapter), theirs) < 1e-5 and far(scores(tmp_path / "base"), theirs) > 1e-2
    assert far(scores(adapter.rename(tmp_path / "moved")), theirs) < 1e-5, "the base is found from the adapter's folder"
    found = fz.export(str(tmp_path / "moved"), tmp_path / "out")
    assert [one.reader for one in found.compared] == ["fromzero", "transformers"]
    assert all(one.difference < 1e-5 for one in found.compared) and far(scores(tmp_path / "out"), theirs) < 1e-5
    said = fz.chat(str(tmp_path / "moved"), turns(FRANCE), max_tokens=8)
    assert said == fz.chat(str(tmp_path / "out"), turns(FRANCE), max_tokens=8) and said != PARIS[: len(said)]


@pytest.mark.parametrize(
    "keys", [{"adapter": {"rank": 2, "targets": "attention"}}, {"freeze": {"through": "blocks.0"}}, {}], ids=["adapter", "freeze", "all"]
)
def test_a_recipe_trains_on_from_it_and_the_run_comes_back(adapter: Path, tmp_path: Path, keys: dict[str, object]) -> None:
    rows = [{"messages": turns(FRANCE, PARIS)}] * 4
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"name": "on", "task": "chat", "model": str(adapter), "data": {"train": str(tmp_path / "c.jsonl"), "hold_out": 0}}
    recipe |= {"steps": 2, "batch": 2, "limits": {"threads": 1}, "report": (), **keys}
    outcome = fz.run(fz.plan(recipe, runs=tmp_path / "runs"), quiet=True)
    assert any(isinstance(module, LowRank) for module in outcome.model.modules()) == ("adapter" in keys)
    with torch.no_grad():
        ours = outcome.model(TOKENS, OFFSETS)
    assert far(scores("run:on", runs=tmp_path / "runs"), ours) < 1e-5 < far(ours, by_peft(adapter)) < 0.5
    retensored(adapter, lambda tensors: tensors[f"{Q}.{A}"].mul_(1.1))
    if "adapter" in keys:
        with pytest.raises(fz.SourceError, match="is no longer what it was when the run trained"):
            fz.load("run:on", runs=tmp_path / "runs")


def test_the_two_files_of_a_run_are_such_a_folder_and_name_the_revision_of_their_base(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(source: str) -> tuple[Path, str]:
        asked.append(source)
        return talker, "hf:o/talker@v1"

    monkeypatch.setattr("fromzero.weights.pretrained.fetch_hub", fetched)
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns(FRANCE, PARIS)}) + "\n")
    recipe = {"name": "own", "task": "chat", "model": "hf:o/talker", "adapter": "lora", "steps": 2, "report": ()}
    recipe["data"] = {"train": str(tmp_path / "c.jsonl"), "hold_out": 0}
    fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True)
    (tmp_path / "two").mkdir()
    for path in (tmp_path / "runs" / "own" / "model").glob("adapter_*"):
        shutil.copy(path, tmp_path / "two")
    asked.clear()
    assert far(scores(tmp_path / "two"), scores("run:own", runs=tmp_path / "runs")) < 1e-5
    assert asked[0] == "hf:o/talker@v1"


def test_a_new_head_learns_on_its_body_which_stands_still(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,kind\n" + "".join(f"Paris is {i},a\nblue is {i},b\n" for i in range(10)))
    recipe = {"name": "kinds", "task": "classify", "model": str(adapter), "head": "new", "freeze": "body", "data": str(tmp_path / "t.csv")}
    outcome = fz.run(fz.plan(recipe | {"steps": 2, "report": ()}, runs=tmp_path / "runs", probe=False), quiet=True)
    whole, body = fz.load(str(adapter)).state_dict(), outcome.model.state_dict()
    assert body.pop("head.weight").shape == (2, 48) and body and all(torch.equal(body[name], whole[name]) for name in body)


def test_a_base_that_transformers_builds_gets_its_adapter_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = transformers.StableLmForCausalLM(transformers.StableLmConfig(vocab_size=40, max_position_embeddings=64, **sizes))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", base_model_name_or_path="../base")
    theirs = by_peft(tmp_path / "adapter")
    assert far(scores(tmp_path / "adapter"), theirs) < 1e-5 and far(scores(tmp_path / "base"), theirs) > 1e-2


def test_a_tokenizer_and_template_beside_the_adapter_stand_before_those_of_the_base(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    base = open_pretrained(str(tmp_path / "base"))
    alone = open_pretrained(str(adapter))
    assert (alone.tokenizer, alone.chat_template, alone.special) == (base.tokenizer, base.chat_template, base.special)
    assert (alone.config, alone.generation, alone.origin) == (base.config, {"eos_token_id": [0, 2]}, str(adapter))
    (adapter / "chat_template.jinja").write_text("own" + TEMPLATE)
    (adapter / "tokenizer.json").write_text('{"own": 1}')
    (adapter / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    own = open_pretrained(str(adapter))
    assert (own.tokenizer, own.chat_template) == ('{"own": 1}', "own" + TEMPLATE)
    assert own.special == base.special | {"pad_token": "<pad>"}


def test_an_older_file_of_torch_is_read_by_the_child_that_can_do_nothing_else(adapter: Path) -> None:
    before = scores(adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(scores(adapter), before)
    torch.save({"a": print}, adapter / "adapter_model.bin")
    assert "adapter_model.bin: its pickle asks for" in refusal(adapter)


def test_an_adapter_may_lie_in_the_folder_of_its_base_or_beside_another_adapter(adapter: Path, tmp_path: Path) -> None:
    before = scores(adapter)
    both = shutil.copytree(tmp_path / "base", tmp_path / "both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, both)
    assert torch.equal(scores(rewritten(both, base_model_name_or_path=str(both))), before)
    second = shutil.copytree(adapter, tmp_path / "second")
    twice = scores(rewritten(second, base_model_name_or_path="../adapter"))
    assert far(twice, before) > 0.01 and torch.equal(scores(retensored(second, lambda t: [v.zero_() for v in t.values()])), before)
    rewritten(adapter, base_model_name_or_path="../second")
    assert "its base '../adapter' cannot be opened;" in refusal(second) and "holds no weights" in refusal(second)


def test_a_base_that_is_not_to_be_had_is_named_with_the_place_to_mend_it(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(adapter, base_model_name_or_path="../bse")
    assert refusal(adapter).startswith(
        f"{adapter}/adapter_config.json: its base '../bse' cannot be opened; no file, folder or source of weights"
    )
    assert refusal(adapter).endswith("write where it is into base_model_name_or_path: a folder, a short name or hf:OWNER/NAME")
    rewritten(adapter, base_model_name_or_path=None)
    assert "adapter_config.json: does not name its base; write where it is into base_model_name_or_path" in refusal(adapter)
    asked: list[str] = []

    def fetched(source: str) -> tuple[Path, str]:
        asked.append(source)
        return adapter.parent / "base", source

    monkeypatch.setattr("fromzero.weights.pretrained.fetch_hub", fetched)
    for revision, base in ((None, "o/base"), ("v1", "o/base"), (None, "ms:o/base")):
        assert len(fz.load(str(rewritten(adapter, base_model_name_or_path=base, revision=revision))).blocks) == 2
    assert asked == ["hf:o/base", "hf:o/base@v1", "ms:o/base"]


def test_what_does_not_fit_the_base_is_refused_by_name(adapter: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(adapter, tmp_path / "kept")

    def after(change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        shutil.copytree(kept, adapter, dirs_exist_ok=True)
        return refusal(retensored(adapter, change))

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        for leaf in (A, B):
            tensors[f"{Q[:-6]}q_prj.{leaf}"] = tensors.pop(f"{Q}.{leaf}")

    head = "base_model.model.lm_head.weight"
    assert "adapts what is no matrix of its base: model.layers.0.self_attn.q_prj; the base is " in after(renamed)
    assert "near: model.layers.0.self_attn.q_prj.weight ~ model.layers.0.self_attn.q_proj.weight" in refusal(adapter)
    assert f"adapter: its tensors do not fit the model: {Q}.{B} is (47, 4), not (48, 4)" in after(
        lambda t: t.update({f"{Q}.{B}": torch.ones(47, 4)})
    )
    assert f"missing {Q}.{B}" in after(lambda t: t.pop(f"{Q}.{B}"))
    assert "its adapter holds no tensors; it would change nothing" in after(dict.clear)
    norm = "base_model.model.model.layers.0.input_layernorm"
    assert "no matrix of its base: model.layers.0.input_layernorm;" in after(
        lambda t: t.update({f"{norm}.{A}": torch.ones(4, 1), f"{norm}.{B}": torch.ones(48, 4)})
    )
    assert "holds whole tensors that its base has not, or of another shape: score.weight;" in after(
        lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 48)})
    )
    assert "merge it with peft: merge_and_unload" in after(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(5)}))
    assert "holds whole tensors that its base has not" in after(lambda t: t.update({head: torch.ones(2, 48)}))
    rows = len(open_pretrained(str(tmp_path / "base")).tensors["model.embed_tokens.weight"])
    assert "changes model.embed_tokens.weight; the base's head and embedding may be one matrix" in after(
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(rows, 48)})
    )
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter: has an adapter_config.json, but no adapter_model.safetensors and no adapter_model.bin; bring " in refusal(adapter)
    assert 'not done here: peft_type = "IA3"; adapters here are LoRA' in refusal(rewritten(adapter, peft_type="IA3"))


def test_whole_tensors_that_trained_stand_in_the_place_of_the_bases(adapter: Path, tmp_path: Path) -> None:
    norm = torch.rand(48) + 0.5
    retensored(adapter, lambda tensors: tensors.update({"base_model.model.model.norm.weight": norm}))
    assert torch.equal(fz.load(str(adapter)).norm.weight, norm)
    assert not torch.equal(fz.load(str(tmp_path / "base")).norm.weight, norm)
