"""Compare: what the model said and what an exported file says in, how far apart they are out, or an error beyond a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fromzero.errors import ModelError

BOUND = 1e-4  # relative to the largest; float32 in another order of operations stays below


@dataclass(frozen=True)
class Compared:
    """How one reader of an exported file did.

    difference:  the largest, relative to the largest value of the model's; None: the reader is not installed, nothing was compared
    also:        what else was found the same, or measured
    """

    reader: str
    difference: float | None
    bound: float
    also: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.reader}: not installed here, NOT compared" + (f" ({self.also})" if self.also else "")
        return f"{self.reader}: differs by {self.difference:.1e} ({self.bound:.0e} is allowed)" + (f"; {self.also}" if self.also else "")


def compare(reader: str, wanted: Tensor, found: Tensor, *, bound: float = BOUND, also: str = "") -> Compared:
    """Elementwise.  raises: ModelError where shapes differ, or a value by more than the bound"""
    if wanted.shape != found.shape:
        said = f"{reader} gives outputs of shape {tuple(found.shape)}, the model {tuple(wanted.shape)}"
        raise ModelError(
            said, why="a file that computes something else than its model is not kept", mend="please report it, with the model"
        )
    difference = ((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
    if not difference <= bound:
        raise ModelError(
            f"{reader} computes something else than the model: it differs by {difference:.1e}",
            why=f"{bound:.0e} of the largest output is allowed, and the file was not kept",
            mend="please report it, with the model",
        )
    return Compared(reader, difference, bound, also)


def absent(reader: str, install: str = "") -> Compared:
    return Compared(reader, None, BOUND, install)


def same(reader: str, what: str, ours: Any, theirs: Any) -> str:
    """returns: what is the same, to print.  raises: ModelError where it is not"""
    if ours != theirs:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        raise ModelError(
            f"{reader} gives another {what}: from place {place} on {str(theirs[place : place + 4])[:80]}, not {str(ours[place : place + 4])[:80]}",
            why="the file was not kept",
            mend="please report it, with the model",
        )
    return f"the same {what}"


def nats(documents: list[Tensor], scores: list[Tensor]) -> float:
    """Mean next-token loss.  documents: (T,) each.  scores: (T, V) each"""
    losses = [torch.nn.functional.cross_entropy(s[:-1].float(), d[1:], reduction="sum") for d, s in zip(documents, scores, strict=True)]
    return float(sum(losses)) / sum(len(document) - 1 for document in documents)
