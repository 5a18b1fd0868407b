"""Generators: a seed in, the random states of torch, Python and NumPy set together; noted, put back and lent together. Knows no run.

They belong to the process, and any code may draw from them: a model, a loss or a dataset of a person's own too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Noted = dict[str, Any]


def seed_all(seed: int) -> None:
    """What is drawn from here on follows from the seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more bits


def note(device: torch.device | None = None) -> Noted:
    """How far each was drawn from.

    device:   whose generator counts too
    returns:  tensors of torch's, plain numbers and an array of the others
    """
    noted = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
    if device is not None and device.type == "cuda":
        noted["cuda"] = torch.cuda.get_rng_state(device)
    return noted


def put_back(noted: Noted, device: torch.device | None = None) -> None:
    """As `note` gave them, or as JSON holds what it gave; one that was not noted stays as it is."""
    torch.set_rng_state(noted["torch"])
    if "python" in noted:
        version, words, gauss = noted["python"]
        random.setstate((version, tuple(words), gauss))
    if "numpy" in noted:
        np.random.set_state(noted["numpy"])
    if device is not None and device.type == "cuda" and "cuda" in noted:
        torch.cuda.set_rng_state(noted["cuda"], device)


@contextmanager
def lent(begin: int | Noted | None = None) -> Iterator[None]:
    """What is drawn inside does not move them outside.  begin: a seed or what was noted, with which they begin inside"""
    noted = note()
    try:
        if isinstance(begin, int):
            seed_all(begin)
        elif begin is not None:
            put_back(begin)
        yield
    finally:
        put_back(noted)
