"""The decoder without transformers: what it starts from, what no token may see, what is refused, and its parts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero.errors import ModelError, ShapeError
from fromzero.models.decoder import Decoder
from fromzero.models.decoder_families import DECODERS, SIZES, decoder_config
from fromzero.models.layers.attention import Attend
from fromzero.models.layers.documents import documents_of
from fromzero.models.layers.experts import Experts
from fromzero.models.layers.norm import RMSNorm
from fromzero.models.layers.rotary import Rope, frequencies, rotate, turns

TINY: dict[str, Any] = {"vocabulary": 61, "width": 32, "layers": 2, "heads": 4, "context": 64}


def published(kind: str, **changes: Any) -> dict[str, Any]:
    """A small config.json of a family, with all that no family has a default for"""
    config = {
        "model_type": kind,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh" if kind.startswith("gemma") else "silu",
        "rms_norm_eps": 1e-6,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    if kind in ("mixtral", "qwen3_moe"):
        config |= {"num_experts": 4, "num_experts_per_tok": 2}
    return config | changes


def build(kind: str, *, seed: int = 0, outputs: int | None = None, **changes: Any) -> Decoder:
    torch.manual_seed(seed)
    model = DECODERS[kind].build(published(kind, **changes), outputs=outputs)
    assert isinstance(model, Decoder)
    return model


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(61, (sum(lengths),), generator=torch.Generator().manual_seed(1)), offsets


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_model_from_zero_begins_near_the_loss_of_a_blind_guess(family: str, tied: bool) -> None:
    torch.manual_seed(0)
    config = decoder_config(vocabulary=997, width=96, layers=4, heads=4, context=128, family=family, tied=tied)
    model = DECODERS[family].build(config)
    tokens = torch.randint(997, (513,))
    offsets = torch.arange(0, 513, 128)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:-1], offsets), tokens[1:])
    assert abs(loss.item() - math.log(997)) < 0.1


def test_what_is_added_to_the_residual_stream_begins_smaller_and_biases_begin_at_zero() -> None:
    torch.manual_seed(0)
    model = DECODERS["gpt2"].build(decoder_config(vocabulary=997, width=128, layers=8, heads=4, family="gpt2"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            wanted = 0.02 / math.sqrt(16) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name


@pytest.mark.parametrize("kind", DECODERS)
def test_every_parameter_lies_in_exactly_one_stage_and_stages_run_in_their_order(kind: str) -> None:
    for outputs in (None, 3):
        model = build(kind, outputs=outputs)
        for name, _ in model.named_parameters(remove_duplicate=False):
            assert sum(name.startswith(stage + ".") for stage in model.stages) == 1, name
        ran: list[str] = []
        for stage in model.stages:
            model.get_submodule(stage).register_forward_pre_hook(lambda *_, stage=stage, ran=ran: ran.append(stage))
        assert model(*batch(3, 5)).shape == ((8, 61) if outputs is None else (2, 3))
        assert tuple(ran) == model.stages


@pytest.mark.parametrize("kind", DECODERS)
def test_no_token_sees_a_later_one_or_another_document(kind: str) -> None:
    model = build(kind).double().eval()
    tokens, offsets = batch(6, 9, 6)
    other = tokens.clone()
    other[11:15] = (other[11:15] + 1) % 61  # the end of the second document
    with torch.no_grad():
        before, after = model(tokens, offsets), model(other, offsets)
        alone = model(tokens[6:15], torch.tensor([0, 9]))
    still = torch.ones(21, dtype=torch.bool)
    still[11:15] = False
    torch.testing.assert_close(before[still], after[still], rtol=1e-12, atol=1e-12)
    assert (before[~still] - after[~still]).abs().amax(dim=1).min() > 1e-6
    torch.testing.assert_close(before[6:15], alone, rtol=1e-12, atol=1e-12)


def test_the_window_counts_the_token_itself() -> None:
    model = build("mistral", num_hidden_layers=1, sliding_window=4).double()
    tokens, offsets = batch(12)
    vectors = model.embedding(tokens, documents_of(tokens, offsets)).detach().requires_grad_()
    model.embedding.forward = lambda *_: vectors  # type: ignore[method-assign]
    model(tokens, offsets)[-1].sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_a_long_ropes_frequencies_follow_each_documents_own_length() -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    model = build("phi3", rope_scaling=rope, original_max_position_embeddings=8).double()
    tokens, offsets = batch(5, 12)
    with torch.no_grad():
        together, short = model(tokens, offsets), model(tokens[:5], torch.tensor([0, 5]))
        stretched = build("phi3", rope_scaling=rope, original_max_position_embeddings=4).double()(tokens, offsets)
    torch.testing.assert_close(together[:5], short, rtol=1e-12, atol=1e-12)
    assert (together[:5] - stretched[:5]).abs().max() > 1e-9


def test_a_rope_stays_exact_when_the_model_is_cast() -> None:
    model = build("llama").to(torch.bfloat16)
    documents = documents_of(*batch(64))
    cos, sin = turns(model.ropes[0], documents, dtype=torch.bfloat16)
    exact = torch.arange(64, dtype=torch.float64)[:, None, None] * torch.tensor(frequencies(1e4, 8), dtype=torch.float64)
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(cos.double(), torch.cat([exact.cos(), exact.cos()], dim=-1), rtol=0, atol=0.004)
    torch.testing.assert_close(sin.double(), torch.cat([-exact.sin(), exact.sin()], dim=-1), rtol=0, atol=0.004)
    assert len(model.ropes) == 1
    assert not list(model.buffers())


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_keeps_lengths_and_makes_scores_depend_on_distance_alone(interleaved: bool) -> None:
    documents = documents_of(*batch(20))
    rope = Rope(frequencies(100.0, 6), interleaved=interleaved)
    cos, sin = turns(rope, documents, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64).expand(2, 20, 1, 8)
    q, k = (rotate(t, cos, sin, interleaved=interleaved) for t in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(20, 1))
    scores = q[:, 0] @ k[:, 0].T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert scores[0].std() > 1e-3


def test_rms_norm_is_its_formula_with_and_without_offset() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    for offset in (0.0, 1.0):
        norm = RMSNorm(16, 1e-3, offset=offset).double()
        assert torch.equal(norm.weight, torch.full((16,), 1.0 - offset, dtype=torch.float64))
        with torch.no_grad():
            norm.weight += torch.randn(16)
            torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (norm.weight + offset))


@pytest.mark.parametrize("normalised", [False, True])
def test_experts_equal_the_sum_written_out_and_unused_ones_have_a_gradient_of_zero(normalised: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(8, 12, experts=5, per_token=2, normalised=normalised, activation="silu").double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
        experts.router.weight[3] = 0
        experts.router.weight[3, 0] = -100  # never chosen, as x[:, 0] > 0
    x = torch.randn(17, 8, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 1
    shares = (x @ experts.router.weight.T).softmax(-1)
    chosen = shares >= shares.sort(dim=-1, descending=True).values[:, 1:2]
    shares = shares * chosen
    if normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    hidden = F.silu(torch.einsum("nd,efd->nef", x, experts.gates)) * torch.einsum("nd,efd->nef", x, experts.ups)
    wanted = torch.einsum("nef,edf,ne->nd", hidden, experts.downs, shares)
    out = experts(x)
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    assert experts.gates.grad is not None
    assert [bool(part.any()) for part in experts.gates.grad] == [True, True, True, False, True]


def test_a_tied_head_is_the_embedding_itself_and_is_saved_once() -> None:
    tied, free = (build("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert tied.head is None
    assert set(free.state_dict()) - set(tied.state_dict()) == {"head.weight"}
    tied(*batch(4)).sum().backward()
    unused = torch.ones(61, dtype=torch.bool)
    unused[batch(4)[0]] = False
    assert tied.embedding.tokens.weight.grad is not None
    assert tied.embedding.tokens.weight.grad[unused].any()  # through the head


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "glm4", "qwen3_moe"])
def test_autocast_and_a_cast_model_stay_near_float32(kind: str) -> None:
    model = build(kind, **({"layer_norm_epsilon": 1e-5} if kind == "gpt2" else {})).eval()
    tokens, offsets = batch(9, 4, 9)
    with torch.no_grad():
        exact = model(tokens, offsets)
        seen: list[set[torch.dtype]] = []
        for module in model.modules():
            if isinstance(module, Attend):
                module.register_forward_pre_hook(lambda _, tensors: seen.append({t.dtype for t in tensors[:3]}))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(tokens, offsets)
        assert seen == [{torch.bfloat16}] * 2  # norms and turns in float32 do not reach the kernel, which wants one type
        short = model.to(torch.bfloat16)(tokens, offsets)
    for scores in (mixed, short):
        assert scores.dtype == torch.bfloat16
        assert (scores - exact).abs().max() < 0.05 * exact.abs().max()


def test_dropout_acts_in_training_only() -> None:
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    tokens, offsets = batch(8)
    assert not torch.equal(model(tokens, offsets), model(tokens, offsets))
    model.eval()
    assert torch.equal(model(tokens, offsets), model(tokens, offsets))


def test_a_document_longer_than_the_learned_positions_is_refused_with_both_lengths() -> None:
    model = build("gpt2")
    assert model(*batch(64, 64)).shape == (128, 61)
    with pytest.raises(ShapeError, match=r"65 tokens.*end at 64"):
        model(*batch(3, 65))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "hidden_act", "quick_gelu"),
        ("llama", "sliding_window", 128),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "layer_types", ["full_attention", "linear_attention"]),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "num_experts", 8),
        ("llama", "residual_multiplier", 0.22),
        ("gpt2", "activation_function", "tanh"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("smollm3", "layer_types", ["full_attention"]),
        ("mistral", "attention_bias", True),
        ("mistral", "layer_types", ["sliding_attention", "full_attention"]),
        ("qwen2", "attention_bias", True),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention"]),
        ("qwen3", "attn_logit_softcapping", 30.0),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "attn_logit_softcapping", 30.0),
        ("phi3", "attention_bias", True),
        ("glm4", "mlp_bias", True),
        ("olmo2", "clip_qkv", 8.0),
        ("mixtral", "router_jitter_noise", 0.1),
        ("qwen3_moe", "mlp_bias", True),
    ],
)
def test_a_key_that_changes_the_mathematics_unread_is_refused_by_name(kind: str, key: str, value: Any) -> None:
    named = {"activation_function": "hidden_act"}.get(key, key)
    with pytest.raises(ModelError, match=named) as caught:
        build(kind, **{key: value})
    assert caught.value.faults[0].key == named


def test_a_key_of_another_family_that_this_one_does_not_see_changes_nothing() -> None:
    plain = build("mistral", sliding_window=8).config
    for key, value in {
        "use_sliding_window": False,
        "max_window_layers": 1,
        "no_rope_layer_interval": 2,
        "sliding_window_pattern": 2,
    }.items():
        assert build("mistral", sliding_window=8, **{key: value}).config == plain, key
    assert [layer.window for layer in plain.layers] == [8, 8]
    assert [layer.window for layer in build("mistral", sliding_window=None).config.layers] == [None, None]
    assert [layer.window for layer in build("mistral").config.layers] == [4096, 4096]


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type"),
        ({"type": "lama3", "factor": 2.0}, "rope_type"),
        ({"rope_type": "default", "mrope_section": [1, 1, 2]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}, "long_factor"),
    ],
)
def test_a_rope_that_is_not_there_is_refused_by_name(rope: dict[str, Any], key: str) -> None:
    for place in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ModelError, match=key) as caught:
            build("llama", **{place: rope})
        assert caught.value.faults[0].key == key


def test_a_missing_size_is_named_and_heads_that_do_not_fit_are_refused() -> None:
    config = published("llama")
    del config["rms_norm_eps"]
    with pytest.raises(ModelError, match="rms_norm_eps"):
        DECODERS["llama"].build(config)
    with pytest.raises(ModelError, match="3 key/value heads do not divide 4"):
        build("llama", num_key_value_heads=3)
    for wrong, message in (
        ({"family": "lama"}, "did you mean 'llama'"),
        ({"heads": 5}, "32"),
        ({"family": "gpt2", "kv_heads": 2}, "kv_heads"),
    ):
        with pytest.raises(ModelError, match=message):
            decoder_config(**{**TINY, **wrong})


def test_the_sizes_have_as_many_parameters_as_their_names_say() -> None:
    vocabularies = {"decoder-15m": 32_000, "decoder-42m": 32_000, "decoder-124m": 50_257, "decoder-350m": 50_257, "decoder-1b": 128_256}
    assert len(SIZES) == 7
    for name, size in SIZES.items():
        for family in ("llama", "gpt2"):
            if family == "gpt2" and "kv_heads" in size:
                continue
            with torch.device("meta"):
                model = DECODERS[family].build(decoder_config(vocabulary=vocabularies.get(name, 1), context=64, family=family, **size))  # type: ignore[arg-type]
            count = sum(parameter.numel() for parameter in model.parameters())
            number, unit = int(name[8:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
            assert count == pytest.approx(number * unit, rel=0.25 if unit == 1e9 else 0.1), (name, family, count)
