"""Adapters: settings and tensors in, the two files that PEFT writes and reads out, and back, strictly. Knows names and tensors, no model.

Format: adapter_config.json and adapter_model.safetensors as `peft` 0.21 writes them (LoraConfig, save_pretrained).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromzero.errors import SourceError
from fromzero.sources.cache import write_whole
from fromzero.weights.tensors import check_fit, open_safetensors, read_json, some, write_tensors
from fromzero.weights.translate import TensorMap, to_ours, to_theirs

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Layers = Mapping[str, Sequence[str]]  # our module → the published modules that its rows are, in their order
Parts = Mapping[str, Sequence[int]]  # our module → the rows of each
_PREFIX = "base_model.model."
_LEAVES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# Keys that are read, or do not change what the tensors mean: they name the base, or choose modules, which the tensors name themselves.
_FREE = {"r", "lora_alpha", "lora_dropout", "peft_version", "base_model_name_or_path", "revision", "task_type", "auto_mapping"}
_FREE |= {"inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_FREE |= {"ensure_weight_tying", "megatron_core", "qalora_group_size"}
# Keys of which these values are done. Other initialisations change the base's weights. A key named nowhere must be null or empty.
_DONE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True,),
    "use_dora": (True,),
    "fan_in_fan_out": (True,),
}


@dataclass(frozen=True)
class PeftSettings:
    """What an adapter is beside its tensors.

    base:        the published model that it belongs to
    transposed:  whether the base's file keeps its matrices (inputs, outputs), as GPT-2's does
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False
    dora: bool = False
    dropout: float = 0.0
    base: str = ""
    transposed: bool = False


def write_peft(
    folder: Path,
    settings: PeftSettings,
    tensors: Mapping[str, Tensor],
    layers: Layers,
    parts: Parts,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write an adapter that peft.PeftModel.from_pretrained loads; the config, which comes last, makes it one.

    tensors: {module}.a, .b and, with DoRA, .magnitude of each module
    layers:  a published module whose A and B are zero is left out
    extra:   whole tensors that trained beside the adapters, by published name
    returns: SHA-256 by file name
    raises:  SourceError where it cannot be written
    """
    extra = dict(extra or {})
    theirs = to_theirs(tensors, _names(layers, parts, settings))
    published = [name for names in layers.values() for name in names]
    kept = [name for name in published if settings.dora or any(theirs[_key(name, leaf)].any() for leaf in "ab")]
    theirs = {_key(name, leaf): theirs[_key(name, leaf)] for name in kept for leaf in _leaves(settings)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base or None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilised,
        "use_dora": settings.dora,
        "target_modules": kept,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in extra}) or None,
        "bias": "none",
        "fan_in_fan_out": settings.transposed,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    theirs |= {_PREFIX + name: tensor for name, tensor in extra.items()}
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        (folder / CONFIG).unlink(missing_ok=True)
        digest = write_tensors(folder / TENSORS, theirs, {"format": "pt"})
        write_whole(folder / CONFIG, text)
    except OSError as error:
        raise SourceError(f"cannot be written ({error.strerror})", mend="free some space, or name another", file=str(folder)) from None
    return {TENSORS: digest, CONFIG: hashlib.sha256(text).hexdigest()}


def read_peft(folder: Path) -> tuple[PeftSettings, dict[str, Tensor], dict[str, Tensor]]:
    """returns: the settings; the adapters' tensors under the names of the file, for from_peft; whole tensors by published name

    raises: SourceError naming each key of the config that asks for what is not done here, and tensors that are of no module
    """
    config, file = read_json(folder / CONFIG), str(folder / CONFIG)
    wrong = [f"{key} = {json.dumps(value)[:60]}" for key, value in ({"peft_type": ""} | config).items() if not _done(key, value)]
    if wrong:
        why = "adapters here are LoRA, rank-stabilised or not, or DoRA"
        raise SourceError(f"asks for what is not done here: {'; '.join(wrong)}", why=why, file=file)
    rank, alpha, dropout = config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    numbers = all(type(n) in (int, float) and math.isfinite(n) for n in (alpha, dropout))
    if type(rank) is not int or rank < 1 or not numbers or not 0 <= dropout < 1:
        raise SourceError(f"r, lora_alpha and lora_dropout are no numbers for an adapter: {rank!r}, {alpha!r}, {dropout!r}", file=file)
    stabilised, dora, transposed = (config.get(key) is True for key in ("use_rslora", "use_dora", "fan_in_fan_out"))
    settings = PeftSettings(rank, alpha, stabilised, dora, dropout, str(config.get("base_model_name_or_path") or ""), transposed)
    tensors = open_safetensors(folder / TENSORS)
    if strange := [name for name in tensors if not name.startswith(_PREFIX)]:
        raise SourceError(f"has tensors that belong to no module of a model: {some(strange)}", file=tensors.file)
    adapters = {name for name in tensors if name.endswith((*_LEAVES.values(),))}
    extra = {name.removeprefix(_PREFIX): tensors[name] for name in tensors if name not in adapters}
    return settings, {name: tensors[name] for name in tensors if name in adapters}, extra


def from_peft(tensors: Mapping[str, Tensor], settings: PeftSettings, layers: Layers, parts: Parts, *, file: str) -> dict[str, Tensor]:
    """What read_peft read, under our names, for the modules that the file adapts.

    A published module that the file leaves out beside others of its layer gets an A and a B of zeros: it has no gradient then, does
    nothing, and is left out again where the adapter is written.

    raises: SourceError listing what is missing, extra, or of another shape
    """
    adapted = {module: names for module, names in layers.items() if any(_key(name, "a") in tensors for name in names)}
    whole, wanted = dict(tensors), {}
    for module, published in adapted.items():
        first = next(tensors[_key(name, "a")] for name in published if _key(name, "a") in tensors)
        for name, rows in zip(published, parts[module], strict=True):
            shapes = {"a": (settings.rank, *first.shape[1:]), "b": (rows, settings.rank), "magnitude": (rows,)}
            absent = not settings.dora and not any(_key(name, leaf) in tensors for leaf in _LEAVES)
            for leaf in _leaves(settings):
                wanted[_key(name, leaf)] = torch.empty(shapes[leaf], device="meta")
                if absent:
                    whole[_key(name, leaf)] = first.new_zeros(()).expand(shapes[leaf])  # of no memory, until its shape was found to fit
    check_fit(wanted, whole, file=file)
    return to_ours(whole, _names(adapted, parts, settings), file=file)


def _names(layers: Layers, parts: Parts, settings: PeftSettings) -> TensorMap:
    sizes = {(module, leaf): tuple(parts[module]) for module in layers for leaf in _leaves(settings)}
    sizes |= {(module, "a"): (settings.rank,) * len(layers[module]) for module in layers}
    return {f"{m}.{leaf}": (tuple(_key(name, leaf) for name in layers[m]), "cat", rows) for (m, leaf), rows in sizes.items()}


def _key(published: str, leaf: str) -> str:
    return f"{_PREFIX}{published}.{_LEAVES[leaf]}"


def _leaves(settings: PeftSettings) -> list[str]:
    return [leaf for leaf in _LEAVES if settings.dora or leaf != "magnitude"]


def _done(key: str, value: Any) -> bool:
    if key in _FREE or (key != "peft_type" and value in (None, False, {}, [], "")):
        return True
    return any(value == known and type(value) is type(known) for known in _DONE.get(key, ()))
