"""Events: what the loop says while it runs. Values that flow out; nothing flows back. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Planned:
    """The plan in short. seconds: predicted, None where nothing was measured."""

    run: str
    steps: int
    steps_per_epoch: int
    parameters: int
    trainable_parameters: int
    seconds: float | None


@dataclass(frozen=True)
class Started:
    """Training begins, at a step that is not 0 when it goes on from a checkpoint. started_at: Unix seconds."""

    run: str
    folder: str
    step: int
    started_at: float


@dataclass(frozen=True)
class Kept:
    """So many of all examples have gone through the frozen part, once; seconds since the first of them."""

    done: int
    total: int
    seconds: float


@dataclass(frozen=True)
class StepDone:
    """One optimizer step. epoch: counted from 1; samples: seen so far; loss: mean per sample of this batch; norm: of the whole gradient, before it was clipped."""

    step: int
    epoch: int
    samples: int
    loss: float
    lr: float
    norm: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """Loss and metrics on the validation data; train_loss is the mean since the last evaluation."""

    step: int
    epoch: int
    loss: float
    train_loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True)
class Sampled:
    """How the model goes on with a beginning from the validation data."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saving:
    """A checkpoint comes next: what was said up to here must last as long as it does. It is no line of a log."""

    step: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint is whole on the disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Warned:
    """Something a person should know; it does not stop the run."""

    what: str
    mend: str = ""


@dataclass(frozen=True)
class Finished:
    """The end. status: done | interrupted | stopped; result: what `train --json` prints."""

    status: str
    step: int
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)


Event = Planned | Started | Kept | StepDone | Evaluated | Sampled | Saving | Saved | Warned | Finished

# What belongs to a step of the run: said once in a log, however often the run was broken off and went on. A log differs from that of an
# unbroken run in the times of these, and in all others, which tell of one process that trained.
OF_A_STEP = ("StepDone", "Evaluated", "Sampled")


def as_json(event: Event) -> dict[str, Any]:
    """An event as one flat JSON object, its kind under `event`; for writing at once, as its values are shared."""
    return {"event": type(event).__name__, **vars(event)}
