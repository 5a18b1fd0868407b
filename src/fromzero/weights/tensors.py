"""Tensors by name: a dict in, a safetensors file out, and back, strictly. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fromzero.errors import SourceError, nearest
from fromzero.sources.cache import write_whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> str:
    """Write whole or not at all.  returns: SHA-256 of the file"""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(plain, metadata=dict(notes or {}))
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """raises: SourceError where the file is not there, not whole, or not the one whose digest was noted"""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", file=str(path)) from None
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise SourceError("has changed since it was written", why=f"its SHA-256 is {found[:16]}…, noted was {sha256[:16]}…", file=str(path))
    try:
        return load(data)
    except SafetensorError as error:
        raise SourceError(f"is no whole safetensors file ({error})", file=str(path)) from None


def check_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], *, file: str) -> None:
    """Names and shapes must agree exactly.  raises: SourceError listing what is missing, extra or of another shape"""
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted]
    shapes = [
        f"{n} is {tuple(found[n].shape)}, not {tuple(t.shape)}" for n, t in wanted.items() if n in found and found[n].shape != t.shape
    ]
    said = [f"missing {_some(missing)}"] * bool(missing) + [f"extra {_some(extra)}"] * bool(extra) + shapes[:5]
    if said:
        close = [f"{n} ~ {c[0]}" for n in missing[:3] if (c := nearest(n, extra))]
        raise SourceError(
            f"its tensors do not fit the model: {'; '.join(said)}", mend=f"near: {', '.join(close)}" if close else "", file=file
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
