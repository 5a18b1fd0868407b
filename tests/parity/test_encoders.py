"""Encoders against transformers: the same files, the same tokens, elementwise forward and backward, in float64.

Theirs runs document by document without padding; ours runs all of them end to end.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fromzero.models.encoder import Encoder
from fromzero.models.encoder_families import ENCODERS, SIZES, encoder_config, outputs_in, written_config
from fromzero.models.layers.attention import choose_path
from fromzero.weights.translate import to_ours, to_theirs

VOCABULARY, WIDTH, HIDDEN, HEADS, OUTPUTS = 61, 24, 40, 4, 3
LENGTHS = (1, 7, 70, 3, 33, 7)
SHAPE = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 3}
ROBERTA = {
    **SHAPE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 80,
    "type_vocab_size": 1,
    "pad_token_id": 3,
    "layer_norm_eps": 1e-5,
}
TINY: dict[str, dict[str, Any]] = {
    "bert": {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 80, "type_vocab_size": 2},
    "roberta": ROBERTA,
    "xlm-roberta": {**ROBERTA, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 80,
        "dim": WIDTH,
        "hidden_dim": HIDDEN,
        "n_heads": HEADS,
        "n_layers": 3,
    },
    "modernbert": {
        **SHAPE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 80,
        "num_hidden_layers": 5,
        "local_attention": 12,  # five of the documents' lengths: 1, 7 and 3 within it, 33 and 70 beyond
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
CASES = [(kind, {}) for kind in TINY] + [("modernbert", {"classifier_pooling": "mean"}), ("bert", {"hidden_act": "gelu_new"})]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)


class _Wide(ModuleType):
    """torch, whose float32 is float64: ModernBERT's code computes softmax and rotations in float32 whatever the weights are."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@contextlib.contextmanager
def float64_inside(kind: str) -> Iterator[None]:
    module = transformers.models.modernbert.modeling_modernbert
    with pytest.MonkeyPatch.context() as patch:
        if kind == "modernbert":
            patch.setattr(module, "torch", _Wide("torch"))
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def theirs_of(kind: str, auto: str, **options: Any) -> Any:
    """Their model with every parameter drawn anew, norms and biases too."""
    config = transformers.AutoConfig.for_model(kind, **{**TINY[kind], "num_labels": OUTPUTS, **options})
    with float64_inside(kind):
        model = getattr(transformers, auto).from_config(config, attn_implementation="eager").double().eval()
    scatter(model)
    return model


