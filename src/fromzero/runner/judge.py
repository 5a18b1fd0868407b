"""Judging: a module and examples in, mean loss and metrics out: every sample once, whatever the batch.

Dims: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data import Examples, Inputs, Numbers
from fromzero.data.answers import Answers
from fromzero.objectives import Loss, Metrics


@dataclass
class Judge:
    """What it takes to measure a module. batch: samples at once."""

    loss: Loss
    metrics: Metrics
    answers: Answers
    device: torch.device
    dtype: torch.dtype
    around: Callable[[], AbstractContextManager[Any]]
    batch: int

    def on_device(self, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
        """Floats in the model's type, all on the model's device."""
        *moved, targets = (t.to(self.device, self.dtype if t.is_floating_point() else None) for t in (*inputs, targets))
        return tuple(moved), targets

    @torch.no_grad()
    def measure(self, model: nn.Module, examples: Examples, index: Tensor | None = None) -> tuple[float, dict[str, float]]:
        """Mean loss per counted value, and the metrics, of all examples or those of an index; the module is left in eval mode."""
        model.eval()
        self.metrics.reset()
        total = torch.zeros((), dtype=torch.float64)
        count = torch.zeros((), dtype=torch.float64)
        for part_of in (torch.arange(len(examples)) if index is None else index).split(self.batch):
            inputs, targets = self.on_device(*examples.take(part_of))
            with self.around():
                outputs = model(*inputs)
                part, counted = self.loss(outputs, targets)
            total += part.double().cpu()
            count += counted.double().cpu()
            self.metrics.update(self._in_units(outputs), self._in_units(targets))
        return float(total / count), self.metrics.compute()

    def _in_units(self, values: Tensor) -> Tensor:
        """Numbers in the data's own units; class scores as they are."""
        if isinstance(self.answers, Numbers):
            return self.answers.restored(values.reshape(len(values), -1).cpu())
        return values.float().cpu() if values.dtype is torch.bfloat16 else values.cpu()
