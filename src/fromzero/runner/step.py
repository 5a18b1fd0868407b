"""Step: one batch in, the weights moved once. The batch may be cut into pieces; the division happens once.

Dims: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data import Inputs
from fromzero.objectives import Loss

Pieces = Sequence[Callable[[], tuple[Inputs, Tensor]]]  # each makes its part of the batch when it is its turn


def gradients(model: nn.Module, pieces: Pieces, loss: Loss, around: Callable[[], AbstractContextManager[Any]]) -> tuple[float, float]:
    """Fill the gradients with those of the batch's mean loss, whatever the pieces.

    A whole batch is divided before the backward pass, which is what a plain loop does, bit for bit; sums over several
    pieces are added up and divided once at the end.

    around:   entered for each forward pass (mixed precision)
    returns:  sum and count over the batch
    """
    total, count = 0.0, 0.0
    whole = len(pieces) == 1
    for piece in pieces:
        inputs, targets = piece()
        with around():
            part, counted = loss(model(*inputs), targets)
        (part / counted if whole else part).backward()
        total += part.item()  # waits for the device
        count += counted.item()
    if not whole:
        divide(model, count)
    return total, count


def divide(model: nn.Module, count: float) -> None:
    """Divide every gradient by the batch's count."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(count)
