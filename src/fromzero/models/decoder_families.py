"""Families of decoders: a published config.json in, the description of our one decoder and the map of tensor names out.

What sets a family apart is written in decoder_families.toml; only what is derived from several keys is code. A key that would
change the mathematics and that the family does not read is refused by name. Also the config.json of a model from zero.
Knows no weights. Dims as in decoder.py.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fromzero.errors import ModelError, did_you_mean
from fromzero.models.decoder import Decoder, DecoderConfig, Layer
from fromzero.models.families import Config, Family, TensorMap
from fromzero.models.layers.rotary import Rope, frequencies, stretch_llama3, stretch_yarn

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_HONOURED = {key for table in _TABLES["families"].values() for key in table["honours"]}
_FULL, _SLIDING, _CLASSIFIER = "full_attention", "sliding_attention", "ForSequenceClassification"
_IGNORED = ("*rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "lm_head.weight")  # buffers, and a tied head's copy

# One dial: the first arguments of decoder_config.
SIZES: dict[str, dict[str, int]] = {
    "decoder-1m": {"width": 128, "layers": 5, "heads": 4},  # ours: a million parameters in the blocks
    "decoder-4m": {"width": 256, "layers": 5, "heads": 8},  # ours: four million in the blocks
    "decoder-15m": {"width": 288, "layers": 6, "heads": 6},  # stories15M of github.com/karpathy/llama2.c, with its 32,000 tokens
    "decoder-42m": {"width": 512, "layers": 8, "heads": 8},  # stories42M of the same
    "decoder-124m": {"width": 768, "layers": 12, "heads": 12},  # GPT-2 small, with its 50,257 tokens
    "decoder-350m": {"width": 1024, "layers": 24, "heads": 16},  # GPT-2 medium
    "decoder-1b": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "hidden": 8192},  # Llama 3.2 1B
}


def decoder_config(
    *,
    vocabulary: int,
    width: int = 384,
    layers: int = 6,
    heads: int = 6,
    kv_heads: int | None = None,
    hidden: int | None = None,
    context: int = 1024,
    family: str = "llama",
    tied: bool = True,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """A language model from zero, as the config.json of a family, so that others open what was trained.

    hidden:   gpt2 4 D; else 8/3 D rounded up to 32 as in llama2.c: three matrices with as many parameters as two
    context:  the longest document of gpt2; elsewhere only noted
    family:   llama | gpt2 | qwen3
    raises:   ModelError for another family, or heads that do not fit
    """
    classes = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}
    if family not in classes:
        mend = did_you_mean(family, classes) or f"they are {', '.join(classes)}"
        raise ModelError(f"'{family}' is no family of models from zero", mend=mend, key="family")
    gpt2 = family == "gpt2"
    if width % heads or (width // heads % 2 and not gpt2):
        raise ModelError(f"a width of {width} does not give {heads} heads one same, even width", mend="change one of them", key="heads")
    if gpt2 and kv_heads not in (None, heads):
        raise ModelError("gpt2 has as many key/value heads as query heads", mend="leave kv_heads out, or take llama", key="kv_heads")
    plain = {"architectures": [classes[family]], "model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    plain |= {"bos_token_id": None, "eos_token_id": None, "resid_pdrop": dropout, "embd_pdrop": dropout}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": context}
    if gpt2:
        spelled = {ours: theirs for theirs, ours in _TABLES["spellings"].items() if theirs.startswith("n_")}
        rest = {"n_inner": hidden, "activation_function": "gelu_new", "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-5}
        return {**plain, **{spelled[name]: size for name, size in sizes.items()}, **rest}
    sizes |= {"num_key_value_heads": kv_heads or heads, "head_dim": width // heads}
    sizes |= {"intermediate_size": hidden or math.ceil(8 * width / 3 / 32) * 32}
    return {**plain, **sizes, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "attention_bias": False}


@dataclass(frozen=True)
class _Style:
    """One family of the tables."""

    stem: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    honours: tuple[str, ...] = ()
    prefix: str = "model."  # before all names but the head's
    interleaved: bool = False
    swapped: bool = False


class _Known(dict[str, Any]):
    """A config.json under one spelling, with the family's defaults; to ask for a key that is missing is an error."""

    def __init__(self, style: _Style, config: Config) -> None:
        given = {key: value for key, value in config.items() if value is not None}
        spelled = {ours: given[theirs] for theirs, ours in _TABLES["spellings"].items() if theirs in given}
        defaults = {"rope_theta": 1e4, "tie_word_embeddings": False, **style.defaults}
        # A null is kept where it says something: no window, no cap; a default fills only what is not there.
        super().__init__({**defaults, **config, **spelled})
        for key, harmless in _TABLES["refused"].items():
            if key not in style.honours and self.get(key) is not None and self[key] not in harmless:
                raise self.refusal(key, self[key])
        for key in _HONOURED.difference(style.honours):
            self.pop(key, None)

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"config.json has no '{key}'", mend="take the config.json that came with the weights", key=key)

    def refusal(self, key: str, value: Any, *, known: Collection[str] = ()) -> ModelError:
        mend = did_you_mean(str(value), known) or (f"these are: {', '.join(known)}" if known else "")
        return ModelError(f"{key} = {value!r} is not supported in a {self.get('model_type')} model", mend=mend, key=key)