def scatter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 1.0 if "embedding" in name and parameter.ndim == 2 else 0.15
            parameter.copy_(scale * drawn + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def ours_of(config: dict[str, Any], tensors: dict[str, Tensor], **options: Any) -> tuple[Encoder, dict[str, Any]]:
    """A model of ours with the file's weights, all of which it must take, and its map of names."""
    family = ENCODERS[config["model_type"]]
    model = family.build(config, **options)
    assert isinstance(model, Encoder)
    names = {ours: entry for ours, entry in family.names(config, tensors).items() if ours in model.state_dict()}
    model.to(next(iter(tensors.values())).dtype)
    model.load_state_dict(to_ours(tensors, names, file="theirs", ignored=family.ignored))
    return model.eval(), names


def documents() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return torch.cat(each), torch.tensor([0, *LENGTHS]).cumsum(0), each


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest value"""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_every_family_is_compared() -> None:
    assert {kind for kind, _ in CASES} == set(ENCODERS)
    assert len(ENCODERS) == 5


@pytest.mark.parametrize("path", ["documents", "plain"])
@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))
)
def test_states_logits_and_every_gradient_equal_theirs(kind: str, options: dict[str, Any], path: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind, "AutoModelForSequenceClassification", **options)
    config, tensors = saved(theirs, tmp_path)
    assert outputs_in(config, tensors) == OUTPUTS
    ours, names = ours_of(config, tensors, outputs=OUTPUTS)
    assert choose_path(ours, path) == ours.config.layers
    tokens, offsets, each = documents()

    with float64_inside(kind):
        theirs_states = torch.cat([theirs.base_model(ids[None]).last_hidden_state[0] for ids in each])  # (N, D)
        theirs_logits = torch.cat([theirs(ids[None]).logits for ids in each])  # (B, K)
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in (theirs_states, theirs_logits)]
        ((theirs_states * weights[0]).sum() / 10 + (theirs_logits * weights[1]).sum()).backward()
    ours_states, ours_logits = ours.states(tokens, offsets), ours(tokens, offsets)
    ((ours_states * weights[0]).sum() / 10 + (ours_logits * weights[1]).sum()).backward()

    assert theirs_states.std(0).min() > 0.2 and theirs_logits.std(0).min() > 0.05  # tokens and documents are not all alike
    figures = {"states": error(ours_states, theirs_states), "logits": error(ours_logits, theirs_logits)}
    theirs_gradients = to_ours({n: p.grad for n, p in theirs.named_parameters()}, names, file="gradients")
    assert set(theirs_gradients) == {name for name, _ in ours.named_parameters()}
    assert len(theirs_gradients) >= 36
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert theirs_gradients[name].abs().max() > 0
        figures[name] = error(parameter.grad, theirs_gradients[name])
    worst = max(figures, key=lambda name: figures[name])
    print(
        f"\nfigures {kind} {options} {path}: states {figures['states']:.1e} logits {figures['logits']:.1e} worst {worst} {figures[worst]:.1e}"
    )
    assert figures[worst] < 1e-9, worst


@pytest.mark.parametrize("kind", TINY)
def test_ours_written_and_loaded_by_them_and_saved_by_them_is_bit_for_bit_ours(kind: str, tmp_path: Path) -> None:
    family = ENCODERS[kind]
    config = written_config(
        {**transformers.AutoConfig.for_model(kind, **TINY[kind]).to_dict(), "model_type": kind}, outputs=OUTPUTS, pooling="pooler"
    )
    ours = family.build(config, outputs=OUTPUTS)
    scatter(ours)
    first = write(ours, config, tmp_path / "ours")
    assert type(first).__name__ == config["architectures"][0]
    read, tensors = saved(first, tmp_path / "theirs")
    again, _ = ours_of(read, tensors, outputs=OUTPUTS)
    assert again.pooling == "pooler"
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


def write(model: nn.Module, config: dict[str, Any], folder: Path, missing: str = "") -> Any:
    """A folder of ours, loaded by them with nothing missing but what is named `missing`, and nothing left over but our head."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = {ours: entry for ours, entry in ENCODERS[config["model_type"]].names(config, ()).items() if ours in model.state_dict()}
    assert names.keys() == model.state_dict().keys()
    save_file(to_theirs(model.state_dict(), names), folder / "model.safetensors", metadata={"format": "pt"})
    auto = "AutoModel" if config["architectures"][0].endswith("Model") else "AutoModelForSequenceClassification"
    loaded, facts = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert all(missing and missing in name for name in facts["missing_keys"]), facts
    assert not facts["mismatched_keys"]
    assert set(facts["unexpected_keys"]) == (
        {"classifier.weight", "classifier.bias"} if "head.weight" in names and auto == "AutoModel" else set()
    )
    return loaded.eval()


def test_what_is_built_from_zero_is_a_folder_that_they_load(tmp_path: Path) -> None:
    sizes = {**SIZES["encoder-4m"], "width": 32, "hidden": 48}
    config = encoder_config(vocabulary=VOCABULARY, **sizes, context=80)
    config = written_config(config, outputs=OUTPUTS, pooling="mean", normalize=True)
    ours = ENCODERS["bert"].build(config, outputs=OUTPUTS).eval()
    theirs = write(ours, config, tmp_path / "zero", missing="pooler")
    tokens, offsets, each = documents()
    with torch.no_grad():
        theirs_states = torch.cat([theirs(ids[None]).last_hidden_state[0] for ids in each])
        assert torch.allclose(ours.states(tokens, offsets), theirs_states, atol=1e-5)
    config, tensors = json.loads((tmp_path / "zero" / "config.json").read_text()), load_file(tmp_path / "zero" / "model.safetensors")
    assert outputs_in(config, tensors) == OUTPUTS
    again, _ = ours_of(config, tensors, outputs=OUTPUTS)
    assert again.pooling == "mean" and again.normalize
    assert torch.equal(again(tokens, offsets), ours(tokens, offsets))


@pytest.mark.parametrize(("kind", "auto"), [(kind, auto) for kind in TINY for auto in ("AutoModel", "AutoModelForMaskedLM")])
def test_a_bare_body_and_a_masked_language_model_give_the_same_states(kind: str, auto: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind, auto)
    config, tensors = saved(theirs, tmp_path)
    assert outputs_in(config, tensors) is None
    ours, names = ours_of(config, tensors)
    assert ours.pooling == "mean" and isinstance(ours.head, nn.Identity)
    assert not any(name.startswith("head.") for name in names)
    tokens, offsets, each = documents()
    with float64_inside(kind), torch.no_grad():
        theirs_states = [theirs.base_model(ids[None]).last_hidden_state[0] for ids in each]
        assert error(ours.states(tokens, offsets), torch.cat(theirs_states)) < 1e-9
        assert error(ours(tokens, offsets), torch.stack([states.mean(0) for states in theirs_states])) < 1e-9
        first, _ = ours_of(config, tensors, pooling="first")
        assert error(first(tokens, offsets), torch.stack([states[0] for states in theirs_states])) < 1e-9


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_bodys_own_pooler_is_theirs(kind: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind, "AutoModel")
    ours, _ = ours_of(*saved(theirs, tmp_path), pooling="pooler")
    tokens, offsets, each = documents()
    with torch.no_grad():
        assert error(ours(tokens, offsets), torch.cat([theirs(ids[None]).pooler_output for ids in each])) < 1e-9


def test_a_head_for_tokens_is_not_taken_for_one_for_documents(tmp_path: Path) -> None:
    config, tensors = saved(theirs_of("bert", "AutoModelForTokenClassification"), tmp_path)
    assert "classifier.weight" in tensors
    assert outputs_in(config, tensors) is None
    ours_of(config, tensors)


def test_the_first_published_spelling_of_norms_and_stored_positions_is_read(tmp_path: Path) -> None:
    config, tensors = saved(theirs_of("bert", "AutoModelForMaskedLM"), tmp_path)
    ours, _ = ours_of(config, tensors)
    older = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
    assert len(set(older) - set(tensors)) >= 14
    older["bert.embeddings.position_ids"] = torch.arange(80)
    again, _ = ours_of(config, older)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_both_spellings_of_modernberts_layers_and_bases_are_one_model() -> None:
    now = transformers.AutoConfig.for_model("modernbert", **TINY["modernbert"], global_attn_every_n_layers=2).to_dict()
    assert now["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000.0
    older = {key: value for key, value in now.items() if key not in ("rope_parameters", "layer_types")}
    older |= {"global_attn_every_n_layers": 2, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}
    assert ENCODERS["modernbert"].build(now).config == ENCODERS["modernbert"].build(older).config
    assert ENCODERS["modernbert"].build(now).config.reaches == (None, 6, None, 6, None)
    assert set(ENCODERS["modernbert"].build({**older, "local_rope_theta": None}).config.bases) == {160_000.0}
