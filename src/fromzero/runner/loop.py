"""The loop: a job and its progress in, events out. Read it from top to bottom; nothing else trains.

Dims: B batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fromzero.data import Inputs, epoch_order
from fromzero.errors import NumbersError
from fromzero.report.events import Evaluated, Event, StepDone
from fromzero.runner.assemble import Job
from fromzero.runner.progress import Progress
from fromzero.runner.step import Pieces, gradients
from fromzero.tuning import set_training


@dataclass
class Best:
    """The weights with the lowest validation loss so far, in memory; None where the last ones are kept."""

    weights: dict[str, Tensor] | None = None


def train(job: Job, progress: Progress, best: Best, stopping: Callable[[], bool]) -> Iterator[Event]:
    """Run until the plan's last step, or until `stopping` says so after a step.

    raises: NumbersError where the loss is no finite number; the weights are then those before that step
    """
    recipe, plan = job.plan.recipe, job.plan
    size, began = len(job.train), time.perf_counter() - progress.seconds
    set_training(job.model, job.frozen)
    while progress.step < plan.steps:
        order = epoch_order(recipe.seed, progress.epoch, size)
        while progress.step < plan.steps:
            index, epoch = order[progress.index : progress.index + plan.batch], progress.epoch
            lr = set_learning_rate(job, progress.step)
            job.optimizer.zero_grad()
            total, count = gradients(job.model, pieces(job, index, epoch), job.judge.loss, job.judge.around)
            refuse_what_is_no_number(total, count, job, progress, index)
            norm = clip(job) if recipe.clip is not None else None
            job.optimizer.step()
            progress.advance(len(index), total, count, size)
            progress.seconds = time.perf_counter() - began
            yield StepDone(progress.step, epoch + 1, progress.samples, total / count, lr, norm)
            if progress.step % plan.evaluate_every == 0 or progress.step == plan.steps:
                yield evaluate_and_keep(job, progress, best, epoch + 1)
                if recipe.evaluate.stop_after is not None and progress.without_gain >= recipe.evaluate.stop_after:
                    return
            if stopping():
                return
            if progress.index == 0:
                break


def pieces(job: Job, index: Tensor, epoch: int) -> Pieces:
    """A batch cut as the plan says; each piece is fetched when it is its turn.  index: (B,)"""

    def fetch(part: Tensor) -> tuple[Inputs, Tensor]:
        inputs, targets = job.train.take(part)
        if job.augment is not None:
            inputs = (job.augment(inputs[0], part, seed=job.plan.recipe.seed, epoch=epoch),)
        return job.judge.on_device(inputs, targets)

    if len(index) <= job.plan.micro_batch:
        return [lambda: fetch(index)]
    return [lambda part=part: fetch(part) for part in index.split(job.plan.micro_batch)]  # type: ignore[misc]


def set_learning_rate(job: Job, step: int) -> float:
    """Put this step's learning rate into every group.  returns: that of the first"""
    factor = job.factor(step)
    for group in job.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(job.optimizer.param_groups[0]["lr"])


def clip(job: Job) -> float:
    """Scale the whole gradient down to the recipe's norm.  returns: its norm before"""
    assert job.plan.recipe.clip is not None
    trained = [p for p in job.model.parameters() if p.requires_grad]
    return float(torch.nn.utils.clip_grad_norm_(trained, job.plan.recipe.clip))


def refuse_what_is_no_number(total: float, count: float, job: Job, progress: Progress, index: Tensor) -> None:
    """Stop before the weights are touched."""
    if count > 0 and math.isfinite(total):
        return
    what = "no sample of the batch counts" if count <= 0 else f"the loss is {total / count}"
    raise NumbersError(
        f"step {progress.step + 1}: {what}",
        why=f"training examples {index[:8].tolist()}{' …' if len(index) > 8 else ''}; the weights are those of step {progress.step}",
        mend=f"try optimizer.lr={job.plan.recipe.optimizer.lr / 10:g}, or clip=1, and look at these examples",
    )


def evaluate_and_keep(job: Job, progress: Progress, best: Best, epoch: int) -> Evaluated:
    """Measure on the validation data, and keep the weights if they are the best so far."""
    train_loss = progress.take_train_loss()
    if job.validation is None:
        return Evaluated(progress.step, epoch, float("nan"), train_loss)
    loss, metrics = job.judge.measure(job.model, job.validation)
    set_training(job.model, job.frozen)
    better = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.without_gain = loss, progress.step, 0
        if job.plan.recipe.evaluate.keep == "best":
            best.weights = {name: tensor.detach().clone() for name, tensor in job.model.state_dict().items()}
    else:
        progress.without_gain += 1
    return Evaluated(progress.step, epoch, loss, train_loss, metrics, better)