def _describe(style: _Style, config: Config) -> DecoderConfig:
    """raises: ModelError naming the key that is missing, or that asks for mathematics that is not there"""
    known = _Known(style, config)
    width, heads, activation = known["hidden_size"], known["num_attention_heads"], known["hidden_act"]
    hidden, bias, scalar = known.get("intermediate_size"), known.get("attention_bias", False), known.get("query_pre_attn_scalar")
    if activation not in _TABLES["activations"]:
        raise known.refusal("hidden_act", activation, known=_TABLES["activations"])
    known["head_dim"] = known.get("head_dim") or width // heads
    read = {
        "vocabulary": known["vocab_size"],
        "width": width,
        "hidden": hidden or 4 * width,
        "heads": heads,
        "kv_heads": known.get("num_key_value_heads") or heads,
        "head_width": known["head_dim"],
        "context": known["max_position_embeddings"],
        "layers": _layers(style, known),
        "norm_eps": known["rms_norm_eps"],
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": known.get("mlp_bias", False),
        "activation": _TABLES["activations"][activation],
        "tied": known["tie_word_embeddings"],
        "attention_scale": scalar and scalar**-0.5,
        "attention_cap": known.get("attn_logit_softcapping"),
        "logits_cap": known.get("final_logit_softcapping"),
        "experts": known.get("num_experts") or 0,
        "experts_per_token": known.get("num_experts_per_tok", 0),
        "experts_hidden": known.get("moe_intermediate_size") or hidden or 0,
        "experts_normalised": known.get("norm_topk_prob", False),
        "dropout": known.get("resid_pdrop", 0.0),
        "embedding_dropout": known.get("embd_pdrop", 0.0),
    }
    return DecoderConfig(**{**read, **style.fixed})


def _layers(style: _Style, known: _Known) -> tuple[Layer, ...]:
    count, every = known["num_hidden_layers"], known.get("no_rope_layer_interval")
    turned = known.get("no_rope_layers") or [not every or (i + 1) % every > 0 for i in range(count)]
    first, pattern = known.get("max_window_layers", 0), known.get("sliding_window_pattern", count + 1)
    slides = [i >= first and (i + 1) % pattern > 0 and not (every and turned[i]) for i in range(count)]
    types = known.get("layer_types") or [_SLIDING if slide else _FULL for slide in slides]
    if len(types) < count or not {*types} <= {_FULL, _SLIDING}:
        raise known.refusal("layer_types", types, known=(_FULL, _SLIDING))
    window = known.get("sliding_window") if known.get("use_sliding_window", True) else None
    ropes, step, dense = _ropes(style, known), known.get("decoder_sparse_step", 1), known.get("mlp_only_layers") or ()
    return tuple(
        Layer(
            window=window if types[i] == _SLIDING else None,
            rope=ropes[types[i]] if turned[i] else None,
            experts=bool(known.get("num_experts")) and i not in dense and (i + 1) % step == 0,
        )
        for i in range(count)
    )


def _ropes(style: _Style, known: _Known) -> dict[str, Rope | None]:
    """The rope of each type of layer: one for both, but in Gemma 3."""
    if style.fixed.get("learned_positions"):
        return {_FULL: None, _SLIDING: None}
    given = known.get("rope_scaling") or known.get("rope_parameters") or {}
    if "rope_local_base_freq" not in style.honours:
        return dict.fromkeys((_FULL, _SLIDING), _rope(style, known, given, known["rope_theta"]))
    far = given.get(_FULL, {}) if _FULL in given or _SLIDING in given else given
    near = _rope(style, known, given.get(_SLIDING, {}), known["rope_local_base_freq"])
    return {_FULL: _rope(style, known, far, known["rope_theta"]), _SLIDING: near}


