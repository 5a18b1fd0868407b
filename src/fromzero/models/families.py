"""Families: the `model_type` of a published config.json in, how to build such a model and what its tensors are called out.

A family is a description and a name map, not code of its own. Knows no file and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Config = Mapping[str, Any]  # a config.json, read
TensorMap = dict[str, tuple[tuple[str, ...], str, tuple[int, ...]]]  # ours → (theirs, how, sizes): see weights/translate.py


def _as_it_is(config: Config, **options: Any) -> dict[str, Any]:
    return dict(config)


@dataclass(frozen=True)
class Family:
    """How one published family becomes a module of ours.

    build:    config, and options such as outputs=, pooling= → the module with fresh weights
    names:    config, and the tensor names that a file has (empty: the canonical ones for writing) → the map of names
    ignored:  globs of published tensors that are no weights (buffers, tied copies)
    reads:    text | image
    speaks:   whether its plain form predicts the next token
    written:  config, and the options it was built with → the config.json to write beside such a model
    """

    build: Callable[..., nn.Module]
    names: Callable[[Config, Collection[str]], TensorMap]
    ignored: tuple[str, ...] = ()
    reads: str = "text"
    speaks: bool = False
    written: Callable[..., dict[str, Any]] = _as_it_is
