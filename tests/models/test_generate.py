"""Generating: a cache changes no score in any family, draws are those of the nucleus, and a text ends where it should."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from fromzero.errors import ShapeError, UserError
from fromzero.models.decoder import Cache, Decoder
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.models.generate import generate
from fromzero.models.rnn import RNN
from fromzero.models.sampling import draw
from fromzero.models.scores import context_of, scores_at
from tests.parity.test_decoders import CASES

TOKENS = torch.randint(97, (44,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost far more than models of this size"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(case: str, dtype: torch.dtype) -> Decoder:
    """Random biases and norms too: zeros and ones would hide a mistake"""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    model = DECODERS[kind].build(CONFIG_MAPPING[kind](**copy.deepcopy(settings)).to_dict()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * (parameter.dim() == 1) + torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
    return model


def whole(model: nn.Module, length: int) -> Tensor:
    return model(TOKENS[:length], torch.tensor([0, length]))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_scores_the_same_with_a_cache_as_without(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """A prompt, two bits of several tokens, then token by token, over the ends of windows and of LongRoPE's short range"""
    model, cache, read = build(case, dtype), Cache(), 0
    for size in (21, 6, 4, *[1] * 13):
        bit = TOKENS[read : read + size]
        ours = model.scores(model.states(bit, torch.tensor([0, size]), [cache]))
        read += size
        theirs = whole(model, read)[-size:]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), f"after {read} tokens"
    assert read == len(TOKENS) and cache.texts == [TOKENS.tolist()]


@torch.no_grad()
def test_a_layer_with_a_window_keeps_no_more_than_its_window() -> None:
    model, cache = build("gemma2", torch.float32), Cache()
    model.states(TOKENS[:40], torch.tensor([0, 40]), [cache])
    kept = [past.k.untyped_storage().nbytes() // (4 * past.k[0, :, 0].numel()) for past in cache.layers if past.k is not None]
    assert sorted(set(kept)) == [16, 64] and [layer.window for layer in model.config.layers] == [16 if n == 16 else None for n in kept]


@torch.no_grad()
def test_every_document_has_a_place_in_a_cache_and_begun_ones_go_on_by_one_token() -> None:
    model, cache = build("llama", torch.float32), Cache([[], []])
    with pytest.raises(ShapeError, match="1 documents for caches of 2; give each document a place in a cache"):
        model.states(TOKENS[:4], torch.tensor([0, 4]), [cache])
    model.states(TOKENS[:4], torch.tensor([0, 1, 4]), [cache])
    assert cache.texts == [TOKENS[:1].tolist(), TOKENS[1:4].tolist()]
    with pytest.raises(ShapeError, match="documents that were begun go on by one token each; read a new one by itself"):
        model.states(TOKENS[:4], torch.tensor([0, 1, 4]), [cache])


class Own(nn.Module):
    """A person's own: it counts up, and says how much it was given"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(len(tokens))
        return nn.functional.one_hot((tokens + 1) % 50, 50).float()


def test_any_module_that_scores_tokens_goes_on_until_a_stop_a_number_or_the_end_of_its_context() -> None:
    own = Own().train()
    assert list(generate(own, [3, 4], most=9, stops={8})) == [5, 6, 7]
    assert own.training and own.seen == [2, 3, 4, 5]
    assert list(generate(own, [3, 4], most=2, stops={8})) == [5, 6]
    decoder = Decoder(DECODERS["gpt2"].build(decoder_config(vocabulary=97, width=16, layers=1, heads=2, context=12, family="gpt2")).config)
    assert context_of(decoder) == 12 and context_of(own) == math.inf
    assert len(list(generate(decoder, [1, 2, 3], most=99, stops=()))) == 9
    assert list(generate(decoder, list(range(12)), most=99, stops=())) == []


@pytest.mark.parametrize("make", [lambda: build("qwen3", torch.float64), lambda: RNN(outputs=97, vocabulary=97, width=16, per="token")])
def test_the_best_tokens_are_those_of_reading_the_whole_text_each_time(make) -> None:
    model, ids = make(), TOKENS[:20].tolist()
    model.train()
    frozen = next(model.children()).eval()
    found = list(generate(model, ids, most=16, stops=()))
    assert model.training and not frozen.training
    for _ in range(16):
        ids.append(int(scores_at(model, [ids], [-1])[0].argmax()))
    assert found == ids[20:]
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


def test_draws_follow_the_temperature_and_stay_inside_top_k_and_the_nucleus() -> None:
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> list[float]:
        drawn = torch.tensor([draw(scores, temperature, top_k, top_p, generator) for _ in range(4000)])
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares() == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert shares(top_p=0.5) == [0, 1, 0, 0] and shares(top_k=1) == [0, 1, 0, 0] and shares(temperature=1e-300) == [0, 1, 0, 0]
    assert shares(temperature=0.5) == pytest.approx([0.0616, 0.6849, 0.0068, 0.2466], abs=0.03)


def test_equal_seeds_give_equal_texts_and_others_do_not() -> None:
    model = build("llama", torch.float32)
    first, again, other = (list(generate(model, [5, 6], most=30, stops=(), temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it is 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it is 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; it is above 0 and at most 1"),
        ({"most": 0}, "max_tokens is 0; it is 1 or more"),
        ({"ids": []}, "there is nothing to go on with; give a prompt of at least one token"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_the_model_runs(asked: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate(Own(), **{"ids": [1], "most": 5, "stops": (), **asked})
