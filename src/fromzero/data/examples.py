"""Examples: indices in, a batch of inputs and targets out. Knows no file, no recipe and no model.

Inputs are a tuple of tensors, the arguments of the model: (pixels,) for an image, (tokens, offsets) for text.
Dims: B batch, M all examples of a set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
IGNORED = -100  # a target with this value asks for no prediction


class Examples(Protocol):
    """A set of M examples that can be taken in any order, any number of times."""

    @property
    def targets(self) -> Tensor:
        """(M,) int64 class indices, or (M, K) float32 values"""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> tuple[Inputs, Tensor]:
        """index: (B,) int64 on the CPU.  returns: inputs of B examples, and their targets"""


@dataclass(frozen=True)
class TensorExamples:
    """Examples that lie in memory: a batch is one indexing of whole tensors.

    inputs:   (M, …); uint8 stays uint8 until it is taken, and is then divided by `divisor`
    divisor:  what uint8 inputs are divided by to become float32
    """

    inputs: Tensor
    targets: Tensor
    divisor: float | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor) -> tuple[Inputs, Tensor]:
        inputs = self.inputs.index_select(0, index)
        if self.divisor is not None:
            inputs = inputs.to(torch.float32).div_(self.divisor)
        return (inputs,), self.targets.index_select(0, index)


@dataclass(frozen=True)
class ItemExamples:
    """Examples fetched one by one each time they are asked for: a user's Dataset, or images too many for memory."""

    items: Callable[[int], Any]
    targets: Tensor
    rows: tuple[int, ...]  # example → item

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Inputs, Tensor]:
        inputs = torch.stack([torch.as_tensor(self.items(self.rows[i])) for i in index.tolist()])
        return (inputs,), self.targets.index_select(0, index)
