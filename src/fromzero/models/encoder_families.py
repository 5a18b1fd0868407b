"""Families of encoders: a published config.json in, its EncoderConfig and the published name of every tensor out.

What sets bert (MiniLM too), roberta, xlm-roberta, distilbert and modernbert apart is written in encoder_names.toml; only what
one family derives from several keys is code. Also the config.json of an encoder trained from zero. Knows no weights.
A map names all that a file holds of a body, a pooler and a head; a model without pooler or head takes the entries that it has.
Token type 0 is added to every token, so classifiers of pairs of texts (type 1 for the second) are not for these.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fromzero.errors import ModelError
from fromzero.models.encoder import ACTIVATIONS, Encoder, EncoderConfig
from fromzero.models.families import Config, Family, TensorMap

# One dial; parameters with BERT's 30,522 tokens and 512 positions.
SIZES: dict[str, dict[str, int]] = {
    "encoder-4m": {"width": 128, "layers": 2, "heads": 2, "hidden": 512},  # BERT-Tiny, arXiv:1908.08962
    "encoder-14m": {"width": 312, "layers": 4, "heads": 12, "hidden": 1200},  # TinyBERT-4, arXiv:1909.10351 section 4.1
    "encoder-110m": {"width": 768, "layers": 12, "heads": 12, "hidden": 3072},  # BERT-base, arXiv:1810.04805 section 3
}
_OURS = "fromzero"  # a key in config.json for what published ones cannot say
_CLASSIFIER = "ForSequenceClassification"
# Heads of other tasks, and a pooler or head that the model does not use.
_IGNORED = ("*position_ids", "*pooler.*", "*classifier.*", "head.*", "cls.*", "lm_head.*", "vocab_*", "decoder.*", "qa_outputs.*")


def encoder_config(
    *,
    vocabulary: int,
    width: int = 256,
    layers: int = 4,
    heads: int = 4,
    hidden: int | None = None,
    context: int = 512,
    dropout: float = 0.1,
) -> dict[str, Any]:
    """A text encoder from zero, as the config.json of a bert; hidden: 4 · width if None."""
    shape = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"intermediate_size": hidden or 4 * width, "max_position_embeddings": context, "type_vocab_size": 1}
    rest = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    return {"model_type": "bert", "architectures": ["BertModel"], **shape, **rest}


def written_config(
    config: Config, *, outputs: int | None = None, pooling: str | None = None, normalize: bool | None = None, dropout: float | None = None
) -> dict[str, Any]:
    """The config.json to write beside a model built with these options.

    A classifier with the family's own pooler is written as transformers' classifier. Any other pooling is unknown there:
    it is written as a body, whose head only we read, so that nothing loads it as a classifier that computes something else.
    """
    own = _own(config, pooling, normalize)
    published = outputs is not None and own["pooling"] == "pooler" and not own["normalize"]
    name = _PUBLISHED[config["model_type"]].stem + (_CLASSIFIER if published else "Model")
    written = {**config, "architectures": [name], _OURS: own}
    if outputs is not None and len(config.get("id2label") or ()) != outputs:
        labels = [f"LABEL_{index}" for index in range(outputs)]
        written |= {"id2label": {str(index): label for index, label in enumerate(labels)}}
        written |= {"label2id": {label: index for index, label in enumerate(labels)}}
    return written


def outputs_in(config: Config, present: Collection[str]) -> int | None:
    """How many outputs the head for whole documents has that the file holds; None: it holds none."""
    architecture = _architecture(config)
    if f"{_PUBLISHED[config['model_type']].names['head']}.weight" not in present:
        return None
    if _OURS not in config and architecture and not architecture.endswith(_CLASSIFIER):
        return None  # a head of the same name for tokens or choices
    return len(config.get("id2label") or ()) or int(config.get("num_labels", 2))


@dataclass(frozen=True)
class _Published:
    """One family of encoder_names.toml, which says what each field is."""

    stem: str
    prefix: str
    required: dict[str, Any]
    keys: dict[str, str]
    fixed: dict[str, Any]
    names: dict[str, str]
    like: str = ""


def _read(file: Path) -> dict[str, _Published]:
    tables: dict[str, dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))
    for table in tables.values():
        other = tables.get(table.get("like", ""), {})
        table |= {part: {**other.get(part, {}), **table.get(part, {})} for part in ("required", "keys", "fixed", "names")}
    return {name: _Published(**table) for name, table in tables.items()}


def _describe(config: Config) -> EncoderConfig:
    published = _PUBLISHED[config["model_type"]]
    missing = [published.keys[f.name] for f in fields(EncoderConfig) if f.default is MISSING and published.keys[f.name] not in config]
    if missing:
        raise ModelError(f"config.json has no {', '.join(missing)}", why=f"a {config['model_type']} cannot be built without")
    _require(config, published.required)
    found = {ours: config[key] for ours, key in published.keys.items() if config.get(key) is not None}
    for ours in ("activation", "pooler_activation"):
        if found.get(ours, "gelu") not in ACTIVATIONS:
            raise ModelError(f"is {found[ours]!r}; computed here are {', '.join(ACTIVATIONS)}", key=published.keys[ours])
    derived = _DERIVED[config["model_type"]](config) if config["model_type"] in _DERIVED else {}
    return EncoderConfig(**{**published.fixed, **found, **derived})


def _roberta(config: Config) -> dict[str, Any]:
    """Positions begin behind the padding token's number; fairseq's make_positions, as in the code of arXiv:1907.11692."""
    first = config.get("pad_token_id", 1) + 1
    return {"first": first, "context": config["max_position_embeddings"] - first}


def _modernbert(config: Config) -> dict[str, Any]:
    """Layers that see the whole document alternate with local ones of another rotary base; arXiv:2412.13663 section 2.1."""
    layers, every = config["num_hidden_layers"], config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]
    bases: dict[str, float] = {}
    for kind, older, usual in (("full_attention", "global_rope_theta", 160_000.0), ("sliding_attention", "local_rope_theta", 10_000.0)):
        nested = (config.get("rope_parameters") or {}).get(kind) or {}  # since transformers 5
        _require(nested, {"rope_type": "default"})
        base = nested.get("rope_theta", config.get(older, usual))
        bases[kind] = bases["full_attention"] if base is None else float(base)
    if len(kinds) != layers or not set(kinds) <= set(bases):
        raise ModelError(f"is {kinds}", why=f"each of {layers} layers is one of {', '.join(bases)}", key="layer_types")
    reach = config.get("local_attention", 128) // 2
    return {
        "reaches": tuple(reach if kind == "sliding_attention" else None for kind in kinds),
        "bases": tuple(bases[kind] for kind in kinds),
        "pooler_over": "mean" if config.get("classifier_pooling") == "mean" else "first",
    }


def _require(config: Config, wanted: Config) -> None:
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise ModelError(f"is {config[key]!r}; computed here is {value!r}", why="any other value is another model", key=key)


def _build(
    config: Config, *, outputs: int | None = None, pooling: str | None = None, normalize: bool | None = None, dropout: float | None = None
) -> Encoder:
    """outputs: None is no head, whatever the config says.  pooling, normalize: None is what the config says, and where it
    does not say, a published classifier has its pooler and any other file the mean.

    raises: ModelError where the config lacks a key, or asks for what we do not compute
    """
    own = _own(config, pooling, normalize)
    return Encoder(_describe(config), outputs, own["pooling"], dropout, own["normalize"])


def _own(config: Config, pooling: str | None, normalize: bool | None) -> dict[str, Any]:
    """What published configs cannot say: as asked, as noted in ours, or as such a file was trained."""
    default = {"pooling": "pooler" if _architecture(config).endswith(_CLASSIFIER) else "mean", "normalize": False}
    asked = {"pooling": pooling, "normalize": normalize}
    return {**default, **(config.get(_OURS) or {}), **{key: value for key, value in asked.items() if value is not None}}


def _map(config: Config, present: Collection[str]) -> TensorMap:
    """Pooler and head are named where the file has them; with no file, always: a head written beside a body is
    found again by us, and named as unexpected by transformers.

    A model that pools another way leaves the file's pooler unread, and it is not written again: transformers then
    makes a new one and says so.
    """
    published, architecture, held = _PUBLISHED[config["model_type"]], _architecture(config), set(present)
    inside = any(name.startswith(published.prefix) for name in held) if held else not architecture.endswith("Model")
    old = any(name.endswith("LayerNorm.gamma") for name in held)  # the first published BERT spells weight and bias so
    with torch.device("meta"):
        shapes = _build(config, outputs=1, pooling="pooler").state_dict()
    found: TensorMap = {}
    for ours, tensor in shapes.items():
        module, kind = ours.rsplit(".", 1)
        template = published.names[re.sub(r"\.\d+\.", ".#.", module)].replace("@", published.prefix if inside else "")
        template = template.replace("#", "".join(re.findall(r"\.(\d+)\.", module)))
        choices = [tuple(_spell(name, kind, old) for name in choice.split()) for choice in template.split("|")]
        there = [choice for choice in choices if held.issuperset(choice)]
        optional = {"pooler": bool(there), "head": outputs_in(config, held) is not None}
        if held and not optional.get(module.split(".")[0], True):
            continue
        theirs = there[0] if there else choices[0 if architecture.endswith(_CLASSIFIER) else -1]
        parts = len(theirs)
        found[ours] = (theirs, "cat", (len(tensor) // parts,) * parts) if parts > 1 else (theirs, "same", ())
    return found


def _spell(name: str, kind: str, old: bool) -> str:
    spelled = {"weight": "gamma", "bias": "beta"} if old and name.endswith("LayerNorm") else {}
    return f"{name}.{spelled.get(kind, kind)}"


def _architecture(config: Config) -> str:
    return str((config.get("architectures") or [""])[0])


_DERIVED: dict[str, Callable[[Config], dict[str, Any]]] = {"roberta": _roberta, "xlm-roberta": _roberta, "modernbert": _modernbert}
_PUBLISHED = _read(Path(__file__).with_name("encoder_names.toml"))
ENCODERS: dict[str, Family] = {name: Family(build=_build, names=_map, ignored=_IGNORED, written=written_config) for name in _PUBLISHED}
