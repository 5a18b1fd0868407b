"""Adapters against peft: the same scores and gradients in float64, files that each side reads from the other, bit for bit."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, logging

import fromzero as fz
from fromzero.models.decoder_families import DECODERS
from fromzero.tuning import add_adapters, choose_lowrank_path, choose_targets, merge_adapters
from fromzero.weights.peft import PeftSettings, from_peft, read_peft, write_peft
from fromzero.weights.translate import to_ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SMALL = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
KINDS = {"llama": SMALL, "qwen2": SMALL, "gpt2": GPT2, "phi3": SMALL}
WAYS = {"classic": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
CASES = [("llama", "classic"), ("llama", "rslora"), ("llama", "dora"), ("qwen2", "classic"), ("gpt2", "dora"), ("phi3", "rslora")]
LEAVES = {"gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS, OFFSETS = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 7, 40])

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs: of tied weights, of GPT-2's Conv1D, of their own deprecations


class Float64Torch:
    """torch, but its float32 is float64"""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers and peft in true float64."""
    proxy, level, before = Float64Torch(), logging.get_verbosity(), torch.get_default_dtype()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for kind in KINDS:
        __import__(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(sys.modules[f"transformers.models.{kind}.modeling_{kind}"], "torch", proxy)
    monkeypatch.setattr(sys.modules["transformers.modeling_rope_utils"], "torch", proxy)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small wait for threads more than they gain
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)
    logging.set_verbosity(level)


