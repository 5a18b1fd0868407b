"""Freezing: which parameters and layers stand still, found by name and by the order layers run; and the proof that they did.

Frozen means no gradient, eval mode (dropout off, BatchNorm statistics still) and unchanged buffers. Works on any module.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fromzero.errors import RecipeError, nearest


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
    matched: set[str] = set()
    for glob in names:
        hits = [p for p in parameters if fnmatch.fnmatchcase(p, glob) or p.startswith(glob + ".")]
        if not hits:
            close = nearest(glob.strip("*."), [*parameters, *order])
            raise RecipeError(
                f"'{glob}' matches no parameter",
                mend=f"did you mean '{close[0]}'?" if close else f"they are {', '.join(parameters[:8])} …",
                key="freeze",
            )
        matched.update(hits)
    still = [name for name in order if layers[name] and set(layers[name]) <= matched]
    return Frozen(tuple(p for p in parameters if p in matched), tuple(still))


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
    """SHA-256 over the frozen parameters and the buffers of the frozen layers, in order of their names."""
    prefixes = tuple(f"{name}." for name in frozen.layers)
    names = set(frozen.parameters)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in names or (prefixes and name.startswith(prefixes)):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
