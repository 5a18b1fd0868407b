"""Step: one batch in, the gradients of its mean loss out. The batch may be cut into pieces; the division happens once.

Dims: N tokens end to end, R rows that ask for a prediction, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fromzero.data import IGNORED, Inputs
from fromzero.models import Decoder
from fromzero.objectives import Loss
from fromzero.runner.cut import Tail, run

Pieces = Sequence[Callable[[], tuple[Inputs, Tensor]]]  # each makes its part of the batch when it is its turn
Around = Callable[[], AbstractContextManager[Any]]  # entered for each forward pass (mixed precision)


class Part(NamedTuple):
    """Outputs, their targets, sum and count of the loss. whole: there is no other part."""

    outputs: Tensor
    targets: Tensor
    total: Tensor
    counted: Tensor
    whole: bool


def gradients(model: nn.Module, pieces: Pieces, loss: Loss, around: Around, *, rows: int | None = None) -> tuple[float, float]:
    """Fill the gradients with those of the batch's mean loss, whatever the pieces.

    A whole batch is divided before the backward pass, which is what a plain loop does, bit for bit; sums over several
    pieces are added up and divided once at the end.

    rows:     most scores over a vocabulary at once, see `judged`
    returns:  sum and count over the batch
    """
    total, count, divided = 0.0, 0.0, False
    for piece in pieces:
        for part in judged(model, *piece(), loss, around, rows=rows):
            divided = part.whole and len(pieces) == 1
            (part.total / part.counted if divided else part.total).backward()
            total += part.total.item()  # waits for the device
            count += part.counted.item()
    if not divided:
        divide(model, count)
    return total, count


def judged(model: nn.Module, inputs: Inputs, targets: Tensor, loss: Loss, around: Around, *, rows: int | None = None) -> Iterator[Part]:
    """Run the model and judge what it says, part by part; each part's backward pass comes before the next part is asked for.

    Only rows that ask for a prediction are judged. Of a decoder no others are scored either, and `rows` of them at a time:
    the (N, V) matrix of all scores is never in memory. The states behind them get their gradient when all parts have theirs.
    """
    keep = None
    if not targets.is_floating_point() and bool((targets == IGNORED).any()):
        keep = (targets != IGNORED).nonzero()[:, 0]  # (R,)
        targets = targets[keep]
    whole = model.whole if isinstance(model, Tail) else model
    speaker = whole if isinstance(whole, Decoder) and whole.outputs is None else None
    with around():
        states = run(model, inputs)
        states = states if keep is None else states[keep]
        if speaker is None or rows is None or len(states) <= rows:
            outputs = states if speaker is None else speaker.scores(states)
            only = Part(outputs, targets, *loss(outputs, targets), whole=True)
    if speaker is None or rows is None or len(states) <= rows:
        yield only
        return
    cut = states.detach().requires_grad_(states.requires_grad)
    for some, wanted in zip(cut.split(rows), targets.split(rows), strict=True):
        with around():
            outputs = speaker.scores(some)
            part = Part(outputs, wanted, *loss(outputs, wanted), whole=False)
        yield part
    if cut.grad is not None:
        states.backward(cut.grad)


def divide(model: nn.Module, count: float) -> None:
    """Divide every gradient by the batch's count."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(count)
