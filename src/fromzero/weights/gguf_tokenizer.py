"""The tokenizer that a GGUF file describes in, the text of a tokenizer.json and the special tokens out.

Only what can be made exactly as it was trained with is made: byte-level BPE with a known way of cutting text, and
sentencepiece's BPE. Of any other the reason is said, and the weights can be used without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# How text is cut before merging, one expression by name (llama.cpp, llama-vocab.cpp); an empty one is GPT-2's own.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", ""), "smollm": "", "gpt-2": "", "default": ""}
MOST_PIECE = 256  # characters: every way of cutting a piece in two is looked at
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # kinds of tokens


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
