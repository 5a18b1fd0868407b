"""Metadata and tensors in, a GGUF file out, version 3, little-endian. Knows no architecture.

The format: ggml's docs/gguf.md. One tensor after the other is made and written: no second copy of a model is in memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fromzero.sources.cache import writing_whole
from fromzero.weights.blocks import KINDS, quantise

ALIGNMENT = 32
KIND_NUMBERS = {name: number for number, (name, *_) in KINDS.items()}  # F32 → 0
_STRING, _ARRAY, _BOOL, _UINT32, _INT32, _FLOAT32 = 8, 9, 7, 4, 5, 6


def write_gguf(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str], read: Callable[[str], Tensor]
) -> None:
    """Whole or not at all.

    metadata:  texts, truth values, whole numbers (uint32; int32 in lists), floats (float32), and lists of one of these
    kinds:     of each tensor: F32, F16, Q8_0 or Q4_0
    read:      a tensor's values by its name, rows first
    """
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    at = 0
    for name, shape in shapes.items():
        number = KIND_NUMBERS[kinds[name]]
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, at)
        at += _padded(_size(shape, number))
    with writing_whole(path) as file:
        file.write(head + b"\0" * (-len(head) % ALIGNMENT))
        for name, shape in shapes.items():
            data = quantise(read(name), KIND_NUMBERS[kinds[name]]).numpy().tobytes()
            assert len(data) == _size(shape, KIND_NUMBERS[kinds[name]]), name
            file.write(data + b"\0" * (-len(data) % ALIGNMENT))


def _size(shape: tuple[int, ...], kind: int) -> int:
    _, values, width, _ = KINDS[kind]
    return math.prod(shape) // values * width


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        inner = _STRING if isinstance(value[0], str) else _FLOAT32 if isinstance(value[0], float) else _INT32
        items = (
            b"".join(map(_text, value)) if inner == _STRING else struct.pack(f"<{len(value)}{'f' if inner == _FLOAT32 else 'i'}", *value)
        )
        return struct.pack("<IIQ", _ARRAY, inner, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    return struct.pack("<II", _UINT32, value) if isinstance(value, int) else struct.pack("<If", _FLOAT32, value)