class Pair:
    """One random model, in a folder as transformers writes it, opened by both."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder / "base"
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**copy.deepcopy(KINDS[kind])))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(parameter * (parameter.dim() == 1) + torch.randn_like(parameter) * 0.15)
        made.save_pretrained(self.folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.names = DECODERS[kind].names(self.config, ())
        self.ours = DECODERS[kind].build(self.config).double().eval()
        tensors = load_file(self.folder / "model.safetensors")
        self.ours.load_state_dict(to_ours(tensors, self.names, file="base", ignored=DECODERS[kind].ignored))
        linears = [name for name, module in self.ours.named_modules() if isinstance(module, nn.Linear)]
        chosen = choose_targets(linears, stages=self.ours.stages, head="head", targets="all-linear")
        maps = {name: self.names[f"{name}.weight"] for name in chosen}
        self.layers = {name: tuple(theirs.removesuffix(".weight") for theirs in found[0]) for name, found in maps.items()}
        self.parts = {name: found[2] or (self.ours.get_submodule(name).out_features,) for name, found in maps.items()}

    def theirs(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()

    def wrapped(self, targets: list[str], **options: Any) -> peft.PeftModel:
        """Theirs with random A and B, and magnitudes that are not those of the start"""
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(self.theirs(), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(parameter + torch.randn_like(parameter) * 0.3)
        return model

    def adapt(self, folder: Path) -> PeftSettings:
        """Ours as the folder says."""
        settings, tensors, extra = read_peft(folder)
        assert not extra
        found = from_peft(tensors, settings, self.layers, self.parts, file="adapter")
        modules = {name.rpartition(".")[0] for name in found}
        self.layers = {name: self.layers[name] for name in self.layers if name in modules}
        self.parts = {name: self.parts[name] for name in self.layers}
        options = {"rank_stabilised": settings.rank_stabilised, "dora": settings.dora}
        self.ours.requires_grad_(False)
        add_adapters(self.ours, self.parts, rank=settings.rank, alpha=settings.alpha, **options)
        missing, extra_names = self.ours.load_state_dict(found, strict=False)
        assert not extra_names and all(".base." in name or name.rpartition(".")[0] not in modules for name in missing)
        return settings

    def adapter(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.ours.named_parameters() if p.requires_grad}


def one_by_one(model: nn.Module) -> Tensor:
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in TOKENS.split(OFFSETS.diff().tolist())])


def weighted(scores: Tensor) -> Tensor:
    """A loss that tells every score from every other"""
    return (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))).sum()


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value"""
    assert ours.shape == theirs.shape and theirs.any()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def saved(model: peft.PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_scores_and_gradients_equal_those_of_peft_on_both_paths_and_merged(kind: str, way: str, tmp_path: Path) -> None:
    pair = Pair(kind, tmp_path)
    theirs = pair.wrapped(LEAVES.get(kind, LLAMA), **WAYS[way])
    settings = pair.adapt(saved(theirs, tmp_path / "theirs"))
    assert settings.transposed == (kind == "gpt2")
    scores = one_by_one(theirs)
    weighted(scores).backward()
    with torch.no_grad():  # the gradients, written as an adapter is
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    gradients = from_peft(read_peft(saved(theirs, tmp_path / "gradients"))[1], settings, pair.layers, pair.parts, file="gradients")
    for path in ("plain", "merged"):
        assert choose_lowrank_path(pair.ours, path) == 8
        pair.ours.zero_grad()
        mine = pair.ours(TOKENS, OFFSETS)
        weighted(mine).backward()
        errors = {name: error(p.grad, gradients[name]) for name, p in pair.ours.named_parameters() if p.requires_grad}  # type: ignore[arg-type]
        assert errors.keys() == gradients.keys() and len(errors) == (24 if way == "dora" else 16)
        errors["scores"] = error(mine.detach(), scores.detach())
        assert max(errors.values()) < 1e-11, errors
    assert merge_adapters(pair.ours) < 1e-14
    assert error(pair.ours(TOKENS, OFFSETS).detach(), scores.detach()) < 1e-12


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_folder_of_pefts_opens_as_the_model_that_peft_merges(kind: str, way: str, tmp_path: Path) -> None:
    pair = Pair(kind, tmp_path)
    theirs = pair.wrapped(LEAVES.get(kind, LLAMA), **WAYS[way])
    folder = saved(theirs, tmp_path / "theirs")
    scores = one_by_one(theirs.merge_and_unload()).detach()
    ours = fz.load(str(folder))
    assert error(ours(TOKENS, OFFSETS).detach(), scores) < 1e-12
    assert error(fz.load(str(pair.folder))(TOKENS, OFFSETS).detach(), scores) > 1e-2  # the base alone says something else

    if kind == "gpt2":  # as it is published: the file holds the body alone, and does not name it
        tensors = load_file(pair.folder / "model.safetensors")
        save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, pair.folder / "model.safetensors")
        assert error(fz.load(str(folder))(TOKENS, OFFSETS).detach(), scores) < 1e-12


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_an_adapter_goes_from_each_side_to_the_other_with_every_bit(kind: str, way: str, tmp_path: Path) -> None:
    pair = Pair(kind, tmp_path)
    first = saved(pair.wrapped(LEAVES.get(kind, LLAMA), **WAYS[way]), tmp_path / "first")
    settings = pair.adapt(first)
    settings = replace(settings, revision="v1")  # of the base
    digests = write_peft(tmp_path / "second", settings, pair.adapter(), pair.layers, pair.parts)
    assert {name: fz.sources.digest_of(tmp_path / "second" / name) for name in digests} == digests
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "second"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_peft(tmp_path / "second")[0] == settings

    with warnings.catch_warnings(record=True) as said:
        again = peft.PeftModel.from_pretrained(pair.theirs(), tmp_path / "second").eval()
    assert not [warning for warning in said if "keys" in str(warning.message)]  # missing, or not used
    assert error(pair.ours(TOKENS, OFFSETS).detach(), one_by_one(again).detach()) < 1e-12
    third = load_file(saved(again, tmp_path / "third") / "adapter_model.safetensors")
    assert third.keys() == after.keys() and all(torch.equal(third[name], after[name]) for name in after)


def test_parts_that_an_adapter_leaves_out_do_nothing_never_train_and_are_left_out_again(tmp_path: Path) -> None:
    pair = Pair("qwen2", tmp_path)
    theirs = pair.wrapped(["q_proj", "v_proj"])
    first = saved(theirs, tmp_path / "first")
    settings = pair.adapt(first)
    assert list(pair.layers) == ["blocks.0.attention.qkv", "blocks.1.attention.qkv"]
    assert error(pair.ours(TOKENS, OFFSETS).detach(), one_by_one(theirs).detach()) < 1e-12
    optimizer = torch.optim.AdamW([p for p in pair.ours.parameters() if p.requires_grad])
    for path in ("plain", "merged"):
        choose_lowrank_path(pair.ours, path)
        weighted(pair.ours(TOKENS, OFFSETS)).backward()
        optimizer.step()
    write_peft(tmp_path / "second", settings, pair.adapter(), pair.layers, pair.parts)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "second"))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["target_modules"] == [
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"
    ]


