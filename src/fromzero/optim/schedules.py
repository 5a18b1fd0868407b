"""Schedules: a step and the number of all steps in, the factor on the learning rate out. Knows no optimizer.

Steps count from 0. A schedule that falls reaches its floor at step `total`, one after the last, so that no step is
spent at a learning rate of 0. There is no state: a resumed run asks for its step and gets the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fromzero.errors import RecipeError, did_you_mean

ONE_CYCLE_START = 1 / 25  # of the top; both as torch's OneCycleLR has them
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def lr_factor(
    name: str,
    step: int,
    total: int,
    *,
    warmup: float = 0.0,
    floor: float = 0.0,
    every: float = 0.34,
    factor: float = 0.1,
    peak_at: float = 0.3,
) -> float:
    """What the learning rate is multiplied by at this step.

    The warm-up rises in equal parts from 0 (before the first step) to 1 (the first step after it); the schedule runs
    over the steps that remain. A value below 1 of `warmup` and `every` is a share of `total`, rounded to whole steps.

    raises:   RecipeError on an unknown name
    source:   warm-up: arXiv:1706.02677 section 2.2, there from the base rate instead of 0
    """
    if name not in SCHEDULES:
        raise RecipeError(
            f"there is no schedule '{name}'",
            why=did_you_mean(name, SCHEDULES),
            mend="known are " + ", ".join(SCHEDULES),
            key="schedule.name",
        )
    rise = _whole_steps(warmup, total)
    if step < rise:
        return (step + 1) / (rise + 1)
    shape = SCHEDULES[name]
    every = _whole_steps(every, total)  # a share of all steps, not of those that remain
    return shape(step - rise, max(1, total - rise), floor=floor, every=every, factor=factor, peak_at=peak_at)


def follows_length(name: str, *, warmup: float = 0.0, every: float = 0.34, **_: float) -> bool:
    """Whether the factor of some step depends on how many there are in all."""
    return name not in ("constant", "step") or 0 < warmup < 1 or (name == "step" and every < 1)


def constant(step: int, total: int, **_: float) -> float:
    """1 at every step."""
    return 1.0


def linear(step: int, total: int, *, floor: float = 0.0, **_: float) -> float:
    """A line from 1 to the floor; as in arXiv:1810.04805 appendix A.2."""
    return 1 + (floor - 1) * _progress(step, total)


def cosine(step: int, total: int, *, floor: float = 0.0, **_: float) -> float:
    """Half a cosine from 1 to the floor; arXiv:1608.03983 equation 5, without restarts."""
    return _cosine_between(1.0, floor, _progress(step, total))


def step_down(step: int, total: int, *, every: float = 0.34, factor: float = 0.1, **_: float) -> float:
    """`factor` once more after every so many steps; arXiv:1512.03385 section 3.4, at set steps instead of plateaus."""
    return float(factor ** (step // max(1, _whole_steps(every, total))))


def one_cycle(step: int, total: int, *, peak_at: float = 0.3, **_: float) -> float:
    """Half a cosine up to 1 at `peak_at` of the steps, then half a cosine down to almost 0 at the last.

    source:   arXiv:1708.07120 section 3, in the form of torch.optim.lr_scheduler.OneCycleLR (two phases, cosine);
              the momentum does not move
    """
    peak = peak_at * total - 1
    if step <= peak:
        return _cosine_between(ONE_CYCLE_START, 1.0, step / peak if peak > 0 else 1.0)
    return _cosine_between(1.0, ONE_CYCLE_END, min(1.0, (step - peak) / (total - 1 - peak)))


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step_down,
    "one_cycle": one_cycle,
}


def _progress(step: int, total: int) -> float:
    return min(1.0, step / total)


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * progress) + 1)


def _whole_steps(value: float, total: int) -> int:
    return round(value * total if value < 1 else value)
