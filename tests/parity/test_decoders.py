"""Decoders against transformers: the same scores and gradients in float64, and the same bits after a round trip through a folder.

transformers computes norms, angles, softmax and routing in float32 whatever the model's type. Here its modules see a torch whose
float32 is float64, so that both sides compute in float64 throughout and the comparison shows the formula, not the rounding.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, logging

from fromzero.models.decoder import Decoder
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.models.layers.attention import choose_path
from fromzero.weights.translate import to_ours, to_theirs

LENGTHS = (1, 7, 70, 3, 33)
TOLERANCE = 1e-9

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 96, "bos_token_id": None, "eos_token_id": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
GEMMA = SMALL | {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16}
QWEN = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.2],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", GPT2 | {"n_inner": 100, "activation_function": "relu", "tie_word_embeddings": False}),
    "llama": ("llama", SMALL),
    "llama tied, biases, wide heads": (
        "llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"},
    ),
    "llama, rope llama3": ("llama", SMALL | {"rope_parameters": LLAMA3}),
    "llama, rope linear": ("llama", SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0}}),
    "llama, rope yarn": ("llama", SMALL | {"rope_parameters": YARN}),
    "llama, rope yarn with options": (
        "llama",
        SMALL | {"rope_parameters": YARN | {"beta_fast": 8.0, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5}},
    ),
    "smollm3": ("smollm3", SMALL | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3, windows": ("smollm3", SMALL | {"no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 16}),
    "mistral": ("mistral", SMALL | {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("qwen2", SMALL | QWEN),
    "qwen3": ("qwen3", SMALL | QWEN | {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma3_text": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3, "final_logit_softcapping": 1.5}),
    "gemma3_text, far rope linear": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", SMALL | {"sliding_window": 16}),
    "phi3, longrope, half turned": (
        "phi3",
        SMALL | {"hidden_size": 64, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75}},
    ),
    "glm4": ("glm4", SMALL | {"head_dim": 16}),
    "olmo2": ("olmo2", SMALL | {"attention_bias": True}),
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        SMALL | QWEN | {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "qwen3_moe normalised, every second": (
        "qwen3_moe",
        SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
}


class Float64Torch:
    """torch, but its float32 is float64"""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers in true float64."""
    proxy = Float64Torch()
    for name in DECODERS:
        module = name.removesuffix("_text")
        __import__(f"transformers.models.{module}.modeling_{module}")
        monkeypatch.setattr(sys.modules[f"transformers.models.{module}.modeling_{module}"], "torch", proxy)
    monkeypatch.setattr(sys.modules["transformers.modeling_rope_utils"], "torch", proxy)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def theirs_of(kind: str, settings: dict[str, Any], auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Their model, every parameter random: zeros and ones would hide an exchange, a bias or an offset."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**copy.deepcopy(settings), **options)
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * (parameter.dim() == 1) + torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
    return model


def on_disk(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as transformers writes them"""
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def gradients_on_disk(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The gradients under the names of the file: a copy whose weights are the gradients is written."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(twin.parameters(), model.parameters(), strict=True):
            assert source.grad is not None
            parameter.copy_(source.grad)
    return on_disk(twin, folder)[1]


def ours_of(config: dict[str, Any], tensors: dict[str, Tensor], **options: Any) -> Decoder:
    family = DECODERS[config["model_type"]]
    names = family.names(config, set(tensors))
    model = family.build(config, **options).to(next(iter(tensors.values())).dtype).eval()
    model.load_state_dict(to_ours(tensors, names, file="model.safetensors", ignored=family.ignored), strict=True)
    assert isinstance(model, Decoder)
    return model


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(97, (int(offsets[-1]),), generator=generator), offsets


def one_by_one(model: nn.Module, tokens: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in tokens.split(offsets.diff().tolist())])


def weighted(scores: Tensor) -> Tensor:
    """A loss that tells every score from every other"""
    return (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2), dtype=scores.dtype)).sum()


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value"""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(ours: Decoder, theirs: nn.Module, folder: Path) -> dict[str, float]:
    """Errors of scores and of every parameter's gradient; the two models hold the same weights."""
    tokens, offsets = batch()
    mine = ours(tokens, offsets)
    scores = one_by_one(theirs, tokens, offsets).reshape(mine.shape)
    weighted(mine).backward()
    weighted(scores).backward()
    found = gradients_on_disk(theirs, folder)
    family = DECODERS[theirs.config.model_type]
    names = family.names(json.loads((folder / "config.json").read_text()), set(found))
    gradients = to_ours(found, names, file="gradients", ignored=family.ignored)
    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(gradients)
    errors = {"scores": error(mine, scores)}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert gradients[name].any(), name
        errors[name] = error(parameter.grad, gradients[name])
    return errors


def test_every_family_is_walked() -> None:
    walked = {kind for kind, _ in CASES.values()}
    assert walked == set(DECODERS)
    assert len(walked) >= 13


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_equal_those_of_transformers(case: str, float64: None, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    theirs = theirs_of(kind, settings)
    ours = ours_of(*on_disk(theirs, tmp_path / "weights"))
    errors = compare(ours, theirs, tmp_path / "gradients")
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: scores {errors['scores']:.1e}, worst {worst} {errors[worst]:.1e}, of {len(errors)}")
    assert errors[worst] < TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
def test_the_plain_path_equals_the_documents_path(case: str) -> None:
    kind, settings = CASES[case]
    torch.manual_seed(0)
    model = DECODERS[kind].build(CONFIG_MAPPING[kind](**copy.deepcopy(settings)).to_dict()).double().eval()
    tokens, offsets = batch()
    found = {}
    for path in ("plain", "documents"):
        assert choose_path(model, path) == len(model.blocks)  # type: ignore[arg-type]
        model.zero_grad()
        scores = model(tokens, offsets)
        weighted(scores).backward()
        found[path] = {"scores": scores.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["plain"].keys() == found["documents"].keys()
    for name, plain in found["plain"].items():
        assert error(found["documents"][name], plain) < TOLERANCE, name


@pytest.mark.parametrize("kind", DECODERS)
def test_a_round_trip_through_a_folder_keeps_every_bit(kind: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind, next(settings for name, settings in CASES.values() if name == kind))
    config, tensors = on_disk(theirs, tmp_path / "first")
    ours = ours_of(config, tensors)
    canonical = DECODERS[kind].names(config, ())
    assert canonical == DECODERS[kind].names(config, set(tensors))
    written = to_theirs(ours.state_dict(), canonical)
    assert written.keys() == tensors.keys()

    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text(json.dumps(config))
    save_file(written, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values()), info
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = ours_of(*on_disk(again, tmp_path / "third")).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_a_published_classifier_gives_the_same_scores_from_the_last_token(kind: str, float64: None, tmp_path: Path) -> None:
    settings = next(settings for name, settings in CASES.values() if name == kind)
    theirs = theirs_of(kind, settings, AutoModelForSequenceClassification, num_labels=5)
    config, tensors = on_disk(theirs, tmp_path / "weights")
    ours = ours_of(config, tensors)
    assert ours.stages[-1] == "head"
    assert set(DECODERS[kind].names(config, ())) == set(ours.state_dict())
    errors = compare(ours, theirs, tmp_path / "gradients")
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("kind", DECODERS)
def test_a_classifier_of_ours_is_written_as_theirs(kind: str, tmp_path: Path) -> None:
    settings = next(settings for name, settings in CASES.values() if name == kind)
    config = CONFIG_MAPPING[kind](**copy.deepcopy(settings)).to_dict()
    ours = DECODERS[kind].build(config, outputs=3, dropout=0.5)
    written = DECODERS[kind].written(config, outputs=3, dropout=0.5)
    (tmp_path / "config.json").write_text(json.dumps(written))
    tensors = to_theirs(ours.state_dict(), DECODERS[kind].names(written, ()))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(theirs.score.weight, tensors["score.weight"])
    back = DECODERS[kind].build(written)
    assert back.outputs == 3
    assert back.config.dropout == (0.1 if kind == "gpt2" else 0.0)
    assert ours.config.dropout == ours.config.embedding_dropout == 0.5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_body_published_without_head_and_prefix_is_read(kind: str, tmp_path: Path) -> None:
    config, tensors = on_disk(theirs_of(kind, CASES[kind][1], AutoModel), tmp_path / "body")
    names = DECODERS[kind].names(config, set(tensors))
    assert names == DECODERS[kind].names(config, ())
    assert set(to_ours(tensors, names, file="body")) == set(DECODERS[kind].build(config).state_dict()) - {"head.weight"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_model_from_zero_becomes_a_folder_that_transformers_opens(kind: str, tied: bool, float64: None, tmp_path: Path) -> None:
    groups = {} if kind == "gpt2" else {"kv_heads": 2}
    config = decoder_config(vocabulary=97, width=48, layers=2, heads=4, context=96, family=kind, tied=tied, **groups)  # type: ignore[arg-type]
    torch.manual_seed(0)
    ours = DECODERS[kind].build(config)
    written = to_theirs(ours.state_dict(), DECODERS[kind].names(config, ()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    tokens, offsets = batch()
    with torch.no_grad():
        assert error(ours(tokens, offsets), one_by_one(theirs.double(), tokens, offsets)) < TOLERANCE


@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind != "gpt2"])
def test_a_config_as_transformers_4_spells_it_describes_the_same_model(case: str) -> None:
    kind, settings = CASES[case]
    new = CONFIG_MAPPING[kind](**copy.deepcopy(settings)).to_dict()
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    rope = copy.deepcopy(new["rope_parameters"])
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = settings.get("sliding_window_pattern", 2)
        rope = rope["full_attention"]
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    if old["rope_scaling"] == {"type": "default"}:
        old["rope_scaling"] = None
    assert DECODERS[kind].build(old).config == DECODERS[kind].build(new).config
