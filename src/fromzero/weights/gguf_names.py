"""What a GGUF file says in, the same in the field's terms out: a config.json and tensors under Hugging Face's names.

The words are in gguf_names.toml. Three layouts differ and are turned back: llama's query and key rows lie in pairs for
interleaved rotary positions (here: halves), GPT-2's matrices lie transposed, and llama 3's rotary scaling lies there as
a tensor of factors.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromzero.errors import SourceError
from fromzero.weights.tensors import Shapes, Tensors

_WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROTARY_FACTORS = "rope_freqs.weight"
ARCHITECTURES = tuple(_WORDS["architectures"])


def gguf_config(meta: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """raises: SourceError for an architecture that is not read, or a file that does not say what it needs"""
    kind, shapes = str(meta.get("general.architecture")), tensors.shapes
    if kind not in _WORDS["architectures"] or meta.get(f"{kind}.expert_count"):
        mend = f"read are {', '.join(_WORDS['architectures'])}, without experts; or name the model's safetensors"
        raise SourceError(f"is of the architecture '{kind[:40]}', which is not read from GGUF", mend=mend, file=tensors.file)
    config: dict[str, Any] = {"model_type": kind, **_WORDS["architectures"][kind]}
    for key, ours in _WORDS["gpt2" if kind == "gpt2" else "decoder"].items():
        if (value := meta.get(f"{kind}.{key}")) is not None:
            config[ours] = value
            if type(value) not in (int, float) or not 0 <= value < 2**31:
                raise SourceError(f"has {str(value)[:40]} where one number is needed", file=tensors.file, key=f"{kind}.{key}")
    needed = ("n_embd", "n_layer", "n_head") if kind == "gpt2" else ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if any(type(config.get(key)) is not int or not config[key] for key in needed) or len(shapes.get("token_embd.weight", ())) != 2:
        raise SourceError(f"does not say {', '.join(needed)}, or has no matrix token_embd.weight", file=tensors.file)
    if config[needed[1]] > len(shapes):
        raise SourceError(f"promises {config[needed[1]]} blocks, and has {len(shapes)} tensors", file=tensors.file)
    config |= {"vocab_size": shapes["token_embd.weight"][0], "tie_word_embeddings": "output.weight" not in shapes}
    config |= {"attention_bias": True} if kind != "qwen2" and "blk.0.attn_q.bias" in shapes else {}  # qwen2 always has it
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if type(number := meta.get(f"tokenizer.ggml.{theirs}_token_id")) is int:
            config[f"{name}_token_id"] = number
    if kind != "gpt2":
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config |= _rotary(meta, tensors, kind, config)
    return config


def _rotary(meta: Mapping[str, Any], tensors: Tensors, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What is special in the rotary positions: a part of the head that is turned, a scaling"""
    width = config["head_dim"]
    turned = meta.get(f"{kind}.rope.dimension_count", width)
    if type(turned) is not int or not 0 < turned <= width:
        raise SourceError(f"turns {str(turned)[:40]} numbers of a head of {width}", file=tensors.file, key=f"{kind}.rope.dimension_count")
    found: dict[str, Any] = {} if turned == width else {"partial_rotary_factor": turned / width}
    if (scaling := meta.get(f"{kind}.rope.scaling.type", "none")) != "none":
        found["rope_scaling"] = {"rope_type": scaling, "factor": meta.get(f"{kind}.rope.scaling.factor", 1.0)}
        if (original := meta.get(f"{kind}.rope.scaling.original_context_length")) is not None:
            found["rope_scaling"]["original_max_position_embeddings"] = original
    if ROTARY_FACTORS in tensors:
        factors = tensors[ROTARY_FACTORS].float()
        factor = float(factors.max())
        if not torch.allclose(factors, _llama3_factors(len(factors), config.get("rope_theta", 1e4), factor), rtol=1e-4):
            raise SourceError("has factors of rotary positions that are not llama 3's", file=tensors.file, key=ROTARY_FACTORS)
        found["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    return found


def _llama3_factors(count: int, theta: float, factor: float) -> Tensor:
    """By how much llama 3 divides each frequency: high ones not, low ones by `factor`, those between smoothly.

    source: the rope type `llama3` of transformers, whose result the converter writes into the file
    """
    turns = _LLAMA3["original_max_position_embeddings"] / (2 * math.pi) * theta ** (-torch.arange(count) / count)  # within that context
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def gguf_tensors(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The same tensors under the names and in the layout that the field uses.  raises: SourceError naming one without a place"""
    kind = config["model_type"]
    words = _tensor_words(kind)
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config.get("num_key_value_heads") or config.get("num_attention_heads")}
    theirs: dict[str, tuple[str, Any]] = {}  # name, what is done with it: nothing, "T", or a number of heads
    shapes: Shapes = {}
    for name, shape in tensors.shapes.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(\.weight|\.bias)", name)
        stem = words.get(f"blk.N.{match[2]}" if match[1] else match[2]) if match else None
        if match is None or stem is None:
            if name == ROTARY_FACTORS:
                continue
            raise SourceError(f"has a tensor that {kind} has no place for", file=tensors.file, key=name)
        change = heads.get(match[2]) if kind == "llama" else "T" if kind == "gpt2" and match[1] and len(shape) == 2 else None
        if isinstance(change, int) and (not shape or shape[0] % (2 * change)):
            raise SourceError(f"has shape {shape}, which is not {change} heads of pairs", file=tensors.file, key=name)
        ours = stem.replace(".N.", f".{match[1]}.") + match[3]
        theirs[ours], shapes[ours] = (name, change), shape[::-1] if change == "T" else shape

    def read(ours: str) -> Tensor:
        name, change = theirs[ours]
        if change is None:
            return tensors[name]
        return tensors[name].T.contiguous() if change == "T" else _halves(tensors[name], change)

    return Tensors(tensors.file, shapes, read)


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """(heads · K, …), the two numbers that turn together in neighbouring rows → all first ones of a head, then all second ones"""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def to_gguf(tensors: Mapping[str, Tensor], kind: str, heads: tuple[int, int]) -> dict[str, tuple[Tensor, int | str | None]]:
    """The way back: published tensors under GGUF's names, each with what is still to be done by `laid_out` when it is written.

    heads:   of queries and of keys, whose rows llama has in pairs
    raises:  SourceError naming a tensor that the architecture has no word for
    """
    words = {theirs: ours for ours, theirs in _tensor_words(kind).items()}
    found: dict[str, tuple[Tensor, int | str | None]] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        number = re.search(r"\.(\d+)\.", stem)
        word = words.get(stem.replace(number[0], ".N.", 1) if number else stem)
        if word is None:
            raise SourceError("has no word in GGUF", why=f"{kind} has none in the table gguf_names.toml", key=name)
        change: int | str | None = None
        if kind == "llama" and word.endswith(("attn_q", "attn_k")):
            change = heads[word.endswith("attn_k")]
        elif kind == "gpt2" and number and tensor.dim() == 2:
            change = "T"
        found[f"{word.replace('.N.', f'.{number[1]}.') if number else word}.{leaf}"] = (tensor, change)
    return found


def laid_out(tensor: Tensor, change: int | str | None) -> Tensor:
    """change: as to_gguf says"""
    if change is None:
        return tensor
    if isinstance(change, str):
        return tensor.T.contiguous()
    return tensor.reshape(change, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _tensor_words(kind: str) -> dict[str, str]:
    found: dict[str, str] = _WORDS["gpt2_tensors"] if kind == "gpt2" else _WORDS["decoder_tensors"] | _WORDS.get(f"{kind}_tensors", {})
    return found
