"""Probe: a plan and its data in, what a few real steps showed out. It works on objects of its own and throws them away."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fromzero.data import Loaded, TextExamples, epoch_order, largest_batch
from fromzero.devices import forget_peak, give_back_memory, keep_freed_memory, peak_memory
from fromzero.devices.generators import lent
from fromzero.errors import ModelError, first_line
from fromzero.planner.cost import STATE, WIDTH, Way, memory, rows_at_once, trained_values
from fromzero.planner.facts import LARGE
from fromzero.planner.values import Measured, Plan
from fromzero.runner.assemble import Job, Place, assemble
from fromzero.runner.certificate import certify
from fromzero.runner.loop import clip, set_learning_rate
from fromzero.runner.numbers import gradient_norm
from fromzero.runner.pieces import batch_ends, pieces
from fromzero.runner.prefix import kept_before, side_by_side, some_rows, start_at_cut
from fromzero.runner.samples import sample_seconds
from fromzero.runner.step import gradients
from fromzero.tuning import LowRank, moving_state, set_training

LEAST_STEPS = 4
MOST_STEPS = 400
ENOUGH_SECONDS = 0.4  # steps of a small model are many, so that their mean means something: it has the slow ones in it, as a run has
WARM = 4  # one in so many steps, the first ones, warms up and is not counted
MOST_SECONDS, MOST_SHARE = 3.0, 0.05  # of trial steps and certificate together: the larger of this and its share of the run
LONG_STEP = 0.5  # seconds
PASSED = 4  # runs of texts, or one batch of anything else, whose way to the cut is timed
MOST_SAMPLES = 4096  # of a very large batch a part is measured


@dataclass
class Trial:
    """Seconds of each step by what they are for, the loss before it, and what got no gradient in the first."""

    whole: list[float]
    fetch: list[float]
    update: list[float]
    losses: list[float]
    silent: tuple[str, ...]


def probe(plan: Plan, loaded: Loaded, place: Place) -> Measured:
    """Take a few steps on one batch. The random states are put back; the given module is never touched."""
    began = time.perf_counter()
    with lent(plan.recipe.seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says them once
        torch.set_num_threads(plan.threads)
        if plan.keep_memory:
            keep_freed_memory()
        before = peak_memory()
        job = assemble(replace(plan, steps=max(plan.steps, MOST_STEPS)), loaded, place)
        set_training(job.model, job.frozen)
        try:
            measured = _measured(job, before, began, plan.steps)
        except Exception as error:
            if not plan.compiled:
                raise
            failed = f"{type(error).__name__}: {first_line(error)[:80]}"
            return replace(probe(plan.without("compile"), loaded, place), no_compile=failed)
        del job
        if plan.facts.model.parameter_bytes > LARGE:
            give_back_memory()
    return replace(measured, planning_bytes=max(before, peak_memory()), seconds=time.perf_counter() - began)


def _measured(job: Job, before: int, began: float, steps: int) -> Measured:
    """steps: of the run; the job's schedule may have more, so that no trial step is beyond its end"""
    plan, recipe, facts = job.plan, job.plan.recipe, job.plan.facts
    index, largest, others = _batches(job)
    forget_peak()
    _gradients(job, largest)  # warms up, and shows what it needs, but for the optimizer's state
    state = STATE[recipe.optimizer.name] * trained_values(facts) * WIDTH[recipe.precision]
    beyond = [peak_memory() - _counted(job, largest) + state]
    forget_peak()
    trial = _steps(job, steps, index, others)
    whole, fetch, update = (statistics.fmean(seconds) for seconds in (trial.whole, trial.fetch, trial.update))
    one_piece = _piece_seconds(job, index, whole)
    evaluate = _evaluation_seconds(job)
    beyond.append(peak_memory() - _counted(job, index))
    measured = Measured(
        step_seconds=whole,
        fetch_seconds=fetch,
        update_seconds=update,
        piece_seconds=one_piece,
        evaluate_seconds=evaluate,
        sample_seconds=sample_seconds(job),
        losses=tuple(trial.losses[:LEAST_STEPS]),
        silent=trial.silent,
        beyond_bytes=max(beyond),
        planning_bytes=before,
    )
    if plan.prefix:
        kept_step, passed, no_cut = _from_the_cut(job, steps)
        measured = replace(measured, kept_step_seconds=kept_step, pass_seconds=passed, no_cut=no_cut)
        job.plan = plan if not no_cut else plan.without("frozen part")
    job.optimizer.state.clear()
    if recipe.certificate == "on" and math.isfinite(measured.losses[-1]):
        left = max(MOST_SECONDS, MOST_SHARE * steps * whole) - (time.perf_counter() - began)
        measured = replace(measured, certificate=certify(job, whole / plan.batch, left))
    return measured


def _batches(job: Job) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A batch of about mean size, the run's largest one, and those that a run begins with, where they are of many sizes."""
    plan, train = job.plan, job.train
    if not isinstance(train, TextExamples):
        index = torch.arange(min(plan.batch, MOST_SAMPLES))
        return index, index, ()
    order = epoch_order(plan.recipe.seed, 0, len(train))
    batches = order.tensor_split(batch_ends(job, order)[:-1])
    mean = int(train.lengths.sum()) / len(batches)
    index = min(batches, key=lambda batch: abs(int(train.lengths[batch].sum()) - mean))[:MOST_SAMPLES]
    largest = largest_batch(train.lengths, plan.recipe.seed, plan.epochs, plan.batch, plan.batch_tokens)
    return index, largest[:MOST_SAMPLES], tuple(batch[:MOST_SAMPLES] for batch in batches[:MOST_STEPS])


