"""Prefix: a model of which only the head learns in; what its head reads of each example, computed once and kept, out.

The part before the head stands still and draws nothing at random, so that it says the same in every epoch: what it says is
computed in one pass and kept, in memory and in the cache, from where a later run with the same weights and data takes it.
Dims: S examples, D width of what the head reads.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fromzero.data import Examples, TensorExamples, TextExamples
from fromzero.errors import ModelError, SourceError
from fromzero.report import events
from fromzero.report.events import Event, Warned
from fromzero.runner.assemble import Job
from fromzero.sources.cache import cache_folder
from fromzero.tuning import set_training
from fromzero.weights import read_tensors, write_tensors

SPOKEN_SECONDS = 1.0  # between two words on how far it is
LEAST_SECONDS = 2.0  # what took less is not worth a file
MOST_CACHED = 2**30  # bytes that one run leaves in the cache
COMPARED = 8  # kept examples that are computed anew, before and after training
DIFFERENCE = 1e-5  # of those, relative to the largest value; a float32 product in another order stays below
Kept = dict[str, Tensor]


@torch.no_grad()
def head_reads(job: Job, examples: Examples, index: Tensor, told: Callable[[int], None] = lambda done: None) -> Tensor:
    """What the head reads of some examples, as the frozen part says it in training.  index: (S,)  returns: (S, D), float

    told:   hears after each batch how many it had
    raises: ModelError where the head does not read one row an example
    """
    seen: list[Tensor] = []
    head = job.model.get_submodule(head_of(job))
    set_training(job.model, job.frozen)
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    order = examples.lengths[index].argsort(stable=True) if isinstance(examples, TextExamples) else torch.arange(len(index))
    rows: list[Tensor] = []
    try:
        for part in order.split(job.judge.batch):
            inputs, _ = job.judge.on_device(*examples.take(index[part]))
            with job.judge.around():
                job.model(*inputs)
            if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != len(part):
                raise ModelError("the head does not read one row an example", key="freeze")
            rows.append(seen.pop())
            told(len(part))
    finally:
        handle.remove()
    return torch.cat(rows)[order.argsort()]


def head_of(job: Job) -> str:
    """The layer that alone learns"""
    free = {name.rpartition(".")[0] for name, parameter in job.model.named_parameters() if parameter.requires_grad}
    assert len(free) == 1, free
    return free.pop()


def start_at_head(job: Job, train: Tensor, validation: Tensor | None) -> None:
    """From here on a step runs the head alone, fed with what it would read."""
    job.stepped = job.model.get_submodule(head_of(job))
    job.fed = TensorExamples(train, job.train.take(torch.arange(len(train)))[1])
    if job.validation is not None and validation is not None:
        job.fed_validation = TensorExamples(validation, job.validation.take(torch.arange(len(validation)))[1])


def keep_prefix(job: Job, frozen: str, tell: Callable[[Event], None]) -> None:
    """Compute what the head reads of all examples, or take it from the cache, and start there.

    frozen:  digest of what stands still
    tell:    hears how far it is, and what there is to warn of
    """
    path = cache_folder() / "kept" / f"{_key(job, frozen)}.safetensors"
    kept: Kept | None = None
    if path.is_file():
        try:
            kept = _read(job, path)
        except SourceError as error:
            tell(Warned(f"what an earlier run kept is computed anew: {error}"))
    if kept is None:
        begun = time.monotonic()
        kept = _computed(job, tell)
        worth = time.monotonic() - begun > LEAST_SECONDS and sum(tensor.nbytes for tensor in kept.values()) <= MOST_CACHED
        if worth:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, kept, {"sum": _sum(kept)})
            except OSError as error:
                tell(Warned(f"what the frozen part says is kept for this run alone ({error.strerror or error})"))
    start_at_head(job, kept["train"], kept.get("validation"))


def _computed(job: Job, tell: Callable[[Event], None]) -> Kept:
    begun = spoken = time.monotonic()
    done, total = 0, sum(map(len, _sides(job).values()))

    def told(more: int) -> None:
        nonlocal done, spoken
        done += more
        if time.monotonic() - spoken > SPOKEN_SECONDS or done == total:
            spoken = time.monotonic()
            tell(events.Kept(done, total, spoken - begun))

    return {name: head_reads(job, examples, torch.arange(len(examples)), told).cpu() for name, examples in _sides(job).items()}


def still_the_same(job: Job) -> bool:
    """Whether some kept rows are what the model says of these examples now."""
    return job.stepped is job.model or (isinstance(job.fed, TensorExamples) and _agree(job, job.fed.inputs))


def _agree(job: Job, rows: Tensor) -> bool:
    index = torch.linspace(0, len(job.train) - 1, min(COMPARED, len(job.train))).long()
    now, then = head_reads(job, job.train, index).cpu(), rows[index]
    return bool((now - then).abs().max() <= DIFFERENCE * now.abs().max().clamp(min=1e-30))


def _sides(job: Job) -> dict[str, Examples]:
    return {"train": job.train, **({} if job.validation is None else {"validation": job.validation})}


def _key(job: Job, frozen: str) -> str:
    """Of the frozen weights, the data and what becomes of it; another head or learning rate has the same."""
    facts = job.plan.facts
    parts: tuple[Any, ...] = (
        frozen,
        facts.data.digest,
        len(job.train),
        job.saved.preparation.inputs,
        job.design.blueprint,
        job.plan.precision,
        job.plan.attention,
        job.plan.recipe.seed,
        job.plan.recipe.data.hold_out,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(job: Job, path: Path) -> Kept:
    """raises: SourceError where the file is cut short, was changed, or belongs to other weights or data"""
    kept = read_tensors(path)
    wanted = {name: len(examples) for name, examples in _sides(job).items()}
    fits = {name: len(tensor) for name, tensor in kept.items()} == wanted and _noted(path) == _sum(kept)
    if not fits or not _agree(job, kept["train"]):
        raise SourceError("is not what this model says of this data", file=str(path))
    return kept


def _noted(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return str((file.metadata() or {}).get("sum"))


def _sum(kept: Kept) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(kept.items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
