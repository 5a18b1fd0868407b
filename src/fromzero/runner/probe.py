"""Probe: a plan and its data in, what a few real steps showed out. It works on objects of its own and throws them away."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import replace

import torch

from fromzero.data import Loaded, TextExamples
from fromzero.devices import give_back_memory, keep_freed_memory, peak_memory
from fromzero.errors import ModelError
from fromzero.models import choose_path
from fromzero.planner.facts import LARGE
from fromzero.planner.values import Measured, Plan
from fromzero.runner.assemble import Job, Place, assemble
from fromzero.runner.loop import clip, pieces, set_learning_rate
from fromzero.runner.numbers import gradient_norm
from fromzero.runner.prefix import some_rows, start_at_cut
from fromzero.runner.step import gradients
from fromzero.tuning import LowRank, choose_lowrank_path, set_training

LEAST_STEPS = 4  # the first warms up and is not counted
MOST_STEPS = 24
ENOUGH_SECONDS = 0.15  # steps of a small model are many, so that their median means something
MOST_SECONDS = 3.0
MOST_SAMPLES = 4096  # of a very large batch a part is measured


def probe(plan: Plan, loaded: Loaded, place: Place) -> Measured:
    """Take a few steps on one batch. torch's random state is put back; the given module is never touched."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says them once
        torch.manual_seed(plan.recipe.seed)
        torch.set_num_threads(plan.threads)
        if plan.keep_memory:
            keep_freed_memory()
        job = assemble(replace(plan, steps=max(plan.steps, MOST_STEPS)), loaded, place)
        index = torch.arange(min(plan.batch, MOST_SAMPLES))
        set_training(job.model, job.frozen)
        losses, seconds, silent = _steps(job, index)
        evaluate_seconds = _evaluation(job, index)
        errors, peak = _path_errors(job), peak_memory()
        kept_step, one_pass, kept_error, no_cut = _from_the_cut(job, index) if plan.prefix else (None, None, {}, "")
        del job
        if plan.facts.model.parameter_bytes > LARGE:
            give_back_memory()
    return Measured(
        step_seconds=statistics.median(seconds),
        evaluate_seconds=evaluate_seconds,
        losses=tuple(losses[:LEAST_STEPS]),
        silent=silent,
        peak_bytes=peak,
        batch=len(index),
        kept_step_seconds=kept_step,
        pass_seconds=one_pass,
        no_cut=no_cut,
        path_errors=errors | kept_error,
    )


def _steps(job: Job, index: torch.Tensor) -> tuple[list[float], list[float], tuple[str, ...]]:
    losses: list[float] = []
    seconds: list[float] = []
    silent: tuple[str, ...] = ()
    begun = time.perf_counter()
    for step in range(MOST_STEPS):
        started = time.perf_counter()
        set_learning_rate(job, step)
        job.optimizer.zero_grad()
        total, count = gradients(job.stepped, pieces(job, index, 0), job.judge.loss, job.judge.around, rows=job.plan.score_rows)
        losses.append(total / count if count else float("nan"))
        if step == 0:
            trained = [(n, p) for n, p in job.model.named_parameters() if p.requires_grad]
            later = {f"{n}.a" for n, m in job.model.named_modules() if isinstance(m, LowRank)}  # B is zero, so A gets no gradient yet
            silent = tuple(n for n, p in trained if (p.grad is None or not p.grad.any()) and n not in later)
        if job.plan.recipe.clip is not None:
            clip(job, gradient_norm(job))
        job.optimizer.step()
        seconds.append(time.perf_counter() - started)
        spent = time.perf_counter() - begun
        if spent > MOST_SECONDS or (spent > ENOUGH_SECONDS and step + 1 >= LEAST_STEPS):
            break
    return losses, seconds[1:] or seconds, silent


def _evaluation(job: Job, index: torch.Tensor) -> float:
    """Seconds that measuring a batch takes, metrics included."""
    job.judge.measure(job.model, job.train, index)
    started = time.perf_counter()
    job.judge.measure(job.model, job.train, index)
    return time.perf_counter() - started


def _from_the_cut(job: Job, index: torch.Tensor) -> tuple[float | None, float | None, dict[str, float], str]:
    """Seconds of a step that begins at the cut, seconds of an example's way there, how far both ways' gradients are apart; or why not."""
    few = index[: min(len(index), 8)]
    choose_path(job.model, job.plan.attention)
    set_training(job.model, job.frozen)
    loss, live = _loss_and_gradients(job, few)
    try:
        begun = time.perf_counter()
        rows = some_rows(job, index)
        passed = (time.perf_counter() - begun) / len(index)
        start_at_cut(job, rows, None)
    except ModelError as error:
        return None, None, {}, str(error)
    kept_loss, kept = _loss_and_gradients(job, few)
    _, seconds, _ = _steps(job, index)
    return statistics.median(seconds), passed, {"kept": _distance(loss, live, kept_loss, kept)}, ""


def _distance(loss: float, plain: list[torch.Tensor], other_loss: float, other: list[torch.Tensor]) -> float:
    """The largest difference of two ways' losses and gradients, relative to the largest"""
    largest = max((float(g.abs().max()) for g in plain), default=0.0) or 1.0
    apart = max((float((a - b).abs().max()) for a, b in zip(plain, other, strict=True)), default=0.0)
    return max(apart / largest, abs(loss - other_loss) / max(abs(loss), 1.0))


def _path_errors(job: Job) -> dict[str, float]:
    """How far loss and gradients with each fast path lie from those with the plain ones, relative to the largest."""
    index = job.train.lengths.argsort()[:2] if isinstance(job.train, TextExamples) else torch.arange(2)
    ways = {path: choose for choose, path in ((choose_path, job.plan.attention), (choose_lowrank_path, job.plan.lowrank)) if path}
    for choose in ways.values():
        choose(job.model, "plain")
    plain_loss, plain = _loss_and_gradients(job, index)
    errors = {}
    for path, choose in ways.items():
        if path != "plain":
            choose(job.model, path)
            errors[path] = _distance(plain_loss, plain, *_loss_and_gradients(job, index))
            choose(job.model, "plain")
    return errors


def _loss_and_gradients(job: Job, index: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(job.plan.recipe.seed)  # the same dropout
    job.optimizer.zero_grad()
    total, count = gradients(job.stepped, pieces(job, index, 0), job.judge.loss, job.judge.around, rows=job.plan.score_rows)
    return total / count, [p.grad.clone() for p in job.model.parameters() if p.grad is not None]
