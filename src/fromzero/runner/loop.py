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
from fromzero.runner.before import Before
from fromzero.runner.numbers import gradient_norm, refuse_not_finite, skip_or_stop
from fromzero.runner.pieces import batch_ends
from fromzero.runner.progress import Progress
from fromzero.runner.watch import after_evaluation, after_step, begin, watching_relus
from fromzero.tuning import moving_state, set_training


@dataclass
class Best:
    """The weights that learn, as they were at the lowest validation loss so far; None where the last ones are kept."""

    weights: dict[str, Tensor] | None = None


def train(job: Job, progress: Progress, best: Best, stopping: Callable[[], bool]) -> Iterator[Event]:
    """Run until the plan's last step, or until `stopping` says so; it is asked after each step, when all events of that step were told.

    raises: NumbersError where loss or gradient is no finite number; the weights are then those before that step
    """
    recipe, plan = job.plan.recipe, job.plan
    size, began = len(job.train), time.perf_counter() - progress.seconds
    set_training(job.model, job.frozen)
    begin(job, progress)
    before = Before(job)
    while not is_over(plan, progress):
        order = epoch_order(recipe.seed, progress.epoch, size)
        ends = batch_ends(job, order)
        while not is_over(plan, progress):
            index, epoch = order[progress.index : ends[bisect_right(ends, progress.index)]], progress.epoch
            lr = set_learning_rate(job, progress.step)
            job.optimizer.zero_grad()
            before.note()
            (total, count), changed = sure_gradients(job, index, epoch, before)
            for what in changed:
                yield Warned(what, "the step was begun anew; nothing was lost")
            norm = gradient_norm(job)
            skipped = skip_or_stop((total, count), norm, job, progress, index, epoch, before)
            if skipped is not None:
                progress.advance(len(index), 0.0, 0.0, size)  # order and schedule go on; the mean loss is that of the steps that were made
                yield skipped
            else:
                if recipe.clip is not None:
                    clip(job, norm)
                job.optimizer.step()
                progress.advance(len(index), total, count, size)
                progress.seconds = time.perf_counter() - began
                yield StepDone(progress.step, epoch + 1, progress.samples, total / count, lr, float(norm))
                yield from after_step(job, progress, total / count, float(norm), index)
            if is_evaluated(plan, progress.step):
                events = evaluate_and_keep(job, progress, best, epoch + 1)
                progress.seconds = time.perf_counter() - began
                yield from events
            if stopping():
                return
            if progress.index == 0:
                break


def is_over(plan: Plan, progress: Progress) -> bool:
    """Whether the last step is taken, or evaluations have brought nothing for as long as the recipe waits."""
    patience = plan.recipe.evaluate.stop_after
    return progress.step >= plan.steps or (patience is not None and progress.without_gain >= patience)


def is_evaluated(plan: Plan, step: int) -> bool:
    """Whether an evaluation belongs to a step."""
    return step % plan.evaluate_every == 0 or step == plan.steps


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


def evaluate_and_keep(job: Job, progress: Progress, best: Best, epoch: int) -> list[Event]:
    """Measure on the validation data, and keep the weights if they are the best so far.

    returns: what was measured, and warnings.  raises: NumbersError where weights to keep are no finite numbers
    """
    train_loss = progress.take_train_loss()
    if job.fed_validation is None:
        return [Evaluated(progress.step, epoch, float("nan"), train_loss)]
    with watching_relus(job) as dead:
        loss, metrics = job.judge.measure(job.stepped, job.fed_validation)
    set_training(job.model, job.frozen)
    better = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.without_gain = loss, progress.step, 0
        if job.plan.recipe.evaluate.keep == "best":
            moving = moving_state(job.model, job.frozen)
            refuse_not_finite(moving, job, progress.step)
            best.weights = {name: tensor.detach().clone() for name, tensor in moving.items()}
    else:
        progress.without_gain += 1
    if better or best.weights is None:
        progress.kept = {"step": progress.step, "loss": loss, "metrics": metrics}
    warned = after_evaluation(job, progress, loss, dead())
    return [Evaluated(progress.step, epoch, loss, train_loss, metrics, better), *warned]
