"""Certificate: a job in, how far its plan's loss and gradients lie from those of the plain way out, and which choices are to blame.

The plain way: the recipe's master precision, one sample at a time where a batch may be cut, nothing packed, compiled, kept or run
again. Dims: B samples.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fromzero.data import TextExamples
from fromzero.devices.generators import seed_all
from fromzero.errors import ModelError
from fromzero.planner.values import Certificate, Plan
from fromzero.runner.assemble import Job
from fromzero.runner.pieces import pieces
from fromzero.runner.prefix import some_rows, start_at_cut
from fromzero.runner.regions import carry_out
from fromzero.runner.step import gradients
from fromzero.tuning import set_training

ROUNDINGS = 8.0  # by which a sum of n terms, added in another order, is taken to differ, times sqrt(n)
SMALLEST = 1e-3  # of the largest gradient: a tensor with smaller ones is judged as if it had these, for they are what rounding left
MOST_SAMPLES = 32  # of a batch; more would show nothing else
PASSES = 4.0  # steps of the chosen way that a certificate costs for each of its samples
Gradients = dict[str, Tensor]
Distance = tuple[float, str, float]  # error, the tensor that has it, error of the loss


def certify(job: Job, sample_seconds: float, budget: float) -> Certificate:
    """Compare the job's plan with the plain way on some samples of its data; the job's gradients are not what they were.

    sample_seconds, budget:  seconds of a step for each sample, and seconds that may be spent; at least two samples are compared
    """
    began, plan = time.perf_counter(), job.plan
    batches = _batches(job, int(budget / max(PASSES * sample_seconds, 1e-9)))
    together = plan.without(*plan.fast_ways)
    cut = not plan.facts.may_not_be_cut
    plain = replace(together, micro_batch=1) if cut else together
    references = [_passed(job, plain, index, exact=True) for index in batches]
    bound, refused = _bound(job, batches[0]), dict[str, float]()

    def distance(tried: Plan) -> Distance:
        try:
            return max(_farthest(reference, _passed(job, tried, index)) for index, reference in zip(batches, references, strict=True))
        except ModelError:  # what was kept does not even fit the model
            return 1.0, "frozen part", 1.0

    found = distance(plan)
    if found[0] > bound and plan.precision != "bf16":
        if cut and (apart := distance(together)[0]) > bound:  # its samples have to do with each other
            cut, refused = False, {"micro_batch": apart}
            references = [_passed(job, together, index, exact=True) for index in batches]
        ways = [name for name in plan.fast_ways if name not in refused]
        alone = {name: distance(plan.without(*(other for other in plan.fast_ways if other != name)))[0] for name in ways}
        refused |= {name: error for name, error in alone.items() if error > bound}
        found = distance(plan.without(*(name for name in plan.fast_ways if name in refused)))
        if found[0] > bound:  # only together they go wrong
            refused |= dict.fromkeys(ways, found[0])
            found = distance(together)
    job.plan, job.stepped, job.fed = plan, job.model, job.train
    carry_out(job.model, plan, job.draws)
    error, tensor, loss_error = found
    against = "one sample at a time" if cut else "all samples together"
    return Certificate(error, bound, tensor, loss_error, len(batches[0]), against, refused, time.perf_counter() - began)


def _batches(job: Job, fits: int) -> list[Tensor]:
    """A few samples; of compiled code, which is made anew for each size, a whole batch and the last one of an epoch."""
    plan, size = job.plan, len(job.train)
    if not plan.compiled:
        return [torch.arange(min(plan.batch, MOST_SAMPLES, max(2, fits), size))]
    last = size % plan.batch
    return [torch.arange(plan.batch), *([torch.arange(last)] if last else [])]


def _passed(job: Job, plan: Plan, index: Tensor, *, exact: bool = False) -> tuple[float, Gradients]:
    """Loss and gradients of a batch, carried out as a plan says.  exact: without autocast"""
    job.plan, job.stepped, job.fed = _reduced(job, plan, index), job.model, job.train
    carry_out(job.model, plan, job.draws)
    if plan.prefix:
        seed_all(plan.recipe.seed + 1)  # what stands still may draw nothing
        start_at_cut(job, some_rows(job, index), None)
    set_training(job.model, job.frozen)
    seed_all(plan.recipe.seed)  # the same draws, where some are outside of dropout layers
    job.optimizer.zero_grad()
    around = nullcontext if exact else job.judge.around
    total, count = gradients(job.stepped, pieces(job, index, 0), job.judge.loss, around, rows=plan.score_rows)
    found = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
    job.optimizer.zero_grad(set_to_none=True)
    return total / max(count, 1), found


def _reduced(job: Job, plan: Plan, index: Tensor) -> Plan:
    """Where the plan cuts its batches, it cuts these few samples too."""
    half = max(1, len(index) // 2)
    micro = min(plan.micro_batch, half) if plan.micro_batch < plan.batch else plan.micro_batch
    tokens = plan.micro_tokens
    if tokens is not None and isinstance(job.train, TextExamples):
        tokens = min(tokens, int(job.train.lengths[index].sum()) // 2)
    return replace(plan, micro_batch=micro, micro_tokens=tokens)


def _farthest(reference: tuple[float, Gradients], tried: tuple[float, Gradients]) -> Distance:
    """The largest difference of a tensor's gradients, relative to its largest one; "" where every bit is equal."""
    (loss, plain), (other_loss, other) = reference, tried
    largest = max((float(g.abs().max()) for g in plain.values()), default=0.0)
    loss_error = abs(loss - other_loss) / max(abs(loss), 1e-12)
    worst, place = loss_error, "loss" if loss != other_loss else ""
    for name in {**plain, **other}:
        one = plain[name] if name in plain else torch.zeros_like(other[name])
        two = other.get(name, torch.zeros_like(one))
        scale = max(float(one.abs().max()), SMALLEST * largest, 1e-30)
        apart = float((one - two).abs().max()) / scale
        if not apart <= worst:  # a difference that is no number counts
            worst, place = apart, name
    return worst, place, loss_error


def _bound(job: Job, index: Tensor) -> float:
    """What another order of additions can make of a tensor's gradients: it grows with the root of the length of the sums."""
    inputs, _ = job.train.take(index)
    widest = max((p.shape[-1] for p in job.model.parameters() if p.ndim > 1), default=1)
    terms = inputs[0].numel() * (widest if isinstance(job.train, TextExamples) else 1)
    dtype = next((p.dtype for p in job.model.parameters() if p.is_floating_point()), torch.float32)
    return float(ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(terms))