def test_whole_modules_that_trained_go_along_under_their_published_names(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path)
    theirs = pair.wrapped(["q_proj", "k_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    settings, tensors, extra = read_peft(saved(theirs, tmp_path / "first"))
    assert set(extra) == {"model.embed_tokens.weight", "lm_head.weight"}
    ours = from_peft(tensors, settings, pair.layers, pair.parts, file="adapter")
    layers = {f"blocks.{i}.attention.qkv": pair.layers[f"blocks.{i}.attention.qkv"] for i in range(2)}
    extra = {name: tensor + 0.1 for name, tensor in extra.items()}
    write_peft(tmp_path / "second", settings, ours, layers, pair.parts, extra)
    again = peft.PeftModel.from_pretrained(pair.theirs(), tmp_path / "second").eval()
    held = again.get_base_model()
    assert torch.equal(held.lm_head.modules_to_save["default"].weight, extra["lm_head.weight"])
    assert torch.equal(held.model.embed_tokens.modules_to_save["default"].weight, extra["model.embed_tokens.weight"])
    assert error(fz.load(str(tmp_path / "second"))(TOKENS, OFFSETS).detach(), one_by_one(again).detach()) < 1e-12


GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 2}, 'adapter_config.json: asks for what is not done here: peft_type = ""; adapters here are LoRA'),
        (GOOD | {"peft_type": "IA3", "bias": "all"}, 'not done here: peft_type = "IA3"; bias = "all"'),
        (GOOD | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q": 1}}, 'rank_pattern = {"q_proj": 4}; alpha_pattern = {"q": 1};'),
        (GOOD | {"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa"'),
        (GOOD | {"of_the_future": 1}, "of_the_future = 1"),
        (GOOD | {"r": 0}, "are no numbers for an adapter: 0, 4, 0.0"),
        (GOOD | {"lora_alpha": "4"}, "are no numbers for an adapter: 2, '4', 0.0"),
        (GOOD | {"lora_dropout": 1}, "are no numbers for an adapter: 2, 4, 1"),
    ],
)
def test_what_a_config_asks_for_that_is_not_done_is_refused_by_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(fz.SourceError) as caught:
        read_peft(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model.model.q.lora_B.weight": None}, "missing base_model.model.q.lora_B.weight"),
        ({"base_model.model.z.lora_A.weight": torch.ones(2, 6)}, "extra base_model.model.z.lora_A.weight"),
        ({"base_model.model.q.lora_A.weight": torch.ones(3, 6)}, r"base_model.model.q.lora_A.weight is \(3, 6\), not \(2, 6\)"),
        ({"base_model.model.k.lora_A.weight": torch.ones(2, 5)}, r"base_model.model.k.lora_A.weight is \(2, 5\), not \(2, 6\)"),
        ({"base_model.model.k.lora_B.weight": torch.ones(3, 3)}, r"base_model.model.k.lora_B.weight is \(3, 3\), not \(3, 2\)"),
        ({"q.lora_A.weight": torch.ones(2, 6)}, "tensors that belong to no module of a model: q.lora_A.weight"),
        ({"base_model.model.q.lora_A.weight": torch.full((2, 6), torch.nan)}, "12 of its 12 values are NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    tensors = {f"base_model.model.{n}.lora_{m}.weight": torch.ones(s) for n in "qk" for m, s in (("A", (2, 6)), ("B", (3, 2)))}
    save_file({name: t for name, t in (tensors | change).items() if t is not None}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    with pytest.raises(fz.SourceError, match=said):
        settings, found, _ = read_peft(tmp_path)
        from_peft(found, settings, {"qk": ("q", "k")}, {"qk": (3, 3)}, file="adapter")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fz.SourceError, match=r"file: cannot be written \(.*\); free some space"):
        write_peft(tmp_path / "file", PeftSettings(2, 4), {}, {}, {})
