"""Written: an nn.Sequential of torch's own layers in, a plain description out, and the same layers back.

torch prints such layers as the call that makes them; this reads that text as data and never evaluates it.
"""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from fromzero.errors import ModelError


def describe_written(module: nn.Module) -> Any:
    """A nested description, or None where a layer is not torch's own or does not come back the same."""
    tree = _describe(module)
    if tree is None or not isinstance(module, nn.Sequential):
        return None
    try:
        again = build_written(tree)
    except (ModelError, TypeError, ValueError):
        return None
    theirs = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    ours = {name: tuple(t.shape) for name, t in again.state_dict().items()}
    return tree if ours == theirs and repr(again) == repr(module) else None


def _describe(module: nn.Module) -> Any:
    if type(module) is nn.Sequential:
        children = [(name, _describe(child)) for name, child in module.named_children()]
        return None if any(child is None for _, child in children) else {"sequential": children}
    name = type(module).__name__
    if getattr(nn, name, None) is not type(module) or list(module.children()):
        return None
    return {"layer": name, "call": module.extra_repr()}


def build_written(tree: Any) -> nn.Module:
    """raises: ModelError where the description is not one that describe_written makes"""
    if "sequential" in tree:
        sequential = nn.Sequential()
        for name, child in tree["sequential"]:
            sequential.add_module(name, build_written(child))
        return sequential
    kind = getattr(nn, str(tree["layer"]), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(f"'{tree['layer']}' is no layer of torch.nn")
    try:
        call = ast.parse(f"f({tree['call']})", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = [ast.literal_eval(a) for a in call.args]
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ModelError(f"the options of layer {tree['layer']} are no plain values: {tree['call']}") from None
    layer: nn.Module = kind(*arguments, **options)
    return layer
