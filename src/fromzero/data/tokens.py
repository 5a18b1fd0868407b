"""Tokens: text in, token ids out, and back; by a tokenizer.json, which travels with the model. Knows no model.

A tokenizer comes with a pretrained model, from a file, or is made here from the training texts: one token a character,
or byte-level BPE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fromzero.errors import DataError

_LONG_RUN = re.compile(r"\S{512}")  # the library needs the square of a word's length to learn from it: a megabyte of digits, an hour
UNKNOWN = "<unk>"
END = "<|endoftext|>"
# What published tokenizers call the token that ends a document, the likeliest first
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>", "[EOS]")


@lru_cache(maxsize=8)
def _read(text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"is no tokenizer.json ({str(error)[:120]})", key="data.tokenizer") from None
    tokenizer.no_padding()  # published files pad and cut to lengths of their own; neither is wanted unasked
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: str, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text.  special: with the tokens that the tokenizer puts around a text, such as [CLS] and [SEP]"""
    encoded = _read(tokenizer).encode_batch_fast(list(texts), add_special_tokens=special)
    return [one.ids for one in encoded]


def frame(tokenizer: str) -> tuple[list[int], list[int]]:
    """The ids that stand before and after every text."""
    plain, framed = (encode(tokenizer, ["a"], special=special)[0] for special in (False, True))
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return framed[:start], framed[start + len(plain) :]


def decode(tokenizer: str, ids: Sequence[int]) -> str:
    """The text of some ids, special tokens included."""
    return str(_read(tokenizer).decode(list(ids), skip_special_tokens=False))


def pieces(tokenizer: str, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself."""
    return [decode(tokenizer, [token]) for token in ids]


def vocabulary_size(tokenizer: str) -> int:
    """One more than the largest id, which is what an embedding needs."""
    return max(_read(tokenizer).get_vocab(with_added_tokens=True).values(), default=-1) + 1


def unknown_id(tokenizer: str) -> int | None:
    """The id that stands for what the tokenizer has no token for; None if everything has one."""
    name = json.loads(tokenizer)["model"].get("unk_token")
    return None if name is None else _read(tokenizer).token_to_id(name)


def end_id(tokenizer: str) -> int | None:
    """The id that ends a document; None if there is none."""
    return next((token for name in ENDS if (token := _read(tokenizer).token_to_id(name)) is not None), None)


def byte_length(tokenizer: str, token: int) -> int:
    """UTF-8 bytes of a token's text; a byte-level token may be part of a character and is written one letter a byte."""
    text = decode(tokenizer, [token])
    return len((_read(tokenizer).id_to_token(token) or "") if "\ufffd" in text else text.encode())


def add_tokens(tokenizer: str, texts: Sequence[str]) -> str:
    """A tokenizer that takes each of these texts for one token wherever it stands; a text that is a token already stays that token."""
    made = Tokenizer.from_str(_read(tokenizer).to_str())  # the one that is kept for others stays as it is
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return str(made.to_str())


def characters(texts: Iterable[str], *, end: bool = False) -> str:
    """A tokenizer with one token for each character of some texts, and one for any other.  end: and one that ends a document"""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    vocabulary = {UNKNOWN: 0, **{character: i + 1 for i, character in enumerate(sorted(seen))}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END] * end)
    return str(tokenizer.to_str())


def byte_pairs(texts: Iterable[str], vocabulary: int) -> str:
    """Byte-level BPE learned from some texts: no text is unknown to it.

    source: arXiv:1508.07909; over bytes as in the GPT-2 report, section 2.2
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _without_long_runs(text)), trainer)
    return str(tokenizer.to_str())


def _without_long_runs(text: str) -> Iterator[str]:
    """A text in pieces, cut where nothing else breaks it."""
    begin = 0
    for run in _LONG_RUN.finditer(text):
        yield text[begin : run.end()]
        begin = run.end()
    yield text[begin:]


@lru_cache(maxsize=8)
def _bare(text: str) -> Tokenizer:
    """Without its last stage, which cuts white space off the spans."""
    return _read(json.dumps({**json.loads(text), "post_processor": None}))


def encode_spans(tokenizer: str, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each text as it stands, and the characters (begin, end) that each token covers, in full or in part."""
    return [(one.ids, one.offsets) for one in _bare(tokenizer).encode_batch(list(texts), add_special_tokens=False)]


def special_tokens(tokenizer: str) -> dict[str, bool]:
    """The texts that become one token wherever they stand, and whether the tokenizer calls them special."""
    return {token.content: token.special for token in _read(tokenizer).get_added_tokens_decoder().values()}


def texts_of(tokenizer: str, ids: Sequence[int]) -> set[str]:
    """How some tokens are written in the tokenizer's own vocabulary."""
    return {text for text in map(_read(tokenizer).id_to_token, ids) if text is not None}
