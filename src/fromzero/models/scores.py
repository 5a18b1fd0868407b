"""Scores: a language model and documents in, the scores of the tokens that follow at some places out. Knows no text.

Dims: N tokens end to end, R rows wanted, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fromzero.models.decoder import Decoder
from fromzero.models.foreign import Foreign


class Outside(nn.Module, ABC):
    """A language model that another program runs, one text at a time: it scores what follows a text, and no place within it.

    context: how many tokens it reads at most
    """

    context: float

    @abstractmethod
    def following(self, ids: Sequence[int]) -> Tensor:
        """The scores of the next token.  returns: (V,)"""


def context_of(model: nn.Module) -> float:
    """How many tokens the model reads at most; infinite where it does not say."""
    return model.config.context if isinstance(model, Decoder) else model.context if isinstance(model, (Foreign, Outside)) else math.inf


def scores_at(model: nn.Module, documents: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
    """Scores of the next token at some places of documents end to end. Every module is left in the mode that it was in.

    model:    forward(tokens (N,), offsets (B + 1,)) → (N, V)
    rows:     (R,) places among the N tokens
    returns:  (R, V) where the model is
    """
    tokens, offsets = end_to_end(documents, device_of(model))
    with reading(model, learning(model)):
        if isinstance(model, Decoder):
            return model.scores(model.states(tokens, offsets)[rows])
        scores: Tensor = model(tokens, offsets)[rows]
        return scores


def end_to_end(documents: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """returns: tokens (N,) and offsets (B + 1,), int64"""
    tokens = torch.tensor([token for ids in documents for token in ids], device=device)
    return tokens, torch.tensor([0, *map(len, documents)], device=device).cumsum(0)


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def learning(model: nn.Module) -> list[nn.Module]:
    """The modules in training mode. It looks at every module."""
    return [module for module in model.modules() if module.training]


@contextmanager
def reading(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without gradients, and with all modules in eval mode. modules: those that are in training mode, and will be again"""
    with torch.no_grad():
        if not modules:
            yield
            return
        model.eval()
        try:
            yield
        finally:
            for module in modules:
                module.training = True
