"""Generate: a model and the ids of a text in, the ids that go on with it out, one at a time. Knows no text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from fromzero.models.scores import context_of
from fromzero.models.together import Batch, Sampling


def generate(model: nn.Module, ids: Sequence[int], *, most: int, stops: Collection[int], **drawn: Any) -> Iterator[int]:
    """Ends before a token of `stops`, after `most` tokens, or where the model reads no more. Equal seeds give equal ids.

    drawn:   as in Sampling
    raises:  UserError for settings that mean nothing, and no ids at all
    """
    sampling, batch = Sampling(most=most, **drawn), Batch(model, stops)
    sampling.check()
    if len(ids) >= context_of(model):
        return iter(())
    batch.add(ids, sampling)

    def go_on() -> Iterator[int]:
        while len(batch):
            (made,) = batch.step()
            if made.ended != "stop":
                yield made.token

    return go_on()  # what is wrong above is said at once, not when the first token is asked for
