"""Pieces: a job and an epoch's order in, its batches out; a batch in, the parts in which it is in memory out.

Dims: B batch.
"""

from __future__ import annotations

from torch import Tensor

from fromzero.data import Inputs, TextExamples, epoch_batches
from fromzero.runner.assemble import Job
from fromzero.runner.step import Pieces


def batch_ends(job: Job, order: Tensor) -> list[int]:
    """Where each batch of an epoch ends in its order."""
    plan, size = job.plan, len(order)
    if plan.batch_tokens is not None and isinstance(job.train, TextExamples):
        return [int(end) for end in epoch_batches(job.train.lengths, order, plan.batch_tokens)[1:]]
    return [*range(plan.batch, size, plan.batch), size]


def pieces(job: Job, index: Tensor, epoch: int) -> Pieces:
    """A batch cut as the plan says; each piece is fetched when it is its turn.  index: (B,)"""

    def fetch(part: Tensor) -> tuple[Inputs, Tensor]:
        if isinstance(job.train, TextExamples):
            part = part[job.train.lengths[part].argsort(stable=True)]  # documents of one length are attended to together
        job.draws.begin(part, epoch, job.train.lengths[part] if isinstance(job.train, TextExamples) else None)
        inputs, targets = job.fed.take(part)
        if job.augment is not None:
            inputs = (job.augment(inputs[0], part, seed=job.plan.recipe.seed, epoch=epoch),)
        return job.judge.on_device(inputs, targets)

    plan = job.plan
    parts = [index] if plan.micro_batch >= plan.batch else list(index.split(plan.micro_batch))
    if plan.micro_tokens is not None and isinstance(job.train, TextExamples):
        parts = [small for part in parts for small in by_tokens(part, job.train.lengths[part], plan.micro_tokens)]
    return [lambda part=part: fetch(part) for part in parts]  # type: ignore[misc]


def by_tokens(index: Tensor, lengths: Tensor, most: int) -> list[Tensor]:
    """Consecutive examples together as long as they have at most so many tokens; one that has more stands alone."""
    cuts, held = [], 0
    for place, length in enumerate(lengths.tolist()):
        if held and held + length > most:
            cuts.append(place)
            held = 0
        held += length
    return list(index.tensor_split(cuts))
