"""Prefix: a model whose first part stands still in; what the rest reads of each example, computed once and kept, out.

That part draws nothing at random, so that it says the same in every epoch: one pass computes it, and steps begin at the cut. It is
kept in memory, or in a file of the cache that is read where it is needed; from there a later run with the same weights and data
takes it.
Dims: M examples, S some of them, N tokens end to end.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromzero.data import Examples, KeptExamples, TensorExamples, TextExamples, places
from fromzero.devices.generators import lent
from fromzero.errors import ModelError, SourceError, first_line
from fromzero.report import events
from fromzero.report.events import Event, Warned
from fromzero.runner.assemble import Job
from fromzero.runner.cut import begin_at, reads_at, run
from fromzero.runner.pieces import by_tokens
from fromzero.sources.cache import cache_folder, make_room
from fromzero.tuning import frozen_digest, set_training
from fromzero.weights import map_tensors, write_blocks

SPOKEN_SECONDS = 1.0  # between two words on how far it is
LEAST_SECONDS = 2.0  # what took less is not worth a file
BLOCK_TOKENS, PASS_TOKENS = 2**16, 1024  # of text that is ordered by length, and of it at once
COMPARED = 8  # examples that are computed anew, before and after training
DIFFERENCE = {"float32": 1e-5, "float64": 1e-5, "bf16": 2e-2}  # relative to the largest value; sums in another order stay below
Kept = dict[str, Tensor]


@torch.no_grad()
def kept_rows(job: Job, examples: Examples, index: Tensor, told: Callable[[int], None] = lambda done: None) -> Iterator[Tensor]:
    """What the cut reads of some examples, as the frozen part says it in training, in blocks in the order of the index.

    index:   (S,)
    told:    hears after each batch how many it had
    returns: (…, rest) each: a row for each example, or for each token of theirs
    raises:  ModelError where it reads anything else
    """
    lengths, counts = examples.lengths if isinstance(examples, TextExamples) else None, _counts(job, examples)
    for block in index.split(job.judge.batch) if lengths is None else by_tokens(index, lengths[index], BLOCK_TOKENS):
        sizes = counts[block]
        begins, rows = sizes.cumsum(0) - sizes, None
        for part in [torch.arange(len(block))] if lengths is None else _of_like_length(lengths[block]):
            inputs, _ = job.judge.on_device(*examples.take(block[part]))
            with job.judge.around():
                said = reads_at(job.model, job.plan.prefix, inputs).cpu()
            if len(said) != sizes[part].sum():
                raise ModelError(f"'{job.plan.prefix}' does not read one row for each example")
            rows = said.new_empty(int(sizes.sum()), *said.shape[1:]) if rows is None else rows
            rows[places(begins[part], sizes[part])] = said
            told(len(part))
        assert rows is not None
        yield rows


def _of_like_length(lengths: Tensor) -> list[Tensor]:
    """Places of texts, the shortest first, as many together as one pass takes."""
    order = lengths.argsort(stable=True)
    return by_tokens(order, lengths[order], PASS_TOKENS)


def _counts(job: Job, examples: Examples) -> Tensor:
    """How many rows the cut reads of each example: one, or one for each of its tokens.  returns: (M,)"""
    return examples.lengths if _per_token(job) and isinstance(examples, TextExamples) else torch.ones(len(examples), dtype=torch.int64)


def _per_token(job: Job) -> bool:
    return job.plan.facts.model.reads[job.plan.prefix].per_token


def some_rows(job: Job, index: Tensor) -> Tensor:
    """Of some training examples, all blocks together."""
    set_training(job.model, job.frozen)
    return torch.cat(list(kept_rows(job, job.train, index)))


def side_by_side(job: Job, runs: int) -> Tensor:
    """Training examples that stand side by side in that pass: a few runs of them from all over a block, each of other lengths."""
    if not isinstance(job.train, TextExamples):
        return torch.arange(min(len(job.train), job.judge.batch))
    lengths = job.train.lengths
    block = by_tokens(torch.arange(len(lengths)), lengths, BLOCK_TOKENS)[0]
    parts = [block[part] for part in _of_like_length(lengths[block])]
    return torch.cat([parts[(2 * run + 1) * len(parts) // (2 * runs)] for run in range(runs)] if len(parts) > runs else parts)


def start_at_cut(job: Job, train: Tensor, validation: Tensor | None) -> None:
    """From here on a step begins at the cut, fed with what that reads; a head that alone learns is stepped by itself.

    train:   of all training examples, or of the first so many
    raises:  ModelError where the rest of the model needs more than that, or says something else with it
    """
    head = job.model.get_submodule(job.plan.prefix)
    alone = _only_the_head_learns(job)

    def fed(examples: Examples, rows: Tensor) -> Examples:
        return TensorExamples(rows, examples.targets[: len(rows)]) if alone else KeptExamples(examples, rows, _per_token(job))

    given = int((_counts(job, job.train).cumsum(0) <= len(train)).sum())
    few, now = torch.arange(min(COMPARED, given)), fed(job.train, train)
    longest = job.train.lengths.argsort(descending=True)[:2] if isinstance(job.train, TextExamples) else few[:2]
    job.model.eval()
    with torch.no_grad(), job.judge.around():
        try:
            stepped = head if alone else begin_at(job.model, job.plan.prefix, job.judge.on_device(*job.train.take(longest))[0])
            plain, other = (
                run(model, job.judge.on_device(*examples.take(few))[0]) for model, examples in ((job.model, job.train), (stepped, now))
            )
        except ModelError:
            raise
        except Exception as error:  # a person's code meets tensors without values: anything can happen
            raise ModelError(f"it cannot begin at '{job.plan.prefix}': {first_line(error)}") from error
        finally:
            set_training(job.model, job.frozen)
    if plain.shape != other.shape or (apart := _apart(other, plain)) > DIFFERENCE[job.plan.precision]:
        said = "has another shape" if plain.shape != other.shape else f"differs by {apart:.1e}"
        raise ModelError(f"begun at '{job.plan.prefix}', what the model says {said}")
    job.stepped, job.fed = stepped, now
    if job.validation is not None and validation is not None:
        job.fed_validation = fed(job.validation, validation)


def _only_the_head_learns(job: Job) -> bool:
    """And nothing is known to follow it"""
    recipe, model = job.plan.recipe, job.plan.facts.model
    free = {name.rpartition(".")[0] for name, parameter in job.model.named_parameters() if parameter.requires_grad}
    return free == {job.plan.prefix} == {recipe.head.layer or model.head} and not model.ends_in and not recipe.predicts_tokens


def kept_before(job: Job) -> bool:
    """Whether an earlier run left what this one would keep."""
    return _file_of(job, frozen_digest(job.model, job.frozen)).is_file()


def _file_of(job: Job, frozen: str) -> Path:
    return cache_folder() / "kept" / f"{_key(job, frozen)}.safetensors"


def keep_prefix(job: Job, frozen: str, tell: Callable[[Event], None], heed: Callable[[], None]) -> None:
    """Compute what the cut reads of all examples, or take it from the cache, and start there; where that fails, all runs each time.

    frozen:  digest of what stands still
    tell:    hears how far it is, and what there is to warn of
    heed:    called between batches; what it raises ends the pass
    """
    path = _file_of(job, frozen)
    with lent():
        try:
            kept = _found(job, path, tell)
            if kept is None:
                few = torch.arange(min(COMPARED, len(job.train)))
                rows, again = some_rows(job, few), some_rows(job, few)
                if _apart(rows, again) > DIFFERENCE[job.plan.precision]:
                    raise ModelError("the frozen part draws at random: it says something else each time")
                start_at_cut(job, rows, None)
                kept = _computed(job, path, tell, heed)
            start_at_cut(job, kept["train"], kept.get("validation"))
        except (ModelError, SourceError, OSError) as error:
            job.stepped, job.fed, job.fed_validation = job.model, job.train, job.validation
            tell(Warned(f"the frozen part is run each time: {error}"))


def _computed(job: Job, path: Path, tell: Callable[[Event], None], heed: Callable[[], None]) -> Kept:
    """raises: OSError where it was to be in a file that cannot be written"""
    begun = spoken = time.monotonic()
    done, total = 0, sum(map(len, _sides(job).values()))

    def told(more: int) -> None:
        nonlocal done, spoken
        heed()
        done += more
        if time.monotonic() - spoken > SPOKEN_SECONDS or done == total:
            spoken = time.monotonic()
            tell(events.Kept(done, total, spoken - begun))

    set_training(job.model, job.frozen)
    shapes, dtype = _shapes(job), some_rows(job, torch.tensor([0])).dtype
    needs = sum(map(math.prod, shapes.values())) * dtype.itemsize
    blocks = {name: kept_rows(job, examples, torch.arange(len(examples)), told) for name, examples in _sides(job).items()}
    if job.plan.kept_in == "file":
        make_room(path.parent, needs)
        write_blocks(path, shapes, dtype, chain.from_iterable(blocks.values()))
        return map_tensors(path)
    kept = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, parts in blocks.items():
        at = 0
        for part in parts:
            kept[name][at : at + len(part)] = part
            at += len(part)
    if time.monotonic() - begun > LEAST_SECONDS:
        try:
            make_room(path.parent, needs)
            write_blocks(path, shapes, dtype, kept.values())
        except OSError as error:
            tell(Warned(f"what the frozen part says is kept for this run alone ({error.strerror or error})"))
    return kept


def still_the_same(job: Job) -> bool:
    """Whether some kept rows are what the model says of these examples now."""
    if job.stepped is job.model:
        return True
    assert isinstance(job.fed, (TensorExamples, KeptExamples))
    return _agree(job, job.fed.inputs if isinstance(job.fed, TensorExamples) else job.fed.rows)


def _agree(job: Job, rows: Tensor) -> bool:
    index = torch.linspace(0, len(job.train) - 1, min(COMPARED, len(job.train))).long()
    then = KeptExamples(job.train, rows, _per_token(job)).take(index)[0][0]
    return _apart(then, some_rows(job, index)) <= DIFFERENCE[job.plan.precision]


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest of the other"""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))


