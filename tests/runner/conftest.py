"""A model that converses, small enough to train in a second: a Llama of transformers with a tokenizer and a chat template of its own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fromzero.data import tokens as tk

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "stone",
    "river",
    "cloud",
    "seven",
    "eight",
    "nine",
    "quick",
    "slow",
    "bright",
    "the",
    "a",
    "of",
    "and",
    "to",
]


@pytest.fixture
def speaker(tmp_path: Path) -> Path:
    """A folder as transformers saves it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tk.byte_pairs([" ".join(WORDS) * 3, "system user assistant\n"], 320))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path / "speaker"
    end = tokenizer.token_to_id("<|im_end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """60 conversations of different length, some with two turns."""
    draw = torch.Generator().manual_seed(1)
    path = tmp_path / "chats.jsonl"

    def some(most: int) -> str:
        count = int(torch.randint(1, most, (), generator=draw))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=draw))

    with path.open("w") as file:
        for number in range(60):
            messages = []
            for _ in range(1 + number % 3 // 2):
                messages += [{"role": "user", "content": some(12)}, {"role": "assistant", "content": some(20)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
