"""A small chat model as others publish one: it has learned three answers by heart, in a template whose end no card of it names."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from torch.nn.functional import cross_entropy

from fromzero.data import tokens as tk
from fromzero.data.turns import ChatFormat, Conversation, encode_conversations
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.weights import to_theirs, write_folder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRANCE, JAPAN, SKY = "What is the capital of France?", "And of Japan?", "Which colour is the sky?"
PARIS, TOKYO, BLUE = "Paris, déjà vu 🎉!", "東京, naïvely.", "It is blue."
CONTEXT = 160


def turns(*said: str, system: str = "") -> list[dict[str, str]]:
    told = [{"role": "system", "content": system}] if system else []
    return [*told, *({"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said))]


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than models of this size"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def talker(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    learned = [turns(FRANCE, PARIS, JAPAN, TOKYO), turns(SKY, BLUE), turns(FRANCE, PARIS, system="Be brief.")]
    made = Tokenizer.from_str(tk.byte_pairs([message["content"] for one in learned for message in one], 290))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer = made.to_str()
    form = ChatFormat(tokenizer, TEMPLATE, {}, (0,))
    encoded = encode_conversations(form, [Conversation(tuple(one), "") for one in learned])
    ids = [torch.tensor(one.ids) for one in encoded]  # type: ignore[union-attr]
    offsets = torch.tensor([0, *(len(one) - 1 for one in ids)]).cumsum(0)
    inputs, targets = torch.cat([one[:-1] for one in ids]), torch.cat([one[1:] for one in ids])
    config = decoder_config(vocabulary=tk.vocabulary_size(tokenizer), width=48, layers=2, heads=4, context=CONTEXT)
    torch.manual_seed(0)
    model = DECODERS["llama"].build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = cross_entropy(model(inputs, offsets), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    folder = tmp_path_factory.mktemp("models") / "talker"
    tensors = to_theirs(model.state_dict(), DECODERS["llama"].names(config, ()))
    write_folder(folder, config, tensors, tokenizer=tokenizer, special={"eos_token": tk.END}, chat_template=TEMPLATE)
    return folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
