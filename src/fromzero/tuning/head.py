"""Head: a module and the name of its last Linear in, the same module with a fresh one out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fromzero.errors import ModelError, did_you_mean


def new_head(model: nn.Module, layer: str | None, outputs: int, *, linears: Sequence[str]) -> nn.Module:
    """Replace a Linear by a fresh one of the same inputs and `outputs` outputs.

    layer:    its name; None where no Linear makes the model's output
    linears:  the Linears that run, for the message
    returns:  the model (the fresh layer itself, where the model was that layer)
    raises:   ModelError where it is not found or no Linear
    """
    if layer is None:
        raise ModelError(
            "the layer that makes the output was not found",
            why=f"the Linears that run are {', '.join(linears)}" if linears else "no Linear runs in this model",
            mend="name it with head: {new: true, layer: NAME}, or build the model with the right size",
            key="head",
        )
    modules = dict(model.named_modules())
    old = modules.get(layer)
    if not isinstance(old, nn.Linear):
        what = "is no layer of the model" if old is None else f"is {type(old).__name__}, not Linear"
        raise ModelError(
            f"head.layer '{layer}' {what}", mend=did_you_mean(layer, linears) or f"the Linears are {', '.join(linears)}", key="head.layer"
        )
    fresh = nn.Linear(old.in_features, outputs, bias=old.bias is not None, dtype=old.weight.dtype, device=old.weight.device)
    if not layer:
        return fresh
    parent, _, name = layer.rpartition(".")
    setattr(modules[parent], name, fresh)
    return model
