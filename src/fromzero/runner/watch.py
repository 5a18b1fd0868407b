"""Watch: what steps and evaluations show in, warnings with their mend out, each once. It looks on and changes nothing that is trained.

What decides a warning is in Progress, so that a run that goes on from a checkpoint says what an unbroken one says.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.errors import listed
from fromzero.report.events import Warned
from fromzero.runner.assemble import Job
from fromzero.runner.progress import Level, Progress

WINDOW = 32  # steps whose median a loss and a gradient's norm are measured by
SPREADS = 8.0  # times as far above the median as the highest of those steps was
LOSS_TIMES, LOSS_BEGIN = 2.0, 0.5  # and above so many medians, and this share of the level at the beginning: noise of small losses is none
NORM_TIMES, NORM_BEGIN = 10.0, 2.0
MOVED_AFTER = 3  # steps: a warm-up may begin at 0, and A beside a B of zeros gets its first gradient one step later
RISING, RISEN = 3, 0.1  # evaluations in a row; share of the lowest loss
LEAST_VALUES = 64  # of a layer, below which all may be 0 by chance
SHOWN = 6  # names in a warning


def begin(job: Job, progress: Progress) -> None:
    """Note the tensors that learn, before the first step."""
    if progress.step == 0:
        progress.watched.first = {name: _bits(p) for name, p in job.model.named_parameters() if p.requires_grad}


def after_step(job: Job, progress: Progress, loss: float, norm: float, index: Tensor) -> Iterator[Warned]:
    """loss: mean of the batch.  norm: of its gradient, before it was clipped.  index: (B,) the examples"""
    watched, recipe = progress.watched, job.plan.recipe
    if watched.first and (progress.step - progress.skipped >= MOVED_AFTER or progress.step == job.plan.steps):
        yield from _unmoved(job, progress)
    usual = watched.losses.median
    if _far_above(watched.losses, loss, LOSS_TIMES, LOSS_BEGIN) and _new(progress, "spike"):
        few = f"training examples {index[:8].tolist()}{' …' if len(index) > 8 else ''}"
        what = f"the loss jumped to {loss:.4g} in step {progress.step}, of late its median was {usual:.4g}; {few}"
        yield Warned(what, f"look at them; if it comes back, try optimizer.lr={recipe.optimizer.lr / 3:.2g}, schedule.warmup or clip")
    usual = watched.norms.median
    if recipe.clip is None and _far_above(watched.norms, norm, NORM_TIMES, NORM_BEGIN) and _new(progress, "norm"):
        what = f"the gradient's norm jumped to {norm:.4g} in step {progress.step}, of late its median was {usual:.4g}"
        yield Warned(what, f"one such step can undo many: set clip={2 * usual:.2g}")


def after_evaluation(job: Job, progress: Progress, loss: float, dead: list[str]) -> Iterator[Warned]:
    """loss: on the validation data.  dead: layers of which every output was 0"""
    watched, keep = progress.watched, job.plan.recipe.evaluate.keep
    if new := [name for name in dead if _new(progress, f"dead {name}")]:
        said = "gives" if len(new) == 1 else "give"
        what = f"{listed(new, SHOWN)} {said} 0 for every validation example at step {progress.step}: no gradient passes a dead ReLU"
        yield Warned(what, f"try optimizer.lr={job.plan.recipe.optimizer.lr / 10:g}, inputs scaled to about 1, or LeakyReLU there")
    train = progress.train_loss if progress.train_loss is not None else float("nan")
    apart = bool(watched.judged) and loss > watched.judged[0] and train < watched.judged[1]
    watched.rising = watched.rising + 1 if apart else 0
    watched.judged = [loss, train]
    lowest = progress.best_loss
    if watched.rising >= RISING and lowest is not None and loss > lowest + RISEN * abs(lowest) and _new(progress, "overfit"):
        what = (
            f"the validation loss has risen {watched.rising} times in a row, from {lowest:.4g} at step {progress.best_step} to {loss:.4g},"
        )
        kept = f"the weights of step {progress.best_step} are kept" if keep == "best" else "the last weights are kept"
        mend = "stop earlier (evaluate.stop_after), or more data, data.augment, weight_decay, dropout"
        mend = mend if keep == "best" else f"set evaluate.keep: best; {mend}"
        yield Warned(f"{what} while the training loss falls: it learns its examples by heart; {kept}", mend)


@contextmanager
def watching_relus(job: Job) -> Iterator[Callable[[], list[str]]]:
    """For as long as this lasts, look at what ReLUs give.  yields: the names of those that gave nothing but 0

    A layer is looked at until it gives more. Compiled code has no place for looking.
    """
    zeros, alive = Counter[str](), set[str]()

    def look(name: str) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            if name in alive or output.is_meta:
                return
            if bool(output.any()):
                alive.add(name)
            else:
                zeros[name] += output.numel()

        return hook

    relus = {} if job.plan.compiled else {name: m for name, m in job.model.named_modules() if isinstance(m, (nn.ReLU, nn.ReLU6))}
    handles = [module.register_forward_hook(look(name)) for name, module in relus.items()]
    try:
        yield lambda: [name for name, count in zeros.items() if name not in alive and count >= LEAST_VALUES]
    finally:
        for handle in handles:
            handle.remove()


def _new(progress: Progress, what: str) -> bool:
    """Whether it was not said before; from now on it was."""
    new = what not in progress.watched.said
    if new:
        progress.watched.said.append(what)
    return new


def _far_above(level: Level, value: float, times: float, begin: float) -> bool:
    """Whether a figure lies far above where it stood of late, and count it in. The median is taken once for WINDOW steps."""
    far = level.begin is not None and value > max(
        level.median + (times - 1) * abs(level.median), level.median + SPREADS * (level.highest - level.median), begin * level.begin
    )
    level.values.append(value)
    if len(level.values) == WINDOW:
        level.median, level.highest = statistics.median(level.values), max(level.values)
        level.begin = level.median if level.begin is None else level.begin
        level.values.clear()
    return far


def _unmoved(job: Job, progress: Progress) -> Iterator[Warned]:
    first, parameters = progress.watched.first, dict(job.model.named_parameters())
    still = [name for name, bits in first.items() if _bits(parameters[name]) == bits]
    if still:
        steps = progress.step - progress.skipped
        what = f"{len(still)} of {len(first)} tensors that should learn have not moved after {steps} steps: {listed(still, SHOWN)}"
        yield Warned(what, "no gradient reaches them, or their learning rate is too small for their type")
    progress.watched.first = {}


def _bits(tensor: Tensor) -> int:
    """A sum over the bits of all values: a tensor that moves changes it."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().reshape(-1).view(whole).sum(dtype=torch.int64))
