"""A GGUF file in, its metadata and its tensors out, dequantised when they are asked for. Knows no architecture.

The format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Every count, length, offset and shape is compared with
the bytes that are there before anything is made from it, so that a small file cannot ask for much.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fromzero.errors import SourceError
from fromzero.weights.blocks import KINDS, dequantise
from fromzero.weights.tensors import Shapes, Tensors

MOST_ENTRIES = 2**16  # of metadata, and of tensors
MOST_ITEMS = 2**24  # of one array, and bytes of one text
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type → struct
_STRING, _ARRAY = 8, 9


def open_gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    """returns: the metadata by key, and the tensors under the file's own names, rows first

    raises: SourceError naming the file, the tensor and the byte where it is not what it says
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise SourceError(f"cannot be read ({error})", file=str(path)) from None
    if reader.take(4) != b"GGUF" or reader.number("I") not in (2, 3):
        raise reader.wrong(f"is no GGUF file of version 2 or 3, little-endian ({reader.data[:8]!r})")
    tensors = reader.count(24, MOST_ENTRIES, "tensors")  # the shortest description of one has 24 bytes
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(13, MOST_ENTRIES, "entries of metadata")):
        key = reader.string()
        if key in metadata:
            raise reader.wrong(f"has the key {key[:60]!r} twice")
        metadata[key] = reader.value()
    return metadata, _tensors(reader, tensors, metadata.get("general.alignment", 32))


class _Reader:
    """A place in a file that only moves over bytes that are there."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self.data, self.file, self.at = data, file, 0

    def wrong(self, what: str, key: str = "") -> SourceError:
        return SourceError(f"{what}, before byte {self.at} of {len(self.data)}", mend="fetch it again", file=self.file, key=key)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.wrong(f"ends too early: {size:,} bytes should follow")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        value = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return float(str(np.float32(value))) if form == "f" else value  # 1e-05 and not 9.999999747378752e-06

    def count(self, width: int, most: int, what: str) -> int:
        """A number of things that take at least `width` bytes each"""
        count = int(self.number("Q"))
        if count > min(most, (len(self.data) - self.at) // width):
            raise self.wrong(f"promises {count:,} {what}, more than it can hold or than are read ({most:,})")
        return count

    def string(self) -> str:
        raw = self.take(self.count(1, MOST_ITEMS, "bytes of text"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.wrong(f"has a text that is no UTF-8 ({raw[:40]!r})") from None

    def value(self) -> Any:
        kind = self.number("I")
        inner = self.number("I") if kind == _ARRAY else kind
        if inner not in (_STRING, *_NUMBERS):
            raise self.wrong(f"has a value of a kind that is not read ({kind}, {inner})")
        if kind != _ARRAY:
            return self.string() if kind == _STRING else self.number(_NUMBERS[kind])
        if inner == _STRING:
            return [self.string() for _ in range(self.count(8, MOST_ITEMS, "texts in a list"))]
        form = np.dtype(f"<{_NUMBERS[inner]}")
        count = self.count(form.itemsize, MOST_ITEMS, "numbers in a list")
        return np.frombuffer(self.take(count * form.itemsize), form).tolist()


def _tensors(reader: _Reader, count: int, alignment: Any) -> Tensors:
    if type(alignment) is not int or alignment not in [2**n for n in range(17)]:
        raise reader.wrong(f"has an alignment that is no power of two up to 65,536 ({str(alignment)[:20]})", "general.alignment")
    shapes: Shapes = {}
    places: dict[str, tuple[int, int, int]] = {}  # offset, bytes, kind
    for _ in range(count):
        name, dims = reader.string(), reader.number("I")
        if name in shapes or not 1 <= dims <= 4:
            raise reader.wrong("stands twice" if name in shapes else f"has {dims} dimensions, not 1 to 4", name)
        shape = tuple(int(reader.number("Q")) for _ in range(dims))[::-1]  # the file has the row's length first
        kind, offset = int(reader.number("I")), int(reader.number("Q"))
        if kind not in KINDS:
            known = ", ".join(name for name, *_ in KINDS.values())
            raise SourceError(f"is of ggml's kind {kind}, which is not read", mend=f"read are {known}", file=reader.file, key=name)
        label, values, width, _ = KINDS[kind]
        if 0 in shape or math.prod(shape) >= 2**63 or shape[-1] % values or offset % alignment:
            raise reader.wrong(f"cannot have shape {shape} as {label} at offset {offset}", name)
        shapes[name], places[name] = shape, (offset, math.prod(shape) // values * width, kind)
    base, end = -(-reader.at // alignment) * alignment, 0
    for name, (offset, size, _) in sorted(places.items(), key=lambda place: place[1]):
        if offset < end or base + offset + size > len(reader.data):
            raise reader.wrong(f"lies in bytes {base + offset} to {base + offset + size}, outside or over another tensor", name)
        end = offset + size
    raw = np.frombuffer(reader.data, np.uint8)

    def read(name: str) -> torch.Tensor:
        offset, size, kind = places[name]
        return dequantise(torch.from_numpy(raw[base + offset : base + offset + size].copy()), kind).reshape(shapes[name])

    return Tensors(reader.file, shapes, read)
