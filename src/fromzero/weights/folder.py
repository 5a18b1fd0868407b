"""A config, tensors and a tokenizer in, a folder that transformers' from_pretrained loads out. Knows no model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fromzero.errors import SourceError
from fromzero.sources import digest_of
from fromzero.sources.cache import write_whole
from fromzero.weights.tensors import write_tensors

_INDEX = "model.safetensors.index.json"
_OURS = ("model.safetensors", "model-*-of-*.safetensors", _INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: str | None = None,
    special: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> dict[str, str]:
    """Write a published model's folder, whole: it is one as soon as it has a config.json, which comes last.

    config, tensors: in published terms; the config's dtype is set to that of the tensors
    shard_bytes:     tensors are spread over several files where they are larger together
    returns:         SHA-256 by file name
    raises:          SourceError where it cannot be written; an older model in the folder is then still there
    """
    dtype = next((str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()), "float32")
    cards: dict[str, Any] = {"config.json": {**config, "dtype" if "dtype" in config else "torch_dtype": dtype}}
    if generation:
        cards["generation_config.json"] = generation
    shards = _shards(tensors, shard_bytes)
    if len(shards) > 1:
        where = {name: file for file, names in shards.items() for name in names}
        cards[_INDEX] = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    texts = {name: _json(card) for name, card in cards.items()}
    texts |= {} if tokenizer is None else tokenizer_files(tokenizer, special, chat_template)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            digests = {}
            for file, names in shards.items():
                digests[file] = write_tensors(Path(new, file), {name: tensors[name] for name in names}, {"format": "pt"})
            for name, text in texts.items():
                write_whole(Path(new, name), text.encode())
                digests[name] = digest_of(Path(new, name))
            for old in [folder / "config.json", *(path for glob in _OURS for path in folder.glob(glob))]:
                old.unlink(missing_ok=True)
            for name in sorted(digests, key="config.json".__eq__):
                os.replace(Path(new, name), folder / name)
    except OSError as error:
        raise SourceError(f"cannot be written ({error.strerror})", mend="free some space, or name another", file=str(folder)) from None
    return digests


def tokenizer_files(tokenizer: str, special: Mapping[str, Any] | None = None, chat_template: str | None = None) -> dict[str, str]:
    """What transformers reads a tokenizer from: file name → text. Its class takes tokenizer.json as it is; the original's own would
    rebuild parts of it."""
    card = {**(special or {}), "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer_config.json": _json(card | ({"chat_template": chat_template} if chat_template else {})), "tokenizer.json": tokenizer}


def _json(card: Any) -> str:
    return json.dumps(card, indent=2, ensure_ascii=False) + "\n"


def _shards(tensors: Mapping[str, Tensor], most: int) -> dict[str, list[str]]:
    """File → names of tensors, in order, each file no larger than `most` unless one tensor is"""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, start=1)}
