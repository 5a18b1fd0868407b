"""Probe: a plan and its data in, what a few real steps showed out. It works on objects of its own and throws them away."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import replace

import torch

from fromzero.data import Loaded, TextExamples
from fromzero.devices import keep_freed_memory, peak_memory
from fromzero.models import choose_path
from fromzero.planner.values import Measured, Plan
from fromzero.runner.assemble import Job, Place, assemble
from fromzero.runner.loop import clip, pieces, set_learning_rate
from fromzero.runner.step import gradients
from fromzero.tuning import set_training

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
        error = _attention_error(job, plan.attention) if plan.attention not in ("", "plain") else None
    return Measured(
        step_seconds=statistics.median(seconds),
        evaluate_seconds=evaluate_seconds,
        losses=tuple(losses[:LEAST_STEPS]),
        silent=silent,
        peak_bytes=peak_memory(),
        batch=len(index),
        attention_error=error,
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
        total, count = gradients(job.model, pieces(job, index, 0), job.judge.loss, job.judge.around)
        losses.append(total / count if count else float("nan"))
        if step == 0:
            trained = [(n, p) for n, p in job.model.named_parameters() if p.requires_grad]
            silent = tuple(n for n, p in trained if p.grad is None or not p.grad.any())
        if job.plan.recipe.clip is not None:
            clip(job)
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


def _attention_error(job: Job, path: str) -> float:
    """How far loss and gradients of the fast path lie from those of the plain one, relative to the largest."""
    index = job.train.lengths.argsort()[:2] if isinstance(job.train, TextExamples) else torch.arange(2)
    found = []
    for way in ("plain", path):
        choose_path(job.model, way)
        torch.manual_seed(job.plan.recipe.seed)  # the same dropout
        job.optimizer.zero_grad()
        total, count = gradients(job.model, pieces(job, index, 0), job.judge.loss, job.judge.around)
        found.append((total / count, [p.grad.clone() for p in job.model.parameters() if p.grad is not None]))
    (plain_loss, plain), (fast_loss, fast) = found
    largest = max((float(g.abs().max()) for g in plain), default=0.0) or 1.0
    apart = max((float((a - b).abs().max()) for a, b in zip(plain, fast, strict=True)), default=0.0)
    return max(apart / largest, abs(fast_loss - plain_loss) / max(abs(plain_loss), 1.0))