def _sides(job: Job) -> dict[str, Examples]:
    return {"train": job.train, **({} if job.validation is None else {"validation": job.validation})}


def _shapes(job: Job) -> dict[str, tuple[int, ...]]:
    """Of what is kept of each side"""
    row = job.plan.facts.model.reads[job.plan.prefix].shape
    return {name: (int(_counts(job, examples).sum()), *row) for name, examples in _sides(job).items()}


def _key(job: Job, frozen: str) -> str:
    """Of the frozen weights, the data, what becomes of it, and the cut; another head or learning rate has the same."""
    facts = job.plan.facts
    parts: tuple[Any, ...] = (
        frozen,
        facts.data.digest,
        len(job.train),
        job.saved.preparation.inputs,
        job.design.blueprint,
        job.plan.prefix,
        job.plan.precision,
        job.plan.attention,
        job.plan.recipe.seed,
        job.plan.recipe.data.hold_out,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _found(job: Job, path: Path, tell: Callable[[Event], None]) -> Kept | None:
    """What an earlier run left; nothing where its file is cut short, was changed, or belongs to other weights or data."""
    if not path.is_file():
        return None
    try:
        kept = map_tensors(path)
        if {name: tuple(tensor.shape) for name, tensor in kept.items()} != _shapes(job) or not _agree(job, kept["train"]):
            raise SourceError("is not what this model says of this data", file=str(path))
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now; written then
        return kept
    except (SourceError, OSError) as error:
        tell(Warned(f"what an earlier run kept is computed anew: {error}"))
        return None
