"""Inspection: a module and two samples in, facts out: its layers in the order they run, its head, what it keeps in memory.

The module is copied first; the original, its buffers and torch's random state are left as they were.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fromzero.devices.generators import lent, seed_all
from fromzero.errors import ModelError
from fromzero.models.decoder import Decoder
from fromzero.models.foreign import Foreign
from fromzero.models.layers.attention import Attend
from fromzero.models.stages import find_stages

KEYED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # what falls out there can belong to a sample or token
_RANDOM = (*KEYED, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)
_COUPLING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class LayerFacts:
    """A layer with no layers inside, or with parameters of its own. tensors: parameter name → number of values."""

    name: str
    kind: str
    tensors: dict[str, int]


@dataclass(frozen=True)
class StageFacts:
    """What one stage costs, per sample, or per token of a model that reads text; what lies outside all stages has no name.

    kept:   bytes for the backward pass.  given: bytes of what it reads
    flops:  multiplications and additions of a forward pass
    """

    name: str
    kept: int
    given: int
    flops: int


@dataclass(frozen=True)
class Reads:
    """The first argument of a module: a tensor of floats with a row for each sample, or for each token. shape: of a row"""

    shape: tuple[int, ...]
    per_token: bool


@dataclass(frozen=True)
class ModelFacts:
    """layers: in the order they run.  idle: parameters of layers that did not run.  head: the Linear that makes the output."""

    name: str
    layers: tuple[LayerFacts, ...]
    idle: tuple[str, ...]
    parameters: int
    parameter_bytes: int
    output_shape: tuple[int, ...]  # of one sample
    activation_bytes: int  # kept for the backward pass, per sample
    token_bytes: int  # the same per token, of a model that reads text
    head: str | None
    linears: tuple[str, ...]
    ends_in: str  # softmax | log_softmax | ""
    flat_dropout: tuple[str, ...]  # Dropout2d that got (B, D)
    random: bool  # the output in training depends on draws that belong to no sample: not those of a dropout layer over samples or tokens
    coupled: tuple[str, ...]  # layers that mix the samples of a batch
    attends: bool = False  # with our attention over documents, which has several paths
    widest: int = 0  # bytes of the largest thing that a layer reads, per sample, or per token where the model reads text
    costs: tuple[StageFacts, ...] = ()  # of the stages in their order, and of the rest
    stages: tuple[str, ...] = ()  # submodules in the order they run; empty where they could not be found
    no_stages: str = ""  # why
    foreign: str = ""  # what built it, where that is not fromzero
    draws: tuple[str, ...] = ()  # layers that draw random numbers in training
    reads: dict[str, Reads] = field(default_factory=dict)  # stages, and layers in none of them → what each is given


def inspect_model(model: nn.Module, inputs: tuple[Tensor, ...], name: str, *, samples: int = 2, rows: int | None = None) -> ModelFacts:
    """Run a small batch through a copy of the module.

    inputs:  the arguments of the model for `samples` samples, as a batch would be
    rows:    how many rows its output has: one a sample, or one a token
    raises:  ModelError where the module fails on them, or gives no tensor
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # with the same parameters and its own buffers
    stages, reason = find_stages(model)
    watch = _Watch(twin, stages)
    outputs = watch.run(inputs, name, samples if rows is None else rows)
    executed = list(dict.fromkeys(watch.order))
    modules = dict(twin.named_modules())
    known = {id(p): n for n, p in twin.named_parameters()}  # a tied tensor has one name
    own = {n: {known[id(p)]: p.numel() for p in modules[n].parameters(recurse=False)} for n in executed}
    layers = tuple(LayerFacts(n, type(modules[n]).__name__, own[n]) for n in executed)
    units = len(inputs[0]) if len(inputs) == 2 else samples
    used = {p for layer in layers for p in layer.tensors}
    linears = tuple(n for n in executed if isinstance(modules[n], nn.Linear))
    drawing = {n for n, m in modules.items() if isinstance(m, _RANDOM) and getattr(m, "p", True)}
    keyed = {n for n in drawing if type(modules[n]) in KEYED and n not in watch.other_rows}
    random = _differs(twin, inputs, [modules[n] for n in keyed])
    parameters = dict(model.named_parameters())
    return ModelFacts(
        name=name,
        layers=layers,
        idle=tuple(n for n in parameters if n not in used and watch.leaves_own(n)),
        parameters=sum(p.numel() for p in parameters.values()),
        parameter_bytes=sum(p.nbytes for p in parameters.values()),
        output_shape=tuple(outputs.shape[1:]),
        activation_bytes=sum(cost[0] for cost in watch.costs.values()) // samples,
        token_bytes=sum(cost[0] for cost in watch.costs.values()) // len(inputs[0]) if len(inputs) == 2 else 0,
        widest=watch.widest // units,
        costs=tuple(StageFacts(n, *(c // units for c in cost)) for n, cost in watch.costs.items()),
        head=_head(linears, modules, outputs),
        linears=linears,
        ends_in=_ends_in(outputs),
        flat_dropout=tuple(dict.fromkeys(watch.flat_dropout)),
        random=random or bool(drawing - keyed),
        draws=tuple(n for n in executed if n in drawing),
        reads=watch.reads,
        coupled=tuple(n for n in executed if isinstance(modules[n], _COUPLING)),
        attends=any(isinstance(m, Attend) for m in modules.values()),
        stages=stages,
        no_stages=reason,
        foreign=model.built_by if isinstance(model, Foreign) else "",
    )


class _Watch:
    """Hooks on every layer, for one forward pass in eval mode."""

    def __init__(self, model: nn.Module, stages: Sequence[str]) -> None:
        self.model = model.eval()
        self.order: list[str] = []
        self.reads: dict[str, Reads] = {}
        self.flat_dropout: list[str] = []
        self.other_rows: set[str] = set()  # layers that were given something else than a row for each sample or token
        self.costs = {stage: [0, 0, 0] for stage in (*stages, "")}  # bytes kept, bytes given, operations
        self.widest = 0
        self._stage = ""
        self._counted = 0
        self._leaves = {n: m for n, m in model.named_modules() if not list(m.children()) or list(m.parameters(recurse=False))}
        self._parts = {*stages, *(n for n in self._leaves if not n.startswith(tuple(f"{stage}." for stage in stages)))}

    def leaves_own(self, parameter: str) -> bool:
        return parameter.rpartition(".")[0] in self._leaves

    def run(self, inputs: tuple[Tensor, ...], name: str, rows: int) -> Tensor:
        modules, counter = dict(self.model.named_modules()), FlopCounterMode(display=False)

        def enter(stage: str, arguments: Sequence[Any]) -> None:
            """What was computed until now belongs to the stage before"""
            total = counter.get_total_flops()
            self.costs[self._stage][2] += total - self._counted
            self._counted, self._stage = total, stage
            self.costs[stage][1] += sum(a.nbytes for a in arguments if isinstance(a, Tensor)) if stage else 0

        handles = [m.register_forward_pre_hook(self._note(n, row_counts(inputs))) for n, m in self._leaves.items()]
        for stage in self.costs:
            if stage:
                handles.append(modules[stage].register_forward_pre_hook(lambda _, given, stage=stage: enter(stage, given)))
                handles.append(modules[stage].register_forward_hook(lambda *_: enter("", ())))
        handles += [m.register_forward_pre_hook(self._see(n, inputs)) for n, m in self.model.named_modules() if n in self._parts]
        known = {p.data_ptr() for p in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> None:
            """Count what is kept; the graph gets nothing, for one that holds its own outputs is never freed."""
            place = tensor.untyped_storage().data_ptr()
            if place not in kept and place not in known:
                kept[place] = tensor.detach()  # alive for this pass, so that no other tensor gets its place
                self.costs[self._stage][0] += tensor.nbytes

        try:
            with warnings.catch_warnings(), lent(), torch.enable_grad():
                warnings.simplefilter("ignore")
                with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
                    outputs: Any = _call(self.model, inputs)
                enter("", ())
        except Exception as error:
            shapes = " and ".join(str(tuple(t.shape)) for t in inputs)
            raise ModelError(
                f"{name} fails on inputs of shape {shapes}: {type(error).__name__}: {str(error)[:300]}",
                why=_batch_is(inputs),
                mend="change the model's first layers, or data.input",
                key="model",
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != rows:
            what = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelError(f"{name} gives {what}", why=f"training needs one tensor of {rows} rows here", key="model")
        return outputs.detach()

    def _note(self, name: str, counts: tuple[int, int]) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not (arguments and isinstance(arguments[0], Tensor) and arguments[0].ndim and len(arguments[0]) in counts):
                self.other_rows.add(name)
            self.order.append(name)
            self.widest = max([self.widest, *(a.nbytes for a in arguments if isinstance(a, Tensor))])
            if isinstance(module, nn.Dropout2d) and arguments and isinstance(arguments[0], Tensor) and arguments[0].ndim == 2:
                self.flat_dropout.append(name)

        return hook

    def _see(self, name: str, inputs: tuple[Tensor, ...]) -> Any:
        samples, tokens = row_counts(inputs)

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            first = arguments[0] if arguments else None
            if isinstance(first, Tensor) and first.is_floating_point() and first.ndim and len(first) in (samples, tokens):
                self.reads.setdefault(name, Reads(tuple(first.shape[1:]), len(first) == tokens))

        return hook


def row_counts(inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """How many samples and how many tokens; -1 where there are none"""
    return (len(inputs[1]) - 1, len(inputs[0])) if len(inputs) == 2 else (len(inputs[0]), -1)


def _call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Of a language model one row is scored, for no step has all rows of scores in memory."""
    if not isinstance(model, Decoder) or model.outputs is not None:
        return model(*inputs)
    states = model.states(inputs[0], inputs[1])
    return model.scores(states[-1:]).expand(len(states), -1)


def _batch_is(inputs: tuple[Tensor, ...]) -> str:
    if len(inputs) == 2:
        return "a batch of text is two arguments: the tokens of its documents end to end, and where each begins"
    return f"a batch of the data has shape (batch, {', '.join(map(str, inputs[0].shape[1:]))})"


def _head(linears: Sequence[str], modules: dict[str, nn.Module], outputs: Tensor) -> str | None:
    """The last Linear that ran, if it is as wide as the output."""
    if not linears:
        return None
    last = modules[linears[-1]]
    width = outputs.shape[-1] if outputs.ndim > 1 else 1
    return linears[-1] if isinstance(last, nn.Linear) and last.out_features == width else None


def _ends_in(outputs: Tensor) -> str:
    """By the numbers, so that a functional softmax is found too."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return ""
    rows = outputs[:16].double()
    if bool((rows <= 1e-6).all()) and bool((rows.logsumexp(1).abs() < 1e-4).all()):
        return "log_softmax"
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-4).all()):
        return "softmax"
    return ""


def _differs(model: nn.Module, inputs: tuple[Tensor, ...], apart: Sequence[nn.Module]) -> bool:
    """Whether two training passes with different random states differ: finds functional dropout.  apart: layers that draw nothing here"""
    model.train()
    for layer in apart:
        layer.eval()
    with warnings.catch_warnings(), lent(), torch.no_grad():
        warnings.simplefilter("ignore")
        results = []
        for seed in (1, 2):
            seed_all(seed)
            results.append(_call(model, inputs))
    return not torch.equal(results[0][-16:], results[1][-16:])
