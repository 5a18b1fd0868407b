"""SmolLM2-135M-Instruct from its quantised GGUF: it says Paris, and reads English as its rotary layout was meant."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.weights import Pretrained, open_pretrained

PARAGRAPH = (
    "The old lighthouse stood at the end of the harbour, where the fishermen had tied up their boats for the night. "
    "Every evening the keeper climbed the stairs, lit the lamp, and wrote down the weather in a small book."
)
RIGHT, WRONG = 20.35, 72.92  # perplexity of the paragraph; WRONG with query and key rows left in the order of the file


@pytest.fixture(scope="module")
def published(asset: Callable[[str], Path]) -> Pretrained:
    return open_pretrained(str(asset("smollm2-135m-instruct")))


@pytest.fixture(scope="module")
def model(published: Pretrained) -> nn.Module:
    return fz.load("smollm2-135m-instruct")


def scores(model: nn.Module, documents: Sequence[Sequence[int]]) -> Tensor:
    offsets = torch.tensor([0, *(len(ids) for ids in documents)]).cumsum(0)
    with torch.no_grad():
        return model(torch.tensor([token for ids in documents for token in ids]), offsets)


def perplexity(model: nn.Module, ids: Sequence[int]) -> float:
    return float(nn.functional.cross_entropy(scores(model, [ids])[:-1], torch.tensor(ids[1:])).exp())


def test_the_capital_of_france_is_paris_also_beside_another_document(published: Pretrained, model: nn.Module) -> None:
    ids, other = tk.encode(published.tokenizer, ["The capital of France is", PARAGRAPH], special=False)
    logits = scores(model, [other, ids])
    assert tk.decode(published.tokenizer, [int(logits[-1].argmax())]) == " Paris"
    torch.testing.assert_close(logits[len(other) :], scores(model, [ids]), rtol=1e-4, atol=1e-4)


def test_the_perplexity_of_a_paragraph_is_that_of_the_right_rotary_layout(published: Pretrained, model: nn.Module) -> None:
    (ids,) = tk.encode(published.tokenizer, [PARAGRAPH], special=False)
    assert len(ids) == 45 and perplexity(model, ids) == pytest.approx(RIGHT, rel=1e-3)
    heads, groups = published.config["num_attention_heads"], published.config["num_key_value_heads"]
    width = published.config["hidden_size"] // heads
    weights = [block.attention.qkv.weight for block in model.blocks]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                queries, keys, values = weight.split([heads * width, groups * width, groups * width])
                weight.copy_(torch.cat([as_in_the_file(queries, heads), as_in_the_file(keys, groups), values]))
        assert perplexity(model, ids) == pytest.approx(WRONG, rel=1e-3)
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def as_in_the_file(weight: Tensor, heads: int) -> Tensor:
    """Halves back to pairs: the order of rows in which the file holds them"""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.slow
def test_every_score_equals_that_of_transformers_own_reading_of_the_file(published: Pretrained, model: nn.Module, asset) -> None:
    import transformers

    path = asset("smollm2-135m-instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    (ids,) = tk.encode(published.tokenizer, [PARAGRAPH], special=False)
    with torch.no_grad():
        torch.testing.assert_close(scores(model, [ids]), theirs(torch.tensor([ids])).logits[0], rtol=1e-3, atol=1e-3)
