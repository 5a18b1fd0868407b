"""Norms: each vector of the last dimension in, the same scaled to unit root mean square out.

LayerNorm is torch's own. Dims: D width of a vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        x = x.to(weight.dtype)  # autocast may bring a shorter type
        if not torch.is_grad_enabled():  # for a few rows autograd's own work takes longer than all of this
            return _normed(x, weight, self.eps)[0]
        normed: Tensor = _RMS.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (…, D)  weight: (D,).  returns: the vectors normed, and what each was multiplied by, (…, 1)"""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # (…, 1)
    inverse = torch.rsqrt(size.mul_(size).div_(x.shape[-1]).add_(eps))
    return (x * inverse).mul_(weight).to(x.dtype), inverse


class _RMS(torch.autograd.Function):
    """torch's own is several operations on a CPU and keeps what each gives; this keeps x and one number a vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (…, D)  weight: (D,)"""
        normed, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x · inverse and h = gradient · weight: inverse · (h − n · mean(h n)), and the sum of gradient · n"""
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = None, None
        if ctx.needs_input_grad[0]:
            inner = gradient * weight
            share = (inner * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])  # (…, 1)
            dx = inner.mul_(inverse).addcmul_(x, share)
        if ctx.needs_input_grad[1]:
            dweight = (gradient * x).mul_(inverse).flatten(0, -2).sum(0)
        return dx, dweight, None
