"""Together: a model and several texts in, one more token of each out at every step; texts join and leave at any step.

A plain stand-in: every text is read whole at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fromzero.errors import ModelError, UserError
from fromzero.models.generate import context_of, draw, scores_at

Allowed = Callable[[Sequence[int]], Tensor | None]


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    most: int = 256
    logprobs: int = 0


@dataclass(frozen=True)
class Made:
    """One token of a text; one that ends it with `stop` is no part of it.  ended: empty, stop, length or context"""

    number: int
    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    ended: str


class Batch:
    """The texts that one model is writing at a time.  stops: tokens that end a text"""

    def __init__(self, model: nn.Module, stops: Collection[int]) -> None:
        self.model, self.stops, self.added = model, frozenset(stops), 0
        self.texts: dict[int, tuple[list[int], int, Sampling, Allowed | None, torch.Generator]] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, ids: Sequence[int], sampling: Sampling, *, allowed: Allowed | None = None) -> int:
        if not ids:
            raise UserError("there is nothing to go on with", mend="give a prompt of at least one token")
        if len(ids) >= context_of(self.model):
            raise ModelError(f"the prompt has {len(ids)} tokens, the model reads {context_of(self.model)}", mend="shorten it")
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        self.added += 1
        self.texts[self.added] = ([*ids], len(ids), sampling, allowed, generator)
        return self.added

    def remove(self, number: int) -> None:
        self.texts.pop(number, None)

    def step(self) -> list[Made]:
        made = [self._made(number) for number in list(self.texts)]
        for one in made:
            if one.ended:
                self.remove(one.number)
        return made

    def _made(self, number: int) -> Made:
        ids, begun, asked, allowed, generator = self.texts[number]
        scores = scores_at(self.model, [ids], [-1])[0].double().cpu()
        logs = scores.log_softmax(dim=0)
        mask = None if allowed is None else allowed(ids[begun:])
        if mask is not None:
            scores = scores.masked_fill(~mask[: len(scores)], -torch.inf)
        token = draw(scores, asked.temperature, asked.top_k, asked.top_p, generator)
        best = logs.topk(min(asked.logprobs, len(logs)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if token in self.stops:
            return Made(number, token, float(logs[token]), likeliest, "stop")
        ids.append(token)
        full = "length" if len(ids) - begun >= asked.most else "context" if len(ids) >= context_of(self.model) else ""
        return Made(number, token, float(logs[token]), likeliest, full)
