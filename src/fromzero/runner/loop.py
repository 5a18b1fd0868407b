"""The loop: a job and its progress in, events out. Read it from top to bottom; nothing else trains.

Dims: B batch.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fromzero.data import epoch_order
from fromzero.planner.values import Plan
from fromzero.report.events import Evaluated, Event, StepDone, Warned
from fromzero.runner.again import sure_gradients
from fromzero.runner.assemble import Job
from fromzero.runner.numbers import gradient_norm, refuse_what_is_no_number
from fromzero.runner.pieces import batch_ends
from fromzero.runner.progress import Progress
from fromzero.tuning import moving_state, set_training


@dataclass
class Best:
    """The weights that learn, as they were at the lowest validation loss so far; None where the last ones are kept."""

    weights: dict[str, Tensor] | None = None


def train(job: Job, progress: Progress, best: Best, stopping: Callable[[], bool]) -> Iterator[Event]:
    """Run until the plan's last step, or until `stopping` says so after a step.

    raises: NumbersError where loss or gradient is no finite number; the weights are then those before that step
    """
    recipe, plan = job.plan.recipe, job.plan
    size, began = len(job.train), time.perf_counter() - progress.seconds
    set_training(job.model, job.frozen)
    while not ended(plan, progress):
        order = epoch_order(recipe.seed, progress.epoch, size)
        ends = batch_ends(job, order)
        while progress.step < plan.steps:
            index, epoch = order[progress.index : ends[bisect_right(ends, progress.index)]], progress.epoch
            lr = set_learning_rate(job, progress.step)
            job.optimizer.zero_grad()
            (total, count), changed = sure_gradients(job, index, epoch)
            for what in changed:
                yield Warned(what, "the step was begun anew; nothing was lost")
            norm = gradient_norm(job)
            refuse_what_is_no_number(total, count, norm, job, progress, index)
            if recipe.clip is not None:
                clip(job, norm)
            job.optimizer.step()
            progress.advance(len(index), total, count, size)
            progress.seconds = time.perf_counter() - began
            yield StepDone(progress.step, epoch + 1, progress.samples, total / count, lr, float(norm))
            if evaluates_at(plan, progress.step):
                evaluated = evaluate_and_keep(job, progress, best, epoch + 1)
                progress.seconds = time.perf_counter() - began
                yield evaluated
                if ended(plan, progress):
                    return
            if stopping():
                return
            if progress.index == 0:
                break


def evaluates_at(plan: Plan, step: int) -> bool:
    """Whether a step is followed by an evaluation."""
    return step % plan.evaluate_every == 0 or step == plan.steps


def ended(plan: Plan, progress: Progress) -> bool:
    """Whether all steps are taken, or enough evaluations were without a gain."""
    stop_after = plan.recipe.evaluate.stop_after
    return progress.step >= plan.steps or (stop_after is not None and progress.without_gain >= stop_after)


def set_learning_rate(job: Job, step: int) -> float:
    """Put this step's learning rate into every group.  returns: that of the first"""
    factor = job.factor(step)
    for group in job.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(job.optimizer.param_groups[0]["lr"])


def clip(job: Job, norm: Tensor) -> None:
    """Scale the whole gradient, whose norm is given, down to the recipe's."""
    assert job.plan.recipe.clip is not None
    trained = [p for p in job.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grads_with_norm_(trained, job.plan.recipe.clip, norm)


def evaluate_and_keep(job: Job, progress: Progress, best: Best, epoch: int) -> Evaluated:
    """Measure on the validation data, and keep the weights if they are the best so far."""
    train_loss = progress.take_train_loss()
    if job.fed_validation is None:
        return Evaluated(progress.step, epoch, float("nan"), train_loss)
    loss, metrics = job.judge.measure(job.stepped, job.fed_validation)
    set_training(job.model, job.frozen)
    better = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.without_gain = loss, progress.step, 0
        if job.plan.recipe.evaluate.keep == "best":
            best.weights = {name: tensor.detach().clone() for name, tensor in moving_state(job.model, job.frozen).items()}
    else:
        progress.without_gain += 1
    if better or progress.kept is None or job.plan.recipe.evaluate.keep == "last":
        progress.kept = {"step": progress.step, "loss": loss, "metrics": metrics}
    return Evaluated(progress.step, epoch, loss, train_loss, metrics, better)
