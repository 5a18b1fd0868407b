"""The tokenizer that a GGUF file describes in, the text of a tokenizer.json and the special tokens out.

Only what can be made exactly as it was trained with is made: byte-level BPE with a known way of cutting text, and
sentencepiece's BPE. Of any other the reason is said, and the weights can be used without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fromzero.errors import ModelError

# How text is cut before merging, one expression by name (llama.cpp, llama-vocab.cpp); an empty one is GPT-2's own.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", ""), "smollm": "", "gpt-2": "", "default": ""}
MOST_PIECE = 256  # characters: every way of cutting a piece in two is looked at
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens


def gguf_special(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by name, and whether they are added to a text, as a tokenizer_config.json says it."""
    tokens = meta.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found: dict[str, Any] = {}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = meta.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found[f"{name}_token"] = str(tokens[number])
    usual = meta.get("tokenizer.ggml.model") == "llama" or meta.get("tokenizer.ggml.pre") == "llama-bpe"
    found["add_bos_token"] = bool(meta.get("tokenizer.ggml.add_bos_token", usual))
    found["add_eos_token"] = bool(meta.get("tokenizer.ggml.add_eos_token", False))
    return found


def gguf_tokenizer(meta: Mapping[str, Any]) -> tuple[str | None, str]:
    """(tokenizer.json, ""), or (None, why it cannot be made)"""
    tokens, kinds = (meta.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    model, cut = (str(meta.get(f"tokenizer.ggml.{key}", usual)) for key, usual in (("model", "none"), ("pre", "default")))
    if model not in ("gpt2", "llama") or (model == "gpt2" and cut not in _CUTS):
        return None, f"its kind of tokenizer is not known ({model[:40]}, {cut[:40]})"
    special = gguf_special(meta)
    try:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            return None, "a token stands twice in it"
        made = _byte_level(meta, vocabulary, cut) if model == "gpt2" else _sentencepiece(meta, vocabulary, kinds)
        added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (_UNKNOWN, _CONTROL, _USER)]
        made.add_tokens([AddedToken(token, special=kind != _USER, normalized=False) for token, kind in added])
        first, last = (special[f"{end}_token"] if special[f"add_{end}_token"] else "" for end in ("bos", "eos"))
        if first or last:
            ends = [(token, vocabulary[token]) for token in {first, last} - {""}]
            made.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}".strip(), special_tokens=ends)
    except Exception as error:  # tokenizers has no class of its own for parts that do not fit together
        return None, f"its parts do not fit together ({type(error).__name__}: {str(error)[:100]})"
    return made.to_str(), ""


def _byte_level(meta: Mapping[str, Any], vocabulary: dict[str, int], cut: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
    steps: list[Any] = [pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated")] if _CUTS[cut] else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not _CUTS[cut])])
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(meta: Mapping[str, Any], vocabulary: dict[str, int], kinds: Sequence[int]) -> Tokenizer:
    """Sentencepiece keeps no merges: any two neighbours whose union is a token are merged, the best score first."""
    scores, space = meta["tokenizer.ggml.scores"], bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    plain = [token for token, number in vocabulary.items() if kinds[number] == _NORMAL]
    if max(map(len, plain)) > MOST_PIECE:
        raise ValueError(f"a token has more than {MOST_PIECE} characters")
    pairs = [(token[:at], token[at:]) for token in plain for at in range(1, len(token))]
    merges = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
    merges.sort(key=lambda pair: -scores[vocabulary[pair[0] + pair[1]]])
    unknown = next((token for token, number in vocabulary.items() if kinds[number] == _UNKNOWN), None)
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * space + [normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * space
    made.decoder = decoders.Sequence(steps)
    return made


def tokenizer_to_gguf(tokenizer: str, rows: int, ids: Mapping[str, int], ends: tuple[bool, bool], texts: Sequence[str]) -> dict[str, Any]:
    """The way back: the metadata for a tokenizer.json, with which a reader cuts these texts into the same tokens.

    rows:    of the embedding; those without a token get one that is never used
    ids:     bos, eos, eot, unknown, padding as far as there are such
    ends:    whether bos and eos are put around a text
    raises:  ModelError where no kind of tokenizer that GGUF names does the same
    """
    parts, made = json.loads(tokenizer), Tokenizer.from_str(tokenizer)
    names, added = made.get_vocab(with_added_tokens=True), made.get_added_tokens_decoder()
    tokens = [f"[PAD{number}]" for number in range(max(rows, *(number + 1 for number in names.values())))]
    kinds = [_UNUSED] * len(tokens)
    for token, number in names.items():
        tokens[number], kinds[number] = token, _NORMAL
    for number, one in added.items():
        kinds[number] = _CONTROL if one.special else _USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"].get("merges") or ()]
    shared: dict[str, Any] = {f"{name}_token_id": number for name, number in ids.items()}
    shared |= {f"add_{end}_token": added for end, added in zip(("bos", "eos"), ends, strict=True)}
    wanted = [one.ids for one in made.encode_batch_fast([*texts], add_special_tokens=False)]
    for model, cut in (*(("gpt2", cut) for cut in ("gpt-2", "smollm", "llama-bpe", "qwen2")), ("llama", "default")):
        described = {"model": model, "pre": cut, "tokens": tokens, "token_type": kinds, **shared}
        described |= {"merges": merges} if model == "gpt2" else _scored(tokens, kinds, merges, '"Prepend"' in tokenizer)
        meta = {f"tokenizer.ggml.{key}": value for key, value in described.items() if value != []}
        again = gguf_tokenizer(meta)[0] if merges else None
        if again and [one.ids for one in Tokenizer.from_str(again).encode_batch_fast([*texts], add_special_tokens=False)] == wanted:
            return meta
    raise ModelError(
        "its tokenizer is of no kind that GGUF names",
        why=f"of {parts['model'].get('type')} and {(parts.get('pre_tokenizer') or {}).get('type')} nothing there makes the same tokens",
        mend="byte-level BPE that cuts text as GPT-2, SmolLM, Llama 3 or Qwen 2 do it, and sentencepiece's BPE can be written",
    )


def _scored(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str], space: bool) -> dict[str, Any]:
    """Sentencepiece keeps no merges: what is merged earlier has a better score."""
    ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges, start=1)))}
    byte = [_BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else kind for token, kind in zip(tokens, kinds, strict=True)]
    return {"scores": [ranks.get(token, 0.0) for token in tokens], "token_type": byte, "add_space_prefix": space}
