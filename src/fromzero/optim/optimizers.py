"""Optimizers: a name, groups and plain options in, a torch optimizer out. Knows no model, schedule or loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fromzero.errors import RecipeError, did_you_mean

# Where torch does other than the paper: SGD multiplies lr with the velocity instead of adding it in (Sutskever 2013,
# equations 1 to 4), and starts the velocity at the first gradient; RMSProp (Hinton's lecture 6e) adds eps outside the
# root. Adam is arXiv:1412.6980 Algorithm 1 with L2 in the gradient, AdamW is arXiv:1711.05101 Algorithm 2.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(name: str, groups: Sequence[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The named optimizer over these groups; a group's own lr goes before `options`.

    raises:   RecipeError on an unknown name, and where there is no parameter to train
    """
    if name not in OPTIMIZERS:
        raise RecipeError(
            f"there is no optimizer '{name}'",
            why=did_you_mean(name, OPTIMIZERS),
            mend="known are " + ", ".join(OPTIMIZERS),
            key="optimizer.name",
        )
    if not any(group["params"] for group in groups):
        raise RecipeError(
            "nothing is left to train",
            why="every parameter is frozen, or the model has none",
            mend="freeze less, or give the model a new head",
            key="freeze",
        )
    return OPTIMIZERS[name](groups, **options)
