"""Progress: the one thing that changes while a run goes on, and all of it that a restart needs beside tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Level:
    """Where a figure of each step stands of late.

    values:           of the steps since the last median was taken
    median, highest:  of the steps before these
    begin:            the first median; None while there is none
    """

    values: list[float] = field(default_factory=list)
    median: float = 0.0
    highest: float = 0.0
    begin: float | None = None


@dataclass
class Watched:
    """What decides which warnings a run still has to say.

    said:    what was said already
    first:   a sum over the bits of each tensor that learns, before the first step; empty once they were looked at
    judged:  validation and training loss at the last evaluation.  rising: evaluations in a row in which these two moved apart
    """

    said: list[str] = field(default_factory=list)
    first: dict[str, int] = field(default_factory=dict)
    losses: Level = field(default_factory=Level)
    norms: Level = field(default_factory=Level)
    judged: list[float] = field(default_factory=list)
    rising: int = 0

    @staticmethod
    def restored(values: dict[str, Any]) -> Watched:
        return Watched(**{**values, "losses": Level(**values["losses"]), "norms": Level(**values["norms"])})


@dataclass
class Progress:
    """index: position in the epoch's order.  loss_sum, loss_count: since the last evaluation, of steps that were not skipped."""

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
    kept: dict[str, Any] | None = None  # step, loss and metrics of the evaluation whose weights the run keeps
    sampled: list[dict[str, Any]] = field(default_factory=list)  # all texts that were written to read along
    seconds: float = 0.0  # spent training, over all restarts
    started: bool = False
    skipped: int = 0  # steps whose loss or gradient was no finite number
    watched: Watched = field(default_factory=Watched)

    def __post_init__(self) -> None:
        if isinstance(self.watched, dict):  # as a checkpoint holds it
            self.watched = Watched.restored(self.watched)

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
