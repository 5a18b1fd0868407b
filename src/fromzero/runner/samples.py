"""Samples: a job in, texts with which its model goes on from beginnings of the validation data out, to read along."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fromzero.data import ChatFormat, TextExamples, TextFormat
from fromzero.data.tokens import decode
from fromzero.models.generate import generate
from fromzero.report.events import Sampled
from fromzero.runner.assemble import Job

TOKENS, TEMPERATURE = 48, 0.8
TIMED = 6  # tokens, from which the time of a sample is told


def samples(job: Job, step: int) -> Iterator[Sampled]:
    """Go on with a few beginnings, so that a person can read what has been learned."""
    form = job.saved.preparation.inputs
    for prompt, said in _spoken(job, TOKENS):
        assert isinstance(form, (TextFormat, ChatFormat))
        yield Sampled(step, decode(form.tokenizer, prompt), decode(form.tokenizer, list(said)))


def sample_seconds(job: Job) -> float:
    """Seconds that all samples take at one time of writing them, from the first tokens of one."""
    for _, said in _spoken(job, TIMED):
        began = time.perf_counter()
        times = [time.perf_counter() - began for _ in said]
        later = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        count = min(job.plan.recipe.evaluate.samples, len(job.validation or ()))
        return count * (times[0] + (TOKENS - 1) * later) if times else 0.0
    return 0.0


def _spoken(job: Job, most: int) -> Iterator[tuple[list[int], Iterator[int]]]:
    recipe, held, form = job.plan.recipe, job.validation, job.saved.preparation.inputs
    if not recipe.predicts_tokens or not isinstance(held, TextExamples) or not isinstance(form, (TextFormat, ChatFormat)):
        return
    stops, warm = (form.stops, 0.0) if isinstance(form, ChatFormat) else ((), TEMPERATURE)
    for number in range(min(recipe.evaluate.samples, len(held))):
        if prompt := held.beginning(number):
            yield prompt, generate(job.model, prompt, most=most, stops=stops, temperature=warm, seed=recipe.seed)
