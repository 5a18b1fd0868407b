"""Cut: a model and the name of a module in it in, the model from that module on out. Knows no data and no plan.

The model's own code runs, on its own inputs. For as long as that takes, the modules before the cut answer with tensors that have
a shape and no values (torch's meta device: nothing is computed, no memory is taken), and the module at the cut gets what was kept
in the place of its first argument. Whoever would need a value from before the cut fails, and nothing wrong is computed.
Dims: B samples, N tokens end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fromzero.data import Inputs
from fromzero.errors import ModelError
from fromzero.models import Decoder
from fromzero.models.inspect import row_counts

Forward = Callable[..., Any]


class Answer(NamedTuple):
    """What a module gives: a row for each sample, or for each token."""

    per_token: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


class Tail(nn.Module):
    """A model from a cut on, with the same parameters.

    answers:  of each module before the cut, call by call; None where it has to be computed
    dtype:    of what the cut reads
    """

    def __init__(self, whole: nn.Module, cut: str, answers: Mapping[str, Sequence[Answer | None]], dtype: torch.dtype) -> None:
        super().__init__()
        self.whole, self.cut, self.answers, self.dtype = whole, cut, dict(answers), dtype

    def forward(self, kept: Tensor, *inputs: Tensor) -> Tensor:
        """kept: what the cut reads.  inputs: of the model.  returns: as `run`"""
        modules, waiting = dict(self.whole.named_modules()), [kept.to(self.dtype)]
        begin = modules[self.cut].forward

        def begins(*given: Any, **named: Any) -> Any:
            return begin(waiting.pop(), *given[1:], **named) if waiting else begin(*given, **named)

        stand_ins: dict[nn.Module, Forward] = {modules[n]: _stand_in(modules[n], said, inputs) for n, said in self.answers.items()}
        with _instead({**stand_ins, modules[self.cut]: begins}):
            return run(self.whole, inputs)


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """What a model gives; of a language model of ours its states, of which scores are made apart."""
    speaks = isinstance(model, Decoder) and model.outputs is None
    given: Tensor = model.states(*inputs) if speaks else model(*inputs)  # type: ignore[operator]
    return given


def reads_at(model: nn.Module, cut: str, inputs: Inputs) -> Tensor:
    """Run a model until it comes to a module.  returns: what that is given first.  raises: ModelError where it is no tensor"""
    with _instead({model.get_submodule(cut): _stop}):
        try:
            run(model, inputs)
        except _Reached as reached:
            if reached.given and isinstance(reached.given[0], Tensor):
                return reached.given[0]
            raise ModelError(f"what '{cut}' is given first is no tensor") from None
    raise ModelError(f"'{cut}' does not run")


@torch.no_grad()
def begin_at(model: nn.Module, cut: str, inputs: Inputs) -> Tail:
    """The model from a module on.

    inputs:  of a few samples; of text the longest, so that tokens are not taken for samples
    raises:  ModelError where something before the cut gives anything but one tensor of rows
    """
    gave: dict[str, list[Any]] = {}

    def noting(name: str) -> Callable[..., None]:
        return lambda _, __, given: gave.setdefault(name, []).append(given)

    handles = [module.register_forward_hook(noting(name)) for name, module in model.named_modules()]
    try:
        read = reads_at(model, cut, inputs)
    finally:
        for handle in handles:
            handle.remove()
    inside = tuple(f"{name}." for name in gave)
    answers = {name: [_answer(one, inputs) for one in calls] for name, calls in gave.items() if not name.startswith(inside)}
    for name, calls in answers.items():
        if None in calls and _learns(model.get_submodule(name)):
            one = gave[name][calls.index(None)]
            said = f"a tensor of shape {tuple(one.shape)}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
            raise ModelError(f"'{name}' gives {said}, not one tensor with a row for each example")
    return Tail(model, cut, answers, read.dtype)


def _answer(given: Any, inputs: Inputs) -> Answer | None:
    samples, tokens = row_counts(inputs)
    if not isinstance(given, Tensor) or not given.ndim or len(given) not in (samples, tokens):
        return None
    return Answer(len(given) == tokens, tuple(given.shape[1:]), given.dtype)


def _learns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _stand_in(module: nn.Module, answers: Sequence[Answer | None], inputs: Inputs) -> Forward:
    """What answers without computing. A module without parameters that is given real values runs as ever: it stands beside the chain."""
    own, left, (samples, tokens) = module.forward, iter(answers), row_counts(inputs)
    learns = _learns(module)

    def forward(*given: Any, **named: Any) -> Any:
        answer = next(left, None)
        chained = learns or any(isinstance(one, Tensor) and one.is_meta for one in (*given, *named.values()))
        if answer is None or not chained:
            return own(*given, **named)
        return torch.empty(tokens if answer.per_token else samples, *answer.shape, dtype=answer.dtype, device="meta")

    return forward


class _Reached(Exception):
    def __init__(self, given: tuple[Any, ...]) -> None:
        super().__init__()
        self.given = given


def _stop(*given: Any, **_: Any) -> Any:
    raise _Reached(given)


@contextmanager
def _instead(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules run other functions, for as long as this lasts."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
