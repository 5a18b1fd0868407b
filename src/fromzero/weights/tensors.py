"""Tensors by name: a dict in, a safetensors file out, and back, strictly. Knows no model.

What a file promises is compared with its size before any other code sees it (the format: safetensors' README, section
"Format"), and a tensor's bytes are touched only when it is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from fromzero.errors import SourceError, nearest
from fromzero.sources.cache import writing_whole

MOST_HEADER = 100_000_000  # bytes
MOST_JSON = 2**26  # bytes of a config, an index, a tokenizer's settings
MOST_DIMS = 16
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
Shapes = dict[str, tuple[int, ...]]
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_UNKNOWN = "0" * 64  # stands for a digest that is known only at the end


class Tensors(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, each looked through for NaN and infinity then.

    shapes: of all, without reading one
    """

    def __init__(self, file: str, shapes: Shapes, read: Callable[[str], Tensor]) -> None:
        self.file, self.shapes, self._read = file, shapes, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        tensor = self._read(name)
        if wrong := not_finite(tensor):
            raise SourceError(wrong, mend="fetch it again", file=self.file, key=name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own way would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def not_finite(tensor: Tensor) -> str:
    """How many of its values are NaN or infinite, in words; empty where none is, which takes one pass and no copy."""
    if not tensor.is_floating_point() or not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
        return ""
    return f"{int((~tensor.isfinite()).sum())} of its {tensor.numel()} values are NaN or infinite"


def first_not_finite(tensors: Mapping[str, Tensor], *, spared: Collection[str] = ()) -> str:
    """The first tensor with such values, in words; empty where none has any.  spared: names that are not looked at"""
    found = ((name, not_finite(tensor)) for name, tensor in tensors.items() if name not in spared)
    return next((f"{name} is no finite number: {wrong}" for name, wrong in found if wrong), "")


def open_safetensors(path: Path) -> Tensors:
    """raises: SourceError where the file cannot be read, or its header promises what it does not hold"""
    try:
        with path.open("rb") as file:
            shapes = read_header(file, path.stat().st_size, str(path))
        return Tensors(str(path), shapes, safe_open(path, "pt").get_tensor)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot be read ({error})", file=str(path)) from None


def open_shards(index: Path, open_file: Callable[[Path], Tensors] = open_safetensors) -> Tensors:
    """`….index.json` and the files that it names, all in its own folder → the tensors of all of them.

    raises: SourceError naming a file that leads outside or is not there, and tensors that stand twice or nowhere
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise SourceError("has no weight_map of tensor names and files", file=str(index))
    files = sorted(set(where.values()))
    for file in files:
        if Path(file).name != file or "\\" in file or not (index.parent / file).is_file():
            raise SourceError(f"names {file!r}, which is no file in its own folder", file=str(index))
    parts = {file: open_file(index.parent / file) for file in files}
    held = {(name, file) for file, part in parts.items() for name in part}
    if wrong := held ^ set(where.items()):
        why = "each tensor stands in one file, the one that is named"
        raise SourceError(f"does not agree with its files on {some(sorted({name for name, _ in wrong}))}", why=why, file=str(index))
    shapes = {name: parts[file].shapes[name] for name, file in where.items()}
    return Tensors(str(index), shapes, lambda name: parts[where[name]][name])


def read_json(path: Path, *kinds: type) -> Any:
    """An object of JSON, or what else is asked for.  raises: SourceError where it is anything else, or too large"""
    try:
        values = json.loads(path.read_bytes()) if path.stat().st_size <= MOST_JSON else None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"cannot be read as JSON ({str(error)[:100]})", file=str(path)) from None
    if not isinstance(values, kinds or dict):
        raise SourceError(f"is no JSON object, or larger than {MOST_JSON:,} bytes", file=str(path))
    return values


def read_header(file: BinaryIO, size: int, name: str) -> Shapes:
    """The shapes in a safetensors file of `size` bytes, after all that its header promises was found to be there.

    raises: SourceError naming the file, the tensor and the bytes
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    end = size - 8 - length
    if len(start) < 8 or end < 0 or length > MOST_HEADER:
        mend = "it is a pointer of git-lfs: git lfs pull" if start == b"version " else "fetch or save it again"
        why = f"byte 0 promises a header of {length:,} bytes, the file has {size:,}"
        raise SourceError("is no whole safetensors file", why=why, mend=mend, file=name)
    try:
        header = json.loads(file.read(length), object_pairs_hook=_once)
        header = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, AttributeError) as error:
        raise SourceError(f"has a header that is no JSON object, bytes 8 to {8 + length} ({str(error)[:100]})", file=name) from None
    for tensor, entry in header.items():
        if wrong := _wrong_with(entry):
            raise SourceError(f"its tensor {wrong}", file=name, key=tensor)
    at = 0
    for tensor, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != at or stop > end:
            why = "tensors may not overlap, leave holes or end outside"
            raise SourceError(f"lies in bytes {begin} to {stop} of {end}, where {at} comes next", why=why, file=name, key=tensor)
        at = stop
    if at != end:
        raise SourceError(f"has {end - at} bytes that are of no tensor, from byte {8 + length + at}", file=name)
    return {tensor: tuple(entry["shape"]) for tensor, entry in header.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice")
    return values


def _wrong_with(entry: Any) -> str:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or str(entry["dtype"]) not in WIDTHS:
        return f"is not described, or of a kind that is not read ({str(entry)[:100]})"
    shape, offsets = entry["shape"], entry["data_offsets"]
    for counts in (shape, offsets):
        if not isinstance(counts, list) or len(counts) > MOST_DIMS or not all(type(n) is int and 0 <= n < 2**63 for n in counts):
            return f"has a shape or offsets that are no counts ({str(counts)[:100]})"
    needs = math.prod(shape) * WIDTHS[entry["dtype"]]
    return (
        "" if len(offsets) == 2 and offsets[1] - offsets[0] == needs else f"needs {needs} bytes for {shape}, and is given bytes {offsets}"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> str:
    """Write whole or not at all, one tensor after the other: no second copy of them is in memory.  returns: SHA-256 of the file"""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # wide ones first, so that each is aligned
    kinds = {name: (_kind(tensors[name].dtype), tuple(tensors[name].shape)) for name in names}
    header, digest = _header(kinds, dict(notes) if notes else None), hashlib.sha256()
    with writing_whole(path) as file:
        for data in chain([header], (_bytes_of(tensors[name]) for name in names)):
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def write_blocks(path: Path, shapes: Shapes, dtype: torch.dtype, blocks: Iterable[Tensor]) -> None:
    """Write tensors larger than memory: block after block of their rows, in the order of `shapes`; whole or not at all.

    The header notes the SHA-256 of all that follows it, for `map_tensors`.
    raises: OSError, as where the disk is full
    """
    header, digest = _header({name: (_kind(dtype), shape) for name, shape in shapes.items()}, {"sha256": _UNKNOWN}), hashlib.sha256()
    with writing_whole(path) as file:
        file.write(header)
        for block in blocks:
            data = _bytes_of(block)
            digest.update(data)
            file.write(data)
        file.seek(header.index(_UNKNOWN.encode()))
        file.write(digest.hexdigest().encode())


def _header(kinds: Mapping[str, tuple[str, tuple[int, ...]]], notes: dict[str, str] | None) -> bytes:
    """A safetensors file up to its first value.  kinds: name → kind and shape of each tensor, in the order they follow"""
    entries: dict[str, Any] = {"__metadata__": notes} if notes else {}
    at = 0
    for name, (kind, shape) in kinds.items():
        end = at + math.prod(shape) * WIDTHS[kind]
        entries[name], at = {"dtype": kind, "shape": shape, "data_offsets": (at, end)}, end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _kind(dtype: torch.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if known is dtype)


def _bytes_of(tensor: Tensor) -> Any:
    """In the order of its values; a copy only of what lies otherwise, or on another device"""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def map_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_blocks` wrote, compared byte for byte with its note; a row is brought into memory when it is used.

    raises: SourceError where the file cannot be read, is not whole, or was changed
    """
    try:
        with path.open("rb") as file:
            shapes = read_header(file, path.stat().st_size, str(path))
            found = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(path, "pt") as tensors:
            if (tensors.metadata() or {}).get("sha256") != found:
                raise SourceError("has changed since it was written", file=str(path))
            return {name: tensors.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot be read ({error})", file=str(path)) from None


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """raises: SourceError where the file is not there, not whole, or not the one whose digest was noted"""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", file=str(path)) from None
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise SourceError("has changed since it was written", why=f"its SHA-256 is {found[:16]}…, noted was {sha256[:16]}…", file=str(path))
    read_header(io.BytesIO(data), len(data), str(path))
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
    refuse_misfit(missing, extra, shapes, file=file)


def refuse_misfit(missing: Sequence[str], extra: Sequence[str], shapes: Sequence[str] = (), *, file: str) -> None:
    """raises: SourceError with the names and the nearest to them, if there is one"""
    said = [f"missing {some(missing)}"] * bool(missing) + [f"extra {some(extra)}"] * bool(extra) + list(shapes[:5])
    if said:
        close = [f"{n} ~ {c[0]}" for n in missing[:3] if (c := nearest(n, extra))]
        mend = f"near: {', '.join(close)}" if close else ""
        raise SourceError(f"its tensors do not fit the model: {'; '.join(said)}", mend=mend, file=file)


def some(names: Sequence[str]) -> str:
    """The first few of many names"""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
