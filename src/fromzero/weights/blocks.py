"""Quantised blocks: the bytes of a tensor as ggml packs them in, its values out. Knows no file.

Layouts: ggml-common.h and ggml-quants.c of ggml. n below is the number of blocks. Every value is the same to the last
bit as in gguf's own reference (`gguf.quants.dequantize`): the same float32 operations in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dequantise(raw: Tensor, kind: int) -> Tensor:
    """raw: bytes, uint8, whole blocks of one of KINDS.  returns: values end to end, float32 or the kind's own type"""
    _, _, width, read = KINDS[kind]
    values: Tensor = raw.view(read) if isinstance(read, torch.dtype) else read(raw.reshape(-1, width)).reshape(-1)
    return values


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()  # (n, 1)


def _nibbles(packed: Tensor) -> Tensor:
    """(…, w) bytes → (…, 2·w): all low halves, then all high halves"""
    return torch.cat([packed & 15, packed >> 4], -1)


def _bits(packed: Tensor, width: int) -> Tensor:
    """(n, w) bytes → (n, 8 // width, w): from each byte its `width` lowest bits, the next ones, …"""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    return torch.bitwise_and(packed[:, None] >> shifts, 2**width - 1)


def _fifth(packed: Tensor) -> Tensor:
    return _bits(packed, 1).transpose(1, 2).flatten(1) << 4  # (n, 32): bit i of four bytes is of value i


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8])).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _with_scales(blocks: Tensor, quants: Tensor) -> Tensor:
    """Eight groups of 32, each with a scale and a minimum of six bits.  quants: (n, 8, 32)"""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], 1).float()  # (n, 8)
    minima = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], 1).float()
    return (_half(blocks, 0) * scales)[:, :, None] * quants.float() - (_half(blocks, 2) * minima)[:, :, None]


def _groups(packed: Tensor) -> Tensor:
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_scales(blocks, _groups(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    return _with_scales(blocks, _groups(blocks[:, 48:]) | (_bits(blocks[:, 16:48], 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)  # two halves of 128 values, each as four groups of 32
    high = _bits(blocks[:, 128:192].reshape(-1, 32), 2).reshape(-1, 8, 32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # (n, 16)
    return scales[:, :, None] * ((low | (high << 4)).float() - 32).reshape(-1, 16, 16)


KINDS: dict[int, tuple[str, int, int, Any]] = {  # ggml's number → name, values in a block, bytes of it, (n, bytes) → (n, values)
    0: ("F32", 1, 4, torch.float32),
    1: ("F16", 1, 2, torch.float16),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    6: ("Q5_0", 32, 22, _q5_0),
    7: ("Q5_1", 32, 24, _q5_1),
    8: ("Q8_0", 32, 34, _q8_0),
    12: ("Q4_K", 256, 144, _q4_k),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
    30: ("BF16", 1, 2, torch.bfloat16),
}


def quantise(values: Tensor, kind: int) -> Tensor:
    """values: float, rows of whole blocks.  kind: one of WRITTEN.  returns: the bytes, as `dequantise` takes them

    Every byte is the same as from gguf's own reference (`gguf.quants.quantize`).
    """
    flat = values.detach().float().contiguous()
    if kind == 0:
        return flat.reshape(-1).view(torch.uint8)
    if kind == 1:
        return flat.to(torch.float16).reshape(-1).view(torch.uint8)
    packed: Tensor = WRITTEN[kind](flat.reshape(-1, 32))
    return packed.reshape(-1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _bytes(scale: Tensor) -> Tensor:
    return scale.to(torch.float16).view(torch.uint8)  # (n, 1) → (n, 2)


def _to_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    whole = blocks * _inverse(scale)
    size = whole.abs()
    rounded = torch.sign(whole) * (size.floor() + (2 * (size - size.floor())).floor())  # halves away from zero, as C's roundf
    return torch.cat([_bytes(scale), rounded.to(torch.int8).view(torch.uint8)], 1)


def _to_q4_0(blocks: Tensor) -> Tensor:
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = furthest / -8
    whole = torch.trunc(blocks * _inverse(scale) + 8.5).clamp(0, 15).to(torch.uint8)
    low, high = whole.chunk(2, 1)
    return torch.cat([_bytes(scale), low | high << 4], 1)


WRITTEN: dict[int, Any] = {0: None, 1: None, 2: _to_q4_0, 8: _to_q8_0}
