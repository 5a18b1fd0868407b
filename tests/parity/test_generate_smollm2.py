"""SmolLM2-135M-Instruct goes on with texts as transformers' generate does, token by token, in float32: alone, and together."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.models.decoder_families import DECODERS
from fromzero.models.generate import generate
from fromzero.models.together import Batch, Sampling
from fromzero.weights import Pretrained, open_pretrained, to_theirs

PROMPTS = [  # of 1 to 355 tokens
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\n",
    "The three primary colours are",
    "In 1969,",
    "Roses are red,",
    "To bake bread you need flour,",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "Photosynthesis is the process by which",
    "La capitale de l'Allemagne est",
    "SELECT name FROM",
    "The opposite of hot is",
    "A triangle has",
    "Q: Who wrote Hamlet?\nA:",
    "import numpy as np\n",
    "The old lighthouse stood at the end of the harbour, where the fishermen had tied up their boats for the night. Every evening",
    "E",
]
PROMPTS[3] = "".join(f"Step {i}: weigh {7 * i % 60} g of flour and {3 * i % 11} eggs.\n" for i in range(1, 21)) + "Step 21:"
PROMPTS[9] = "<|im_start|>system\nBe brief.<|im_end|>\n" + "".join(
    f"<|im_start|>user\nWhat is {i} times {i + 1}?<|im_end|>\n<|im_start|>assistant\n{i * (i + 1)}<|im_end|>\n" for i in range(2, 7)
)
PROMPTS[15] = "To be, or not to be, that is the question. " * 10


@pytest.fixture(scope="module")
def published(asset: Callable[[str], Path]) -> Pretrained:
    return open_pretrained(str(asset("smollm2-135m-instruct")))


@pytest.fixture(scope="module")
def ours(published: Pretrained) -> nn.Module:
    return fz.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def theirs(published: Pretrained, ours: nn.Module) -> LlamaForCausalLM:
    """The same weights, in transformers' own model"""
    tensors = to_theirs(ours.state_dict(), DECODERS["llama"].names(published.config, ()))
    model, notes = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig(**published.config), state_dict=tensors, output_loading_info=True
    )
    assert not any(notes.values())
    return model.eval()


def theirs_go_on(model: LlamaForCausalLM, ids: list[int], most: int) -> list[int]:
    settings = {"max_new_tokens": most, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **settings)[
            0, len(ids) :
        ].tolist()


def compare(count: int, most: int, published: Pretrained, ours: nn.Module, theirs: LlamaForCausalLM) -> None:
    prompts = tk.encode(published.tokenizer, PROMPTS[:count], special=False)
    assert len(prompts) == count and len({len(ids) for ids in prompts}) >= min(count, 10)
    expected = [theirs_go_on(theirs, ids, most) for ids in prompts]
    batch = Batch(ours, ())
    numbers = [batch.add(ids, Sampling(most=most)) for ids in prompts]
    made = [one for _ in range(most) for one in batch.step()]
    ways = {
        "alone": [list(generate(ours, ids, most=most, stops=())) for ids in prompts],
        "together": [[one.token for one in made if one.number == number] for number in numbers],
    }
    assert len(batch) == 0 and all(len(one) == most for one in expected)
    for way, texts in ways.items():
        differing = [told_apart(theirs, *three) for three in zip(prompts, expected, texts, strict=True) if three[1] != three[2]]
        assert not differing, f"{way}: {count - len(differing)} of {count} are the same; " + "; ".join(differing)


def told_apart(model: LlamaForCausalLM, prompt: list[int], expected: list[int], made: list[int]) -> str:
    """Where they part, and how near transformers' two best logits are to each other there: further than rounding is a fault"""
    at = next((i for i, pair in enumerate(zip(expected, made, strict=False)) if pair[0] != pair[1]), min(len(expected), len(made)))
    with torch.no_grad():
        best = model(torch.tensor([[*prompt, *expected[:at]]])).logits[0, -1].topk(2)
    return f"{made[at : at + 1]} after {at} tokens of {prompt[:8]}…, where theirs has {list(zip(*(x.tolist() for x in best), strict=True))}"


def test_three_greedy_texts_are_those_of_transformers(published: Pretrained, ours: nn.Module, theirs: LlamaForCausalLM) -> None:
    compare(3, 6, published, ours, theirs)


@pytest.mark.slow
def test_twenty_greedy_texts_are_those_of_transformers(published: Pretrained, ours: nn.Module, theirs: LlamaForCausalLM) -> None:
    assert len(set(PROMPTS)) == 20
    compare(20, 32, published, ours, theirs)
