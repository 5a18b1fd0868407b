"""Generate: a model and the ids of a text in, the ids that go on with it out, one at a time. Knows no text.

Dims: N tokens end to end, B documents, R rows wanted, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from fromzero.errors import UserError
from fromzero.models.decoder import Cache, Decoder
from fromzero.models.foreign import Foreign


def generate(
    model: nn.Module,
    ids: Sequence[int],
    *,
    most: int,
    stops: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """Ends before a token of `stops`, after `most` tokens, or where the model reads no more. Equal seeds give equal ids.

    model:        forward(tokens (N,), offsets (B + 1,)) → (N, V). A decoder reads each token once, any other all of them each time
    temperature:  scores are divided by it before one is drawn; 0 takes the best
    top_k:        only so many of the best are drawn from
    top_p:        only from the fewest whose shares reach it; arXiv:1904.09751 section 3.1
    raises:       UserError for settings that mean nothing, and no ids at all
    """
    for name, value, fine, asked in (
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("max_tokens", most, most >= 1, "1 or more"),
    ):
        if not fine:
            raise UserError(f"{name} is {value}", mend=f"it is {asked}")
    if not ids:
        raise UserError("there is nothing to go on with", mend="give a prompt of at least one token")

    def go_on() -> Iterator[int]:
        whole, generator = list(ids), torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        cache, unread = Cache() if isinstance(model, Decoder) else None, whole
        for _ in range(int(min(most, context_of(model) - len(whole)))):
            scores = scores_at(model, [unread], [-1], cache)[0].double().cpu()  # waits for the device
            token = draw(scores, temperature, top_k, top_p, generator)
            if token in stops:
                return
            yield token
            whole.append(token)
            unread = whole if cache is None else [token]

    return go_on()  # what is wrong above is said at once, not when the first token is asked for


def context_of(model: nn.Module) -> float:
    """How many tokens the model reads at most; infinite where it does not say."""
    return model.config.context if isinstance(model, Decoder) else model.context if isinstance(model, Foreign) else math.inf


@torch.no_grad()
def scores_at(model: nn.Module, documents: Sequence[Sequence[int]], rows: Sequence[int], cache: Cache | None = None) -> Tensor:
    """Scores of the next token at some places of documents end to end. Every module is left in the mode that it was in.

    rows:     (R,) places among the N tokens
    cache:    what a decoder read of the one document before
    returns:  (R, V) where the model is
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    tokens = torch.tensor([token for ids in documents for token in ids], device=device)
    offsets = torch.tensor([0, *map(len, documents)], device=device).cumsum(0)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if isinstance(model, Decoder):
            return model.scores(model.states(tokens, offsets, cache)[rows])
        scores: Tensor = model(tokens, offsets)[rows]
        return scores
    finally:
        for module, mode in modes:
            module.training = mode


def draw(scores: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """scores: (V,) float64.  returns: the id of one token"""
    if temperature == 0:
        return int(scores.argmax())
    best, order = ((scores - scores.max()) / temperature).sort(descending=True)  # the best is 0: a tiny temperature gives no infinity
    shares = best[:top_k].softmax(dim=0)
    if top_p is not None:
        shares = shares[shares.cumsum(0) - shares < top_p]
    return int(order[torch.multinomial(shares, 1, generator=generator)])
