"""Draws: the examples of a piece in, what falls out in its dropout layers out: a function of seed, epoch, example, layer and call alone.

Torch's dropout draws from one stream in the order in which it is asked, so that another micro-batch, a restart or a stage that runs again
would let other values fall out. Here each value is asked for by where it stands, and a hash answers, the same on every device.
Dims: B samples, N tokens end to end, R rows of a layer's input (B or N), D values of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data.order import keyed_words, mix
from fromzero.models import KEYED

_MULTIPLIERS = (0x2C1B3C6D, 0x297A2D39)  # of 32 bits; chosen by search for the least bias: nullprogram.com/blog/2018/07/31


class Draws:
    """What a forward pass draws. calls: how often each layer has been asked since the piece began."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls: dict[str, int] = {}
        self._piece: tuple[Tensor, int, Tensor | None] | None = None
        self._keys: list[Tensor] = []
        self._columns: dict[tuple[int, torch.device], Tensor] = {}
        self._layers: dict[tuple[str, int], tuple[int, int]] = {}

    def begin(self, samples: Tensor, epoch: int, lengths: Tensor | None) -> None:
        """A piece comes next.

        samples:  (B,) int64, which training examples it has, in its order
        lengths:  (B,) int64 tokens of each, where they are texts; each token then draws by its place in its own text
        """
        self._piece, self._keys, self.calls = (samples, epoch, lengths), [], {}

    def carry_out(self, model: nn.Module) -> None:
        """Let the dropout layers of a model draw from here."""
        for name, module in model.named_modules():
            if type(module) in KEYED:
                module.forward = partial(self.drop, module, name)

    def drop(self, module: Any, name: str, values: Tensor) -> Tensor:
        """values: (R, …).  Rows that are neither samples nor tokens draw from torch's stream; the planner then does not cut batches."""
        if not module.training or not module.p:
            return values
        rows = self._rows(values)
        if rows is None:
            own: Tensor = type(module).forward(module, values)
            return own
        call = self.calls[name] = self.calls.get(name, 0) + 1
        shape = values.shape if type(module) is nn.Dropout else (*values.shape[:2], *(1 for _ in values.shape[2:]))
        kept = _kept(rows, *self._layer(name, call), self._column(math.prod(shape[1:]), values.device), module.p)
        return values * kept.view(shape).to(values.dtype).mul_(0.0 if module.p == 1 else 1 / (1 - module.p))  # one pass, and one backward

    def again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of a stage so that it draws the same each time it runs within a piece."""
        calls = dict(self.calls)

        def run(*given: Any, **named: Any) -> Any:
            self.calls = dict(calls)
            return forward(*given, **named)

        return run

    def _rows(self, values: Tensor) -> Tensor | None:
        """(R,) int32, the key of each row; None where rows are something else than samples and tokens"""
        if self._piece is None:
            return None
        if not self._keys:
            samples, epoch, lengths = self._piece
            keys = keyed_words(self.seed, epoch, samples)
            tokens = [] if lengths is None else [_of_tokens(keys, lengths)]
            self._keys = [_half(one).to(values.device) for one in (keys, *tokens)]
        return next((keys for keys in self._keys if len(keys) == len(values)), None)

    def _layer(self, name: str, call: int) -> tuple[int, int]:
        """Two numbers of 32 bits that belong to this call of a layer, the second odd"""
        if (name, call) not in self._layers:
            word = hashlib.sha256(f"{name}#{call}".encode()).digest()
            first, second = (int.from_bytes(part, "little", signed=True) for part in (word[:4], word[4:8]))
            self._layers[name, call] = first, second | 1
        return self._layers[name, call]

    def _column(self, width: int, device: torch.device) -> Tensor:
        """(D,) int32, the key of each place in a row"""
        if (width, device) not in self._columns:
            self._columns[width, device] = _half(mix(torch.arange(width))).to(device)
        return self._columns[width, device]


def _of_tokens(keys: Tensor, lengths: Tensor) -> Tensor:
    """keys, lengths: (B,).  returns: (N,) int64; a text's first token has the key of its sample"""
    begins = lengths.cumsum(0) - lengths
    places = torch.arange(int(lengths.sum())) - begins.repeat_interleave(lengths)
    spread = mix(places)  # 0 stays 0
    return keys.repeat_interleave(lengths) + spread


def _half(words: Tensor) -> Tensor:
    """64 bits mixed once more, of which the upper half is kept.  returns: int32"""
    return (mix(words) >> 32).to(torch.int32)


def _kept(rows: Tensor, first: int, second: int, columns: Tensor, p: float) -> Tensor:
    """(R, D) bool, True with a chance of 1 − p: a hash of row, call and column in as few passes as look random (tests/runner/test_draws.py)"""
    bits = ((rows ^ first) * second)[:, None] ^ columns  # (R, D)
    bits.mul_(_MULTIPLIERS[0])
    bits.bitwise_xor_(bits >> 15)
    bits.mul_(_MULTIPLIERS[1])
    return bits >= min(round(p * 2**32) - 2**31, 2**31 - 1)
