"""Schedules against torch's, step by step, and against their formulas."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from fromzero.errors import RecipeError
from fromzero.optim import SCHEDULES, lr_factor


def torch_factors(make, steps):
    """What torch's scheduler gives an optimizer with lr 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def our_factors(name, total, **options):
    return [lr_factor(name, step, total, **options) for step in range(total)]


def close(theirs):
    return pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_there_are_five_schedules():
    assert list(SCHEDULES) == ["constant", "linear", "cosine", "step", "one_cycle"]


def test_constant_stays():
    assert our_factors("constant", 5) == [1.0] * 5


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_linear_is_torch_linear_lr(floor):
    theirs = torch_factors(lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=floor, total_iters=20), 20)
    assert our_factors("linear", 20, floor=floor) == close(theirs)
    assert our_factors("linear", 20, floor=floor) == close([1 - (1 - floor) * t / 20 for t in range(20)])


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torch_cosine_annealing(floor):
    theirs = torch_factors(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=floor), 20)
    assert our_factors("cosine", 20, floor=floor) == close(theirs)
    by_formula = [floor + (1 - floor) * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(20)]
    assert our_factors("cosine", 20, floor=floor) == close(by_formula)


@pytest.mark.parametrize(("every", "steps"), [(7, 7), (0.34, 10), (1.0, 1), (0.001, 1)])
def test_step_is_torch_step_lr(every, steps):
    theirs = torch_factors(lambda o: lr_scheduler.StepLR(o, step_size=steps, gamma=0.5), 30)
    assert our_factors("step", 30, every=every, factor=0.5) == close(theirs)


def test_step_drops_twice_by_default():
    assert our_factors("step", 100) == close([1.0] * 34 + [0.1] * 34 + [0.01] * 32)


@pytest.mark.parametrize(("total", "peak_at"), [(100, 0.3), (37, 0.3), (10, 0.25), (7, 0.9), (2, 0.3), (1, 0.3)])
def test_one_cycle_has_the_numbers_of_torch(total, peak_at):
    theirs = torch_factors(
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=total, pct_start=peak_at, cycle_momentum=False),
        total,
    )
    assert our_factors("one_cycle", total, peak_at=peak_at) == theirs


def test_one_cycle_rises_from_a_25th_to_1_and_falls_to_almost_nothing():
    found = our_factors("one_cycle", 100)
    assert (found[0], found[29], found[99]) == close((1 / 25, 1.0, 1 / 25e4))
    assert found[:30] == sorted(found[:30])
    assert found[29:] == sorted(found[29:], reverse=True)


def test_one_cycle_begins_at_the_top_where_no_step_is_left_to_rise():
    assert our_factors("one_cycle", 10, peak_at=0.1)[0] == 1.0  # torch divides by zero here


@pytest.mark.parametrize(("warmup", "rise"), [(5, 5), (0.25, 5), (1, 1), (0.01, 0)])
@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warmup_is_torch_linear_lr_followed_by_the_schedule(name, warmup, rise):
    def make(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / (rise + 1), total_iters=rise)
        after = (
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 - rise)
            if name == "cosine"
            else lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        )
        return lr_scheduler.SequentialLR(optimizer, [warm, after], milestones=[rise])

    ours = our_factors(name, 20, warmup=warmup)
    assert ours[: rise + 1] == close([(t + 1) / (rise + 1) for t in range(rise + 1)])
    if rise:
        assert ours == close(torch_factors(make, 20))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (3, 3), (3, 50), (40, 0.1)])
def test_every_factor_is_above_0_and_at_most_1(name, total, warmup):
    found = our_factors(name, total, warmup=warmup)
    assert all(0 < value <= 1 for value in found)
    assert all(0 <= lr_factor(name, total + late, total, warmup=warmup) <= 1 for late in (0, 1, 90))


def test_a_share_of_every_counts_all_steps_with_those_of_the_warmup():
    assert our_factors("step", 40, warmup=20, every=0.25)[20:] == close([1.0] * 10 + [0.1] * 10)


@pytest.mark.parametrize(("name", "end"), [("linear", 0.2), ("cosine", 0.2), ("one_cycle", 1 / 25e4)])
def test_after_the_last_step_the_end_stays(name, end):
    assert [lr_factor(name, step, 10, floor=0.2) for step in (10, 11, 25)] == close([end] * 3)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(RecipeError, match="there is no schedule 'cosin'; did you mean 'cosine'"):
        lr_factor("cosin", 0, 10)