def _rope(style: _Style, known: _Known, given: Mapping[str, Any], base: float) -> Rope:
    """given: a `rope_scaling` as transformers 4 writes it, or a `rope_parameters` as transformers 5 does"""
    values: dict[str, Any] = {"rope_theta": base, "partial_rotary_factor": known.get("partial_rotary_factor") or 1}
    values |= {key: value for key, value in given.items() if value is not None}
    kinds = _TABLES["rope"]
    kind = values.get("rope_type") or values.get("type", "default")
    kind = "longrope" if "short_factor" in values else kind  # Phi-3's older names of it: su, yarn
    if kind not in kinds:
        raise known.refusal("rope_type", kind, known=kinds)
    strange = {*values} - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}.union(*kinds.values())
    if values["partial_rotary_factor"] != 1 and "partial_rotary_factor" not in style.honours:
        strange.add("partial_rotary_factor")
    for key in sorted(strange):
        raise known.refusal(key, values[key])
    absent = [key for key in kinds[kind] if key.endswith(("freq_factor", "short_factor", "long_factor")) and key not in values]
    if absent:
        raise ModelError(f"a rope of type {kind} has no '{absent[0]}'", key=absent[0])
    base, longest = values["rope_theta"], known["max_position_embeddings"]
    context = known.get("original_max_position_embeddings") or values.get("original_max_position_embeddings", longest)
    factor = values.get("factor", longest / context)
    plain, far = frequencies(base, int(known["head_dim"] * values["partial_rotary_factor"])), ()
    if kind == "linear":
        plain = tuple(f / factor for f in plain)
    elif kind == "llama3":
        slow, fast = values["low_freq_factor"], values["high_freq_factor"]
        plain = stretch_llama3(plain, factor=factor, slow=slow, fast=fast, context=context)
    elif kind == "yarn":
        slow, fast, whole = values.get("beta_slow", 1), values.get("beta_fast", 32), values.get("truncate", True)
        plain = stretch_yarn(plain, base=base, factor=factor, slow=slow, fast=fast, context=context, whole=whole)
    elif kind == "longrope":
        for key in ("short_factor", "long_factor"):
            if len(values[key]) != len(plain):
                raise ModelError(f"{key} has {len(values[key])} numbers for {len(plain)} turned pairs", key=key)
        plain, far = (tuple(f / s for f, s in zip(plain, values[key], strict=True)) for key in ("short_factor", "long_factor"))
    return Rope(plain, style.interleaved, _magnitude(kind, values, factor, context), far, context if far else 0)


def _magnitude(kind: str, values: Mapping[str, Any], factor: float, context: int) -> float:
    """By what cosines and sines are multiplied.  source: YaRN, arXiv:2309.00071 section 3.4; LongRoPE as in Phi-3's published code"""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in values or factor <= 1:
        return float(values.get("attention_factor", 1.0))
    grown = math.log(factor)
    if kind == "longrope":
        return math.sqrt(1 + grown / math.log(context))
    above, below = values.get("mscale"), values.get("mscale_all_dim")
    above, below = (above, below) if above and below else (1, 0)
    return float((0.1 * above * grown + 1) / (0.1 * below * grown + 1))


def _class(config: Config) -> str:
    return str((config.get("architectures") or [""])[0])


def _build(style: _Style, config: Config, *, outputs: int | None = None, dropout: float | None = None) -> Decoder:
    """outputs: scores a document; None is what config.json says: a language model, or a published classifier with its labels.
    dropout: None is what config.json says"""
    if outputs is None and _class(config).endswith(_CLASSIFIER):
        outputs = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    description = _describe(style, config)
    return Decoder(description if dropout is None else replace(description, dropout=dropout, embedding_dropout=dropout), outputs)


def _written(style: _Style, config: Config, *, outputs: int | None = None, **options: Any) -> dict[str, Any]:
    """The config.json beside a model built with these options: with outputs it is transformers' classifier of the family."""
    if outputs is None:
        return dict(config)
    labels = config.get("id2label") or {}
    if len(labels) != outputs:
        labels = {str(index): f"LABEL_{index}" for index in range(outputs)}
    numbers = {label: int(index) for index, label in labels.items()}
    return {**config, "architectures": [style.stem + _CLASSIFIER], "id2label": labels, "label2id": numbers}


def _names(style: _Style, config: Config, present: Collection[str]) -> TensorMap:
    """A module on the meta device says which tensors there are, the style what they are called."""
    description, kind = _describe(style, config), _class(config)
    bare, scored = kind.endswith("Model") and "LMHead" not in kind, kind.endswith(_CLASSIFIER)
    if present:
        bare, scored = not any(name.startswith(style.prefix) for name in present), "score.weight" in present
    head, prefix = "score" if scored else "lm_head", "" if bare else style.prefix
    with torch.device("meta"):
        tensors = Decoder(description, 1 if scored else None).state_dict()
    queries, keys = (heads * description.head_width for heads in (description.heads, description.kv_heads))
    found: TensorMap = {}
    for ours, tensor in tensors.items():
        place, inner, inside = prefix, ours, ours.startswith("blocks.")
        if inside:
            _, number, inner = ours.split(".", 2)
            place = f"{prefix}{style.names['blocks']}.{number}."
        module, _, leaf = inner.rpartition(".")
        if module == "head":
            theirs = f"{head}.{leaf}"
            if theirs in present or not (present or bare):
                found[ours] = ((theirs,), "same", ())
        elif inner in style.names:
            found[ours] = (tuple(place + style.names[inner].format(e) for e in range(len(tensor))), "stack", ())
        else:
            parts = tuple(f"{place}{name}.{leaf}" for name in style.names[module].split())
            sizes = {1: (), 2: (len(tensor) // 2,) * 2, 3: (queries, keys, keys)}[len(parts)]
            how = "transpose" if style.swapped and inside and tensor.dim() == 2 else "same"
            found[ours] = (parts, "cat" if sizes else how, sizes)
    return found


_STYLES = {
    name: _Style(**{**table, "names": {**_TABLES["names"], **table.get("names", {})}}) for name, table in _TABLES["families"].items()
}
DECODERS: dict[str, Family] = {
    name: Family(partial(_build, style), partial(_names, style), ignored=_IGNORED, speaks=True, written=partial(_written, style))
    for name, style in _STYLES.items()
}