def _gradients(job: Job, *parts: Tensor) -> tuple[float, float]:
    job.optimizer.zero_grad()
    cut = [piece for part in parts for piece in pieces(job, part, 0)]
    return gradients(job.stepped, cut, job.judge.loss, job.judge.around, rows=job.plan.score_rows)


def _steps(job: Job, steps: int, index: Tensor, others: tuple[Tensor, ...] = ()) -> Trial:
    """A few steps; of several the first, which make the optimizer's state and warm up, are not counted.

    steps:   of the run: what trial steps may cost is a share of what it takes, once there are the least that say something
    index:   of the first, whose losses can be compared; the others then take turns, for what each size costs anew a run pays too
    returns: seconds of a step of mean size
    """
    whole, fetch, update, losses, silent = [], [], [], [], tuple[str, ...]()
    moving, noted = moving_state(job.model, job.frozen), dict[str, Tensor]()
    begun = time.perf_counter()
    for step in range(MOST_STEPS):
        if step == LEAST_STEPS:  # what comes after this is judged on weights that do not depend on how many steps there is time for
            noted = {name: tensor.detach().clone() for name, tensor in moving.items()}
        part = others[step % len(others)] if others and step >= LEAST_STEPS else index
        share = _share(job, part)
        started = time.perf_counter()
        for piece in pieces(job, part, 0):
            piece()
        fetched = time.perf_counter()
        set_learning_rate(job, step)
        total, count = _gradients(job, part)
        losses.append(total / count if count else float("nan"))
        if step == 0:
            silent = _silent(job)
        computed = time.perf_counter()
        norm = gradient_norm(job)
        if job.plan.recipe.clip is not None:
            clip(job, norm)
        job.optimizer.step()
        ended = time.perf_counter()
        fetch.append(share * (fetched - started))
        update.append(share * (ended - computed))
        whole.append(share * (ended - fetched))
        spent, allowed = ended - begun, max(MOST_SECONDS, MOST_SHARE * steps * whole[0]) / 2
        if step + 1 >= LEAST_STEPS and (spent > ENOUGH_SECONDS or spent + ended - started > allowed):
            break
    with torch.no_grad():
        for name, tensor in noted.items():
            moving[name].copy_(tensor)
    warm = -(-len(whole) // WARM) if len(whole) > 1 else 0
    return Trial(whole[warm:], fetch[warm:], update[warm:], losses, silent)


def _silent(job: Job) -> tuple[str, ...]:
    """Trainable tensors that got no gradient; beside a B of zeros A gets none yet"""
    trained = [(n, p) for n, p in job.model.named_parameters() if p.requires_grad]
    later = {f"{n}.a" for n, m in job.model.named_modules() if isinstance(m, LowRank)}
    return tuple(n for n, p in trained if (p.grad is None or not p.grad.any()) and n not in later)


def _piece_seconds(job: Job, index: Tensor, seconds: float) -> float:
    """What a second piece adds to a batch, where it may be cut; beside long steps it is nothing."""
    if job.plan.facts.may_not_be_cut or len(index) < 2 or seconds > LONG_STEP:
        return 0.0
    half = len(index) // 2
    times: dict[int, float] = {}
    for parts in ((index,), (index[:half], index[half:])):
        began = time.perf_counter()
        _gradients(job, *parts)
        times[len(parts)] = time.perf_counter() - began
    return max(times[2] - times[1], 0.0)


def _evaluation_seconds(job: Job) -> float:
    """Seconds that measuring all validation examples takes, from some of them."""
    held = job.validation
    if held is None:
        return 0.0
    some = torch.arange(min(len(held), job.judge.batch))
    job.judge.measure(job.model, held, some[:1])
    began = time.perf_counter()
    job.judge.measure(job.model, held, some)
    spent = time.perf_counter() - began
    set_training(job.model, job.frozen)
    if isinstance(held, TextExamples):
        return spent * int(held.lengths.sum()) / max(int(held.lengths[some].sum()), 1)
    return spent * len(held) / len(some)


def _counted(job: Job, index: Tensor) -> int:
    """Bytes that were counted for a step on these examples."""
    plan = job.plan
    units = int(job.train.lengths[index].sum()) if isinstance(job.train, TextExamples) else len(index)
    if not plan.facts.reads_text:
        units = min(len(index), plan.micro_batch)
    elif plan.micro_tokens is not None:
        units = min(units, plan.micro_tokens)
    rows = rows_at_once(plan.recipe, plan.score_rows, units)
    parts = memory(plan.recipe, plan.facts, Way(units, rows, plan.checkpointed, judged=plan.judged))
    return sum(parts.values()) - parts["best weights"]


def _from_the_cut(job: Job, steps: int) -> tuple[float | None, float | None, str]:
    """Seconds of a mean step that begins at the cut, and of a mean example's way there; or why none can."""
    few, passed = torch.arange(min(job.plan.batch, len(job.train), MOST_SAMPLES)), 0.0
    try:
        rows = some_rows(job, few)  # warms up
        if not kept_before(job):
            index = side_by_side(job, PASSED)
            begun = time.perf_counter()
            some_rows(job, index)
            passed = (time.perf_counter() - begun) * _share(job, index) * job.plan.steps_per_epoch / len(job.train)
        start_at_cut(job, rows, None)
    except ModelError as error:
        return None, None, str(error)
    seconds = statistics.fmean(_steps(job, steps, few).whole)
    job.stepped, job.fed = job.model, job.train
    return seconds, passed, ""


def _share(job: Job, index: Tensor) -> float:
    """The size of a mean batch relative to these examples: of their tokens, or of their number"""
    train, steps = job.train, job.plan.steps_per_epoch
    if isinstance(train, TextExamples):
        return int(train.lengths.sum()) / steps / max(int(train.lengths[index].sum()), 1)
    return len(train) / steps / len(index)
