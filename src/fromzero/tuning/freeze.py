"""Freezing: which parameters and layers stand still, found by name and by the order layers run; and the proof that they did.

Frozen means no gradient, eval mode (dropout off, BatchNorm statistics still) and unchanged buffers. Works on any module.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fromzero.errors import RecipeError, nearest
from fromzero.tuning.lowrank import LowRank


@dataclass(frozen=True)
class Frozen:
    """Names of what stands still: parameters, and layers kept in eval mode."""

    parameters: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


def find_frozen(
    layers: Mapping[str, Sequence[str]],
    parameters: Sequence[str],
    head: str | None,
    *,
    body: bool = False,
    through: str | None = None,
    names: Sequence[str] = (),
) -> Frozen:
    """Decide what stands still.

    layers:      layer without layers inside → its parameters, in the order they run
    parameters:  every parameter of the model
    head:        the layer that `body` leaves free
    raises:      RecipeError for a layer that is not there, a glob that matches nothing, a head that was not found
    """
    order = list(layers)
    if body:
        if head is None:
            raise RecipeError(
                "the head was not found, so the body is not known",
                mend="name the layer with freeze: {through: LAYER}, or globs",
                key="freeze",
            )
        kept = set(layers[head])
        return Frozen(tuple(p for p in parameters if p not in kept), tuple(n for n in order if n != head))
    if through is not None:
        last = _last_inside(order, through)
        still = order[: last + 1]
        own = {p for name in still for p in layers[name]}
        return Frozen(tuple(p for p in parameters if p in own), tuple(still))
    matched = _matching(names, parameters, order, key="freeze")
    still = [name for name in order if layers[name] and set(layers[name]) <= matched]
    return Frozen(tuple(p for p in parameters if p in matched), tuple(still))


def frozen_beside(model: nn.Module, layers: Mapping[str, Sequence[str]], *, learn: Sequence[str] = (), head: str | None = None) -> Frozen:
    """What stands still beside adapters: all but their matrices, a fresh head, and the parameters that globs let learn whole.

    layers:  as in find_frozen, of the model with its adapters
    raises:  RecipeError for a glob that matches nothing
    """
    parameters = [name for name, _ in model.named_parameters()]
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    free = {f"{name}.{leaf}" for name, module in adapters.items() for leaf, _ in module.named_parameters(recurse=False)}
    free |= _matching(learn, parameters, list(layers), key="adapter.train") | set(layers.get(head or "", ()))
    own = tuple(f"{name}.dropout" for name in adapters)  # what falls out in front of an adapter goes on doing so
    still = [name for name in layers if free.isdisjoint(layers[name]) and name not in own]
    return Frozen(tuple(p for p in parameters if p not in free), tuple(still))


def _matching(globs: Sequence[str], parameters: Sequence[str], order: Sequence[str], *, key: str) -> set[str]:
    matched: set[str] = set()
    for glob in globs:
        hits = [p for p in parameters if fnmatch.fnmatchcase(p, glob) or p.startswith(glob + ".")]
        if not hits:
            close = nearest(glob.strip("*."), [*parameters, *order])
            mend = f"did you mean '{close[0]}'?" if close else f"they are {', '.join(parameters[:8])} …"
            raise RecipeError(f"'{glob}' matches no parameter", mend=mend, key=key)
        matched.update(hits)
    return matched


def _last_inside(order: Sequence[str], through: str) -> int:
    """The last layer that is `through` or lies inside it."""
    inside = [i for i, name in enumerate(order) if name == through or name.startswith(through + ".")]
    if not inside:
        outer = {name.rsplit(".", depth)[0] for name in order for depth in range(name.count(".") + 1)} | set(order)
        close = nearest(through, outer)
        raise RecipeError(
            f"the model has no layer '{through}' that runs",
            mend=f"did you mean '{close[0]}'?" if close else f"its layers run in this order: {', '.join(order[:20])}",
            key="freeze.through",
        )
    return inside[-1]


def freeze(model: nn.Module, frozen: Frozen) -> None:
    """Take the gradient from the frozen parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in set(frozen.parameters))


def set_training(model: nn.Module, frozen: Frozen) -> None:
    """Training mode for what trains, eval mode for what stands still."""
    model.train()
    still = set(frozen.layers)
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    for name, module in model.named_modules():
        inside = [leaf for leaf in leaves if leaf == name or leaf.startswith(name + ".")] if name else leaves
        if inside and still.issuperset(inside):
            module.eval()


def frozen_digest(model: nn.Module, frozen: Frozen) -> str:
    """SHA-256 over the frozen parameters and the buffers of the frozen layers."""
    moving = moving_state(model, frozen)
    return tensors_digest({name: tensor for name, tensor in model.state_dict().items() if name not in moving})


def moving_state(model: nn.Module, frozen: Frozen) -> dict[str, Tensor]:
    """The part of a model's state that training may change."""
    names, layers = set(frozen.parameters), set(frozen.layers)
    return {n: t for n, t in model.state_dict().items() if n not in names and n.rpartition(".")[0] not in layers}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
