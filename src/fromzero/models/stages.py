"""Stages: a module in, the names of the submodules that it is a chain of out, in the order they run. Knows no model of ours.

A stage is a submodule with parameters or buffers such that whatever runs after it depends on what came before only through
its output; a residual block is one stage, a plain stack of layers has one for each. The batch's size counts as known to all.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fromzero.devices.generators import lent
from fromzero.errors import first_line

_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(copy.__file__).parent), __file__)


def find_stages(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """The model's own `stages`, or those found by running its code on stand-ins for data, in training and in evaluation.

    A copy runs, which costs the memory of one: the model, its mode and the random states stay as they were.

    returns:  the stages and no reason, each parameter inside exactly one of them; or none and a sentence that says why
    source:   symbolic tracing, arXiv:2112.08429 section 4
    """
    own: Any = getattr(model, "stages", None)
    if isinstance(own, tuple) and own and {str(name) for name in own} <= {name for name, _ in model.named_modules()}:
        return own, ""
    try:
        with lent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {_Trace().chain(copy.deepcopy(model).train(training)) for training in (True, False)}
    except Exception as error:  # a person's code runs on stand-ins: anything can happen
        return (), f"the order of its layers cannot be read off its code: {_place(error)}{first_line(error)}"
    return found.pop() if len(found) == 1 else ((), "other layers run in training than in evaluation")


def _place(error: Exception) -> str:
    """The last line of the person's own code that ran."""
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]
    return f"line {lines[-1].lineno} in {lines[-1].name}" + (f", `{lines[-1].line}`: " if lines[-1].line else ": ") if lines else ""


@dataclass
class _Call:
    """One call of a submodule. inside: the calls it made; end: how many operations were recorded when it was over."""

    name: str
    state: bool = True
    inside: list[_Call] = field(default_factory=list)
    returned: list[fx.Node] = field(default_factory=list)
    end: int = 0


class _Trace(fx.Tracer):
    """Records operations, and which call made them. A layer of torch, or one with parameters of its own, is one operation."""

    call: _Call

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or any(True for _ in m.parameters(recurse=False))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        call, caller = _Call(self.path_of_module(m), bool(m.state_dict())), self.call
        caller.inside.append(call)
        self.call = call
        out = super().call_module(m, forward, args, kwargs)
        self.call = caller
        fx.node.map_arg(self.create_arg(out), call.returned.append)
        call.end = len(self.graph.nodes)
        return out

    def chain(self, model: nn.Module) -> tuple[tuple[str, ...], str]:
        """returns: as find_stages"""
        self.call = whole = _Call("")
        given = inspect.signature(model.forward).parameters.items()
        graph = self.trace(model, {name: p.default for name, p in given if p.default is not p.empty})
        reads = _reads(graph)
        if reason := _why_no_chain(whole, reads):
            return (), reason
        found = _split(whole, reads)
        loose = {node.target for node in graph.nodes if node.op == "get_attr"}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            users = sorted({s for other, p in parameters.items() if p is parameter for s in found if other.startswith(f"{s}.")})
            users += ["the model's own code"] if name in loose else []
            if len(users) != 1 or name in loose:
                return (), f"the parameter '{name}' is used by {' and by '.join(users) or 'no layer that runs'}"
        return found, ""


def _split(call: _Call, reads: dict[fx.Node, tuple[int, int]]) -> tuple[str, ...]:
    """The calls that a call made, if it is a chain of them, and so on; else its own name."""
    if _why_no_chain(call, reads):
        return (call.name,)
    return tuple(name for part in call.inside if part.state for name in _split(part, reads))


def _why_no_chain(call: _Call, reads: dict[fx.Node, tuple[int, int]]) -> str:
    """What keeps a call from being a chain of the calls that it made; empty if it is one."""
    parts = [part for part in call.inside if part.state]
    names = [part.name for part in parts]
    for part in parts:
        if names.count(part.name) > 1:
            return f"'{part.name}' runs {names.count(part.name)} times"
        for node, (place, last) in reads.items():
            if place < part.end <= last and node not in part.returned:
                earlier = node.target if node.op in ("placeholder", "call_module") else node.name
                return f"what runs after '{part.name}' also reads '{earlier}' past it, and no layer holds the whole"
    return "" if parts else "no layer inside it has parameters"


def _reads(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """Where each value was made and where it was last read, of those that carry data to the output."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    constant: set[fx.Node] = set()
    for node in places:
        made = node.op in ("call_function", "call_method") and constant.issuperset(node.all_input_nodes)
        if made or node.op == "get_attr" or _is_batch_size(node):
            constant.add(node)
    last: dict[fx.Node, int] = {}
    for node in reversed(places):
        for source in node.all_input_nodes if node in last or node.op == "output" else ():
            if source not in constant:
                last.setdefault(source, places[node])
    return {node: (places[node], place) for node, place in last.items()}


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.size()[0] or x.shape[0]"""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return bool(node.args[1] == 0) and (node.args[0].target == "size" or node.args[0].args[1:] == ("shape",))
    return node.target == "size" and node.args[1:] == (0,)
