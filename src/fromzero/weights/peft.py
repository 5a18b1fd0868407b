"""Adapters: settings and tensors in, the two files that PEFT writes and reads out, and back, strictly; or summed into their base.

Knows names and tensors, no model.

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

from fromzero.errors import SourceError, nearest
from fromzero.sources.cache import write_whole
from fromzero.weights.tensors import Tensors, check_fit, open_safetensors, read_json, some, write_tensors
from fromzero.weights.torch_files import open_torch
from fromzero.weights.translate import TensorMap, to_ours, to_theirs

CONFIG, TENSORS, OLDER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Layers = Mapping[str, Sequence[str]]  # our module → the published modules that its rows are, in their order
Parts = Mapping[str, Sequence[int]]  # our module → the rows of each
Adapter = tuple["PeftSettings", dict[str, Tensor], dict[str, Tensor]]  # what read_peft returns
_PREFIX = "base_model.model."
_BY_PEFT = "merge it with peft: merge_and_unload, save_pretrained"
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

    base:        the published model that it belongs to;  revision: of it, where it is on a hub
    transposed:  whether the base's file keeps its matrices (inputs, outputs), as GPT-2's does
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False
    dora: bool = False
    dropout: float = 0.0
    base: str = ""
    transposed: bool = False
    revision: str = ""

    @property
    def scale(self) -> float:
        """Of B A.  source: alpha / R, arXiv:2106.09685 section 4.1; alpha / √R, arXiv:2312.03732 section 3"""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


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
        "revision": settings.revision or None,
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


def read_peft(folder: Path) -> Adapter:
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
    base, revision = (str(config.get(key) or "") for key in ("base_model_name_or_path", "revision"))
    settings = PeftSettings(rank, alpha, stabilised, dora, dropout, base, transposed, revision)
    tensors = _opened(folder)
    if strange := [name for name in tensors if not name.startswith(_PREFIX)]:
        raise SourceError(f"has tensors that belong to no module of a model: {some(strange)}", file=tensors.file)
    adapters = {name for name in tensors if name.endswith((*_LEAVES.values(),))}
    extra = {name.removeprefix(_PREFIX): tensors[name] for name in tensors if name not in adapters}
    return settings, {name: tensors[name] for name in tensors if name in adapters}, extra


def _opened(folder: Path) -> Tensors:
    for name, opener in ((TENSORS, open_safetensors), (OLDER, open_torch)):
        if (folder / name).is_file():
            return opener(folder / name)
    mend = f"bring {TENSORS} into it: both files are written together"
    raise SourceError(f"has an {CONFIG}, but no {TENSORS} and no {OLDER}", mend=mend, file=str(folder))


def merge_peft(adapter: Adapter, base: Tensors, *, vocabulary: int | None, file: str) -> Tensors:
    """The base's tensors with what an adapter learned in them, each summed, in float32 at least, when it is asked for.

    vocabulary:  rows that a matrix of words has, where the base's head and embedding may be one; None where they are two
    raises:      SourceError naming what the adapter holds that the base has no place for, or of another shape
    """
    settings, low, extra = adapter
    adapted = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in low})
    places = {module: _place(f"{module}.weight", base) for module in adapted}
    whole = {_place(name, base): name for name in extra}
    if not places and not whole:
        raise SourceError("its adapter holds no tensors", why="it would change nothing", mend="name the base itself", file=file)
    if lost := [module for module, place in places.items() if len(base.shapes.get(place, ())) != 2]:
        close = nearest(f"{lost[0]}.weight", base)
        mend = f"near: {lost[0]}.weight ~ {close[0]}" if close else "name the base that it was trained beside"
        raise SourceError(f"adapts what is no matrix of its base: {some(lost)}", why=f"the base is {base.file}", mend=mend, file=file)
    if lost := [name for name, tensor in extra.items() if base.shapes.get(_place(name, base)) != tuple(tensor.shape)]:
        what = f"holds whole tensors that its base has not, or of another shape: {some(lost)}"
        raise SourceError(what, why="each is put in the place of the base's", mend=_BY_PEFT, file=file)
    if words := [name for name in (*places.values(), *whole) if vocabulary and base.shapes[name][:1] == (vocabulary,)]:
        why = "the base's head and embedding may be one matrix, of which PEFT changes one use and not the other"
        raise SourceError(f"changes {some(words)}", why=why, mend=_BY_PEFT, file=file)
    wanted: dict[str, Tensor] = {}
    for module, place in places.items():
        rows, columns = reversed(base.shapes[place]) if settings.transposed else base.shapes[place]
        shapes = {"a": (settings.rank, columns), "b": (rows, settings.rank), "magnitude": (rows,)}
        wanted |= {_key(module, leaf): torch.empty(shapes[leaf], device="meta") for leaf in _leaves(settings)}
    check_fit(wanted, low, file=file)
    modules = {place: module for module, place in places.items()}

    def read(name: str) -> Tensor:
        if name not in modules:
            return extra[whole[name]] if name in whole else base[name]
        return _summed(base[name], [low[_key(modules[name], leaf)] for leaf in _leaves(settings)], settings)

    return Tensors(base.file, base.shapes, read)


def _place(name: str, base: Tensors) -> str:
    """What the base calls a tensor; empty where it has none. A file of a body alone leaves the body's prefix out, and so does an
    adapter that learned beside a body alone."""
    found = [name] if name in base else [of for of in base if name.endswith(f".{of}") or of.endswith(f".{name}")]
    return found[0] if len(found) == 1 else ""


def _summed(weight: Tensor, learned: Sequence[Tensor], settings: PeftSettings) -> Tensor:
    """W + s B A, with DoRA each row scaled to its magnitude.  source: arXiv:2402.09353 section 4"""
    kind = torch.promote_types(weight.dtype, torch.float32)
    a, b, *magnitude = (tensor.to(kind) for tensor in learned)
    made = torch.addmm((weight.T if settings.transposed else weight).to(kind), b, a, alpha=settings.scale)  # (out, in)
    for of in magnitude:
        made *= (of / torch.linalg.vector_norm(made, dim=1))[:, None]
    return made.T.contiguous() if settings.transposed else made


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
