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

from fromzero.data import Examples, Numbers
from fromzero.data.answers import Answers
from fromzero.objectives import Loss, Metrics

AT_LEAST = 256  # samples at once where nothing is kept for a backward pass


@dataclass
class Judge:
    """What it takes to measure a module. batch: samples at once."""

    loss: Loss
    metrics: Metrics
    answers: Answers
    device: torch.device
    dtype: torch.dtype
    around: Callable[[], AbstractContextManager[Any]]
    batch: int = AT_LEAST

    def on_device(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Floats in the model's type, both on the model's device."""
        inputs = inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)
        return inputs, targets.to(self.device, self.dtype if targets.is_floating_point() else None)

    @torch.no_grad()
    def measure(self, model: nn.Module, examples: Examples) -> tuple[float, dict[str, float]]:
        """Mean loss per counted value, and the metrics; the module is left in eval mode."""
        model.eval()
        self.metrics.reset()
        total = torch.zeros((), dtype=torch.float64)
        count = torch.zeros((), dtype=torch.float64)
        for index in torch.arange(len(examples)).split(max(self.batch, AT_LEAST)):
            inputs, targets = self.on_device(*examples.take(index))
            with self.around():
                outputs = model(inputs)
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
