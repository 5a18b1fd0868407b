"""Together: a model and several texts in, one more token of each out at every step; texts join and leave at any step.

There is no padding: new texts are read end to end in one pass, and a step runs the last token of every other text through the
model together, where only attention looks at the past of each. Documents whose length rounds up to the same power of two share
one cache, so that attending to them is one call, and none holds more than twice the places that it fills.
Dims: S texts of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from fromzero.errors import ModelError, NumbersError, UserError
from fromzero.models.decoder import Cache, Decoder, room_for
from fromzero.models.sampling import draw, penalised
from fromzero.models.scores import Outside, context_of, device_of, end_to_end, learning, reading, scores_at

Allowed = Callable[[Sequence[int]], Tensor | None]
NOTHING = -1  # where no token at all was allowed


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one text are chosen.

    temperature:         scores are divided by it before one is drawn; 0 takes the best
    top_k:               only so many of the best are drawn from
    top_p:               only from the fewest whose shares reach it; arXiv:1904.09751 section 3.1
    min_p:               only from those whose share is at least this part of the best one's; arXiv:2407.01082 section 3
    repetition_penalty:  positive scores of tokens that stand in the text, prompt included, are divided by it, negative ones
                         multiplied, as transformers does it; the paper divides all: arXiv:1909.05858 section 4.1
    seed:                equal ones give equal tokens; None: another each time
    most:                tokens at most
    logprobs:            how many of the likeliest are told beside each token
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    most: int = 256
    logprobs: int = 0

    def check(self) -> None:
        """raises: UserError for settings that mean nothing"""
        k, p, low, penalty, seed = self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed
        for name, value, fine, asked in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", k, k is None or k >= 1, "1 or more"),
            ("top_p", p, p is None or 0 < p <= 1, "above 0 and at most 1"),
            ("min_p", low, low is None or 0 <= low <= 1, "from 0 to 1"),
            ("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0; 1 changes nothing"),
            ("seed", seed, seed is None or -(2**63) <= seed < 2**64, "a whole number of 64 bits"),
            ("max_tokens", self.most, self.most >= 1, "1 or more"),
            ("logprobs", self.logprobs, self.logprobs >= 0, "0 or more"),
        ):
            if not fine:
                raise UserError(f"{name} is {value}", mend=f"it is {asked}")


@dataclass(frozen=True)
class Made:
    """One token of a text. number: the text's;  token: a token that ends it (in stops, or NOTHING) is no part of it

    logprob:   its log-probability as the model sees it, before temperature, penalty and what is allowed
    likeliest: so many tokens as Sampling.logprobs asks for, with their log-probabilities
    ended:     empty, or why this is the last: stop, length (`most` were made) or context (the model reads no more)
    """

    number: int
    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    ended: str


@dataclass
class _Text:
    ids: list[int]
    begun: int  # tokens of the prompt
    sampling: Sampling
    allowed: Allowed | None
    generator: torch.Generator


@dataclass
class _Shelf:
    """Texts by number whose caches have one room, and that cache"""

    cache: Cache
    numbers: list[int]

    def part(self, rows: Sequence[int]) -> _Shelf:
        """Some of its texts; where they are all, it is itself, and nothing is copied."""
        if len(rows) == len(self.numbers):
            return self
        return _Shelf(self.cache.part(rows), [self.numbers[row] for row in rows])


class Batch:
    """The texts that one model is writing at a time.

    model:  forward(tokens (N,), offsets (B + 1,)) → (N, V), or one that runs Outside. A decoder reads each token once, any other all of them each time. Its
            modules are left in the mode in which they were when the last text was added
    stops:  tokens that end a text
    """

    def __init__(self, model: nn.Module, stops: Collection[int]) -> None:
        self.model, self.stops, self.context = model, frozenset(stops), context_of(model)
        self._texts: dict[int, _Text] = {}
        self._shelves: dict[int, _Shelf] = {}  # by room
        self._learning: list[nn.Module] = []
        self._added = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, ids: Sequence[int], sampling: Sampling, *, allowed: Allowed | None = None) -> int:
        """A text to go on with; nothing is computed yet.  returns: its number

        allowed:  the tokens made so far → (V,) bool, which may follow; None: all
        raises:   UserError for settings that mean nothing, no ids at all, ids that the model does not know or no room for one more
        """
        sampling.check()
        if not ids:
            raise UserError("there is nothing to go on with", mend="give a prompt of at least one token")
        if len(ids) >= self.context:
            raise ModelError(f"the prompt has {len(ids)} tokens, the model reads {self.context}", mend="shorten it")
        known = self.model.config.vocabulary if isinstance(self.model, Decoder) else None
        if known is not None and not 0 <= min(ids) <= max(ids) < known:
            raise UserError(f"token {max(ids) if min(ids) >= 0 else min(ids)} is none of the {known} that the model knows")
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        self._added += 1
        self._texts[self._added] = _Text(list(ids), len(ids), sampling, allowed, generator)
        self._learning = learning(self.model)
        return self._added

    def remove(self, number: int) -> None:
        """Its cache is freed at once. One that ended is removed already; removing it again does nothing."""
        self._texts.pop(number, None)
        self._drop({number})

    def step(self) -> list[Made]:
        """One more token of every text, in the order of their numbers. Where it raises, every text is as it was before.

        raises: NumbersError for a model whose scores are no numbers; what `allowed` and the model raise
        """
        if not self._texts:
            return []
        masks = {n: text.allowed(text.ids[text.begun :]) for n, text in self._texts.items() if text.allowed is not None}
        try:
            with reading(self.model, self._learning):
                numbers, scores = self._decoded() if isinstance(self.model, Decoder) else self._read_whole()
            scores = scores.cpu()
            logs, best = scores.log_softmax(dim=1), scores.argmax(dim=1).tolist()  # at once: half of what 16 rows take one by one
            if logs[:, 0].isnan().any():  # one that is none makes its whole row so
                raise NumbersError("the model's scores are no numbers", mend="its weights may be broken: fetch or train it anew")
        except BaseException:
            self._shelves.clear()  # what was read of which text is not sure now: all are read anew
            raise
        rows = dict(zip(numbers, zip(scores, logs, best, strict=True), strict=True))
        made = [self._made(number, text, *rows[number], masks.get(number)) for number, text in self._texts.items()]
        gone = {one.number for one in made if one.ended}
        for number in gone:
            del self._texts[number]
        self._drop(gone)
        return made

    def _read_whole(self) -> tuple[list[int], Tensor]:
        texts = [text.ids for text in self._texts.values()]
        if isinstance(self.model, Outside):
            return list(self._texts), torch.stack([self.model.following(ids) for ids in texts])
        _, offsets = end_to_end(texts, torch.device("cpu"))
        return list(self._texts), scores_at(self.model, texts, (offsets[1:] - 1).tolist())

    @torch.inference_mode()  # each of the many small calls is shorter than without gradients alone
    def _decoded(self) -> tuple[list[int], Tensor]:
        """returns: numbers, and (S, V) scores of each one's next token"""
        model, device = self.model, device_of(self.model)
        assert isinstance(model, Decoder)
        self._move_full()
        old = [number for shelf in self._shelves.values() for number in shelf.numbers]
        states = []
        if old:
            tokens, offsets = end_to_end([self._texts[number].ids[-1:] for number in old], device)
            states.append(model.states(tokens, offsets, [shelf.cache for shelf in self._shelves.values()]))  # (S, D)
        new = sorted(self._texts.keys() - set(old), key=lambda number: len(self._texts[number].ids))  # of one length side by side
        if new:
            tokens, offsets = end_to_end([self._texts[number].ids for number in new], device)
            rooms = groupby(new, lambda number: room_for(len(self._texts[number].ids)))
            shelves = [_Shelf(Cache([[] for _ in numbers], room), numbers) for room, group in rooms if (numbers := list(group))]
            states.append(model.states(tokens, offsets, [shelf.cache for shelf in shelves])[offsets[1:] - 1])
            for shelf in shelves:
                self._put(shelf)
        return [*old, *new], model.scores(torch.cat(states))

    def _put(self, shelf: _Shelf) -> None:
        there = self._shelves.setdefault(shelf.cache.room, shelf)
        if there is not shelf:
            there.cache.join(shelf.cache)
            there.numbers += shelf.numbers

    def _move_full(self) -> None:
        """Texts whose cache has no room for one more token get one of twice the room."""
        for room in sorted(self._shelves, reverse=True):
            shelf = self._shelves[room]
            full = [row for row, text in enumerate(shelf.cache.texts) if len(text) == room]
            if full:
                moved = shelf.part(full)
                self._drop({*moved.numbers})
                moved.cache.widen(2 * room)
                self._put(moved)

    def _drop(self, gone: Collection[int]) -> None:
        for room, shelf in list(self._shelves.items()):
            rows = [row for row, number in enumerate(shelf.numbers) if number not in gone]
            if not rows:
                del self._shelves[room]
            else:
                self._shelves[room] = shelf.part(rows)

    def _made(self, number: int, text: _Text, scores: Tensor, logs: Tensor, best: int, mask: Tensor | None) -> Made:
        """scores: (V,).  logs: (V,) log-probabilities.  best: the token of the highest score"""
        asked, seen = text.sampling, scores
        if asked.repetition_penalty != 1:
            scores = penalised(scores, text.ids, asked.repetition_penalty)
        if mask is not None:
            size = min(len(mask), len(scores))  # an embedding may have more rows than there are tokens
            scores = torch.full_like(scores, -torch.inf).index_copy(0, torch.arange(size), scores[:size])
            scores[:size].masked_fill_(~mask[:size], -torch.inf)
            if not scores.isfinite().any():
                return Made(number, NOTHING, 0.0, (), "stop")
        if asked.temperature == 0 and scores is seen:
            token = best
        else:
            token = draw(scores, asked.temperature, asked.top_k, asked.top_p, text.generator, asked.min_p)
        first = seen.topk(min(asked.logprobs, len(seen))).indices
        logprob, likeliest = float(logs[token]), tuple(zip(first.tolist(), logs[first].tolist(), strict=True))
        if token in self.stops:
            return Made(number, token, logprob, likeliest, "stop")
        text.ids.append(token)
        full = "length" if len(text.ids) - text.begun >= asked.most else "context" if len(text.ids) >= self.context else ""
        return Made(number, token, logprob, likeliest, full)
