"""Judging: a module and examples in, mean loss and metrics out: every sample once, whatever the batch.

Dims: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fromzero.data import Examples, Inputs, KeptExamples, Numbers, TextExamples
from fromzero.data.answers import Answers
from fromzero.objectives import Loss, Metrics
from fromzero.runner.step import Around, judged


@dataclass
class Judge:
    """What it takes to measure a module. batch: samples at once; rows: most scores over a vocabulary at once."""

    loss: Loss
    metrics: Metrics
    answers: Answers
    device: torch.device
    dtype: torch.dtype
    around: Around
    batch: int
    rows: int | None = None

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
            for part in judged(model, inputs, targets, self.loss, self.around, rows=self.rows):
                total += part.total.double().cpu()
                count += part.counted.double().cpu()
                self.metrics.update(self._in_units(part.outputs), self._in_units(part.targets))
        text_bytes = examples.bytes if isinstance(examples, (TextExamples, KeptExamples)) and index is None else 0
        return float(total / count), self.metrics.compute(text_bytes=text_bytes)

    def _in_units(self, values: Tensor) -> Tensor:
        """Numbers in the data's own units; class scores as they are."""
        if isinstance(self.answers, Numbers):
            return self.answers.restored(values.reshape(len(values), -1).cpu())
        return values.float().cpu() if values.dtype is torch.bfloat16 else values.cpu()
