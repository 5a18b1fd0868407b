"""Traced: a subject in; the module that a program is made from, its arguments, and what of their shapes may change, out.

A batch of images, arrays or rows may have any size. Text is one document of any length: documents end to end are cut at places that
only their values say, which no program can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.models import Decoder
from fromzero.models.encoder import Encoder
from fromzero.models.layers.attention import Attend
from fromzero.models.layers.experts import Experts
from fromzero.use.export.subject import Subject

Arguments = tuple[Tensor, ...]


@dataclass(frozen=True)
class Traced:
    """module: what is traced, with `names` of its inputs and of its outputs.  example: arguments to trace with.  cases: arguments, and what
    the model says of them.  moving: of each argument the dimension that may change"""

    module: nn.Module
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Arguments
    cases: list[tuple[Arguments, tuple[Tensor, ...]]]
    moving: tuple[dict[int, Any], ...]


class OneDocument(nn.Module):
    """tokens: (T,) int64.  returns: (T, V) of a language model, else (K,)"""

    def __init__(self, model: nn.Module, per_token: bool) -> None:
        super().__init__()
        self.model, self.per_token = model, per_token

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.model(tokens, None)
        return scores if self.per_token else scores[0]


def refusal(subject: Subject) -> str:
    if subject.reads not in ("language", "text"):
        return ""
    if not isinstance(subject.model, (Decoder, Encoder)):
        return "it cuts its texts at places that only their values say, which a program cannot hold"
    if any(isinstance(module, Experts) for module in subject.model.modules()):
        return "its experts get as many tokens as their values say, which a program cannot hold"
    return ""


def longest(model: nn.Module) -> int | None:
    """Tokens that the program of a text model reads at most: as long as no window cuts and no rope is stretched; None: any"""
    found = [m.reach + 1 for m in model.modules() if isinstance(m, Attend) and m.reach is not None]
    if isinstance(model, Decoder):
        found += [rope.limit for rope in model.ropes if rope.far] + [model.config.context] * model.config.learned_positions
    elif isinstance(model, Encoder):
        found.append(model.config.context)
    return min(found, default=None)


def trace_text(subject: Subject) -> Traced:
    one = OneDocument(subject.model, subject.reads == "language")
    most = longest(subject.model)
    tokens = torch.export.Dim("tokens", min=1, max=most) if most else torch.export.Dim("tokens", min=1)
    pairs = sorted(zip(subject.documents, subject.each, strict=True), key=lambda pair: -len(pair[0]))
    cases: list[tuple[Arguments, tuple[Tensor, ...]]] = [((document,), (said,)) for document, said in pairs]
    cases = [case for case in cases if most is None or len(case[0][0]) <= most]
    return Traced(one, ("tokens",), ("scores",), cases[0][0], cases, ({0: tokens},))


def trace(subject: Subject) -> Traced:
    """Inputs as the model reads them, already prepared."""
    if subject.reads in ("language", "text"):
        return trace_text(subject)
    with torch.no_grad():
        alone = subject.model(subject.inputs[0][:1])
    return batched(subject.model, ("inputs",), ("scores",), (subject.inputs[0],), [(subject.said,), (alone,)])


def batched(
    module: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...], given: Arguments, said: list[tuple[Tensor, ...]]
) -> Traced:
    """Traced with at least two examples, because one would be taken for a fixed size; compared on them, and on the first alone.

    said:  of all of them, and of the first alone
    """
    first = tuple(tensor[:1] for tensor in given)
    cases = [(given, said[0]), (first, said[1])]
    traced = given if len(given[0]) > 1 else tuple(torch.cat([tensor, tensor]) for tensor in given)
    batch = torch.export.Dim("batch", min=1)
    return Traced(module, names, outputs, traced, cases, tuple({0: batch} for _ in given))
