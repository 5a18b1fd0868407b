"""Norms: each vector of the last dimension in, the same scaled to unit root mean square out.

LayerNorm is torch's own. Dims: D width of a vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · (offset + weight).

    offset:  1 where the published weight is what is added to one (Gemma); kept apart, so that the weight stays the published bits
    source:  arXiv:1910.07467 section 4
    """

    def __init__(self, width: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, D).  returns: (…, D)"""
        weight = self.weight + self.offset if self.offset else self.weight
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps)  # autocast may bring a shorter type; the kernel wants one
