"""Losses: outputs and targets in, a sum and a count out. Never averages, logs, moves tensors or looks at data.

Dims: B batch, C classes, K numbers per sample. Every sum is float32 or wider, on the device of the outputs:
float64 outputs stay float64, bf16 and half are widened before the first operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero.errors import ShapeError

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_NO_TARGET_IS_SKIPPED = torch.iinfo(torch.int64).min  # torch would skip -100 silently, and the count would be wrong


def cross_entropy(
    outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add up -log softmax(outputs) at the targets, and count the targets.

    With weights the count is the weight of the targets (before smoothing), so that sum / count is the weighted mean.
    For probabilities torch divides by B instead; here a one-hot row counts as much as the index it stands for.
    Indices outside 0..C-1 are the planner's to find: torch checks them on the CPU, a GPU stops with an assertion.

    outputs:        (B, C, …) logits, any float type
    targets:        (B, …) integer indices, or (B, C, …) float probabilities
    class_weights:  (C,) on the device of the outputs
    returns:        () float32 or float64 in nats, and () int64, or () float where there are weights
    raises:         ShapeError if the shapes do not belong together
    source:         smoothing over all C classes, arXiv:1512.00567 section 7
    """
    _require_classes(outputs, targets, class_weights)
    logits = _wide(outputs)
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets.long()
    nats = F.cross_entropy(
        logits, targets, weight=weights, ignore_index=_NO_TARGET_IS_SKIPPED, reduction="sum", label_smoothing=label_smoothing
    )
    if weights is None:
        return nats, _count(outputs, outputs.numel() // outputs.shape[1])
    if targets.is_floating_point():
        return nats, (targets.movedim(1, -1) @ weights).sum()  # (B, …) before the sum
    return nats, weights[targets].sum()


def bce(outputs: Tensor, targets: Tensor, *, pos_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Add up the binary cross-entropy of every element; positive answers weigh `pos_weight`, all count as one.

    outputs:  (B,) or (B, K) logits, any float type
    targets:  the same shape, from 0 to 1; (B,) and (B, 1) belong together
    returns:  () float32 or float64 in nats, and () int64, the number of elements
    raises:   ShapeError if the two disagree
    """
    logits, answers = _alike(outputs, targets)
    weight = None if pos_weight == 1.0 else logits.new_full((), pos_weight)
    nats = F.binary_cross_entropy_with_logits(logits, answers, reduction="sum", pos_weight=weight)
    return nats, _count(outputs, outputs.numel())


def mse(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the squared errors of every element.

    outputs:  (B,) or (B, K), any float type
    targets:  the same shape; (B,) and (B, 1) belong together
    returns:  () float32 or float64 in squared units of the target, and () int64, the number of elements
    raises:   ShapeError if the two disagree
    """
    values, answers = _alike(outputs, targets)
    return F.mse_loss(values, answers, reduction="sum"), _count(outputs, outputs.numel())


def mae(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the absolute errors of every element; shapes as in `mse`, the sum in units of the target."""
    values, answers = _alike(outputs, targets)
    return F.l1_loss(values, answers, reduction="sum"), _count(outputs, outputs.numel())


def huber(outputs: Tensor, targets: Tensor, *, delta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Add up half the squared errors up to `delta`, and beyond it the line that goes on with the same slope.

    Shapes as in `mse`; `delta` in units of the target.
    source:   Huber 1964, Robust estimation of a location parameter, doi:10.1214/aoms/1177703732
    """
    values, answers = _alike(outputs, targets)
    return F.huber_loss(values, answers, reduction="sum", delta=delta), _count(outputs, outputs.numel())


LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "mse": mse,
    "mae": mae,
    "huber": huber,
}


def predicted_start(name: str, outputs_width: int) -> float | None:
    """Loss of a network that knows nothing yet (all logits alike), in nats; None where it depends on the data.

    For losses without weights: `pos_weight` moves the start of bce by the share of positive answers.
    """
    if name == "cross_entropy":
        return math.log(outputs_width)
    return math.log(2) if name == "bce" else None


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _count(like: Tensor, number: int) -> Tensor:
    """A count beside the outputs, filled in there: torch.tensor(number, device=…) would make a GPU wait."""
    return torch.full((), number, dtype=torch.int64, device=like.device)


def _require_classes(outputs: Tensor, targets: Tensor, class_weights: Tensor | None) -> None:
    probabilities = targets.is_floating_point()
    expected = outputs.shape if probabilities else outputs.shape[:1] + outputs.shape[2:]
    if outputs.ndim < 2 or targets.shape != expected:
        raise ShapeError(
            f"targets {tuple(targets.shape)} of {targets.dtype} do not fit logits {tuple(outputs.shape)}",
            why="logits are (B, C); targets are (B,) integers that name a class, or (B, C) float probabilities",
            mend="give the model one output for each class, and one target for each sample",
        )
    if class_weights is not None and class_weights.shape != outputs.shape[1:2]:
        raise ShapeError(
            f"class weights {tuple(class_weights.shape)} do not fit logits {tuple(outputs.shape)}",
            why="there is one weight for each class, and the logits have a class in each column",
            mend=f"give {outputs.shape[1]} class weights",
        )


def _alike(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the outputs' shape and width; (B, 1) against (B,) must never be broadcast to (B, B)."""
    samples = outputs.shape[:1]
    single = outputs.ndim > 0 and {outputs.shape, targets.shape} == {samples, (*samples, 1)}
    if outputs.shape != targets.shape and not single:
        raise ShapeError(
            f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape)}",
            why="each output is compared with one target",
            mend="give the model as many outputs as there are target columns",
        )
    values = _wide(outputs)
    return values, targets.to(values.dtype).reshape(values.shape)
