"""Progress: the one thing that changes while a run goes on, and all of it that a restart needs beside tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """index: position in the epoch's order.  loss_sum, loss_count: since the last evaluation."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    train_loss: float | None = None  # mean between the last two evaluations
    best_loss: float | None = None
    best_step: int = 0
    without_gain: int = 0  # evaluations since the best
    kept: dict[str, Any] | None = None  # step, loss and metrics of the evaluation of the weights that are kept
    seconds: float = 0.0  # spent training, over all restarts
    started: bool = False

    def advance(self, samples: int, loss_sum: float, loss_count: float, epoch_size: int) -> None:
        self.step += 1
        self.index += samples
        self.samples += samples
        self.loss_sum += loss_sum
        self.loss_count += loss_count
        if self.index >= epoch_size:
            self.epoch += 1
            self.index = 0

    def take_train_loss(self) -> float:
        """The mean loss since it was last taken."""
        if self.loss_count:
            self.train_loss = self.loss_sum / self.loss_count
        self.loss_sum = self.loss_count = 0.0
        return self.train_loss if self.train_loss is not None else float("nan")
