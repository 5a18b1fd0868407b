"""Low-rank adapters: a module and names of its Linears in, the same module with a small trained product beside each out, and back.

Works on any module. Knows no family and no file.
Dims: N tokens or rows, P parts of a fused Linear (queries, keys and values), R rank; `in` and `out` are the sizes of the Linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fromzero.errors import ModelError
from fromzero.tuning.quantized import BITS, QuantizedLinear


class LowRank(nn.Module):
    """y = W x + bias + s B A x in the place of a Linear, whose own W and bias stand still; with DoRA each row scaled to a magnitude.

    Two paths, equal by test: `plain` computes two thin products beside the large one; `merged` computes with W + s B A, which costs
    the memory of W once, and no gradient of the size of W. What cannot be merged exactly (DoRA, dropout at work, a quantised or
    training W, autocast, 16 bits, where a small change would be rounded away) takes the plain path.

    sizes:    rows of each part; a part has an A and a B of its own, as if it were a Linear by itself
    a:        (P · R, in), uniform as a Linear's own weight; b: (out, R), zero; s: alpha / R, or alpha / √R rank-stabilised
    dropout:  of what A reads
    source:   arXiv:2106.09685 section 4.1; s arXiv:2312.03732 section 3; DoRA arXiv:2402.09353 section 4, the norm a constant in
              the backward pass as in section 4.3
    """

    _tensor: Tensor | None  # see _kept
    _base: list[tuple[int, int]]
    _thin: tuple[Tensor, ...]
    _made_of: tuple[Tensor, ...]

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        sizes: Sequence[int],
        *,
        rank: int,
        alpha: float,
        rank_stabilised: bool = False,
        dora: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base, self.sizes, self.rank = base.requires_grad_(False), tuple(sizes), rank
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        weight = base.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        a = torch.empty(len(self.sizes) * rank, weight.shape[1], dtype=torch.float32, device="cpu")  # the same draws on every device
        self.a = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator).to(weight))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight, dim=1)) if dora else None
        self.dropout = nn.Dropout(dropout)
        self.path = "plain"
        self.forget()

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in).  returns: (…, out)"""
        y: Tensor
        if self.path == "merged" and self._merges(x):
            y = _Merged.apply(x, self._kept(), self.base.bias, self.a, self.b, self)  # type: ignore[no-untyped-call]
            return y
        y = self.base(x)
        inner = self.scale * F.linear(self.dropout(x).to(self.a.dtype), self.a)  # (…, P · R)
        thin = [F.linear(h, b) for h, b in zip(inner.split(self.rank, -1), self.b.split(self.sizes), strict=True)]
        y = y + (thin[0] if len(thin) == 1 else torch.cat(thin, -1)).to(y.dtype)
        if self.magnitude is None:
            return y
        factor = (self.magnitude / self._kept()).to(y.dtype)  # (out,)
        return factor * y if self.base.bias is None else factor * y + (1 - factor) * self.base.bias

    def _merges(self, x: Tensor) -> bool:
        base, fine = self.base, (torch.float32, torch.float64)
        if self.magnitude is not None or (self.dropout.p and self.dropout.training) or not isinstance(base, nn.Linear):
            return False
        exact = x.dtype in fine and x.dtype == self.a.dtype == self.b.dtype == base.weight.dtype
        return exact and not base.weight.requires_grad and not torch.is_autocast_enabled(x.device.type)

    def _kept(self) -> Tensor:
        """W + s B A, or with DoRA the norms of its rows; computed anew, in place, where something it is made of has changed.

        A and B are compared with copies, for torch's fused optimizers do not count a tensor's versions up; W stands still.
        """
        made_of = (*self.base.parameters(), *self.base.buffers())
        base = [(id(tensor), tensor._version) for tensor in made_of]
        same = self._tensor is not None and base == self._base and torch.equal(self.a, self._thin[0]) and torch.equal(self.b, self._thin[1])
        if self._tensor is None or not same:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.a.device.type, enabled=False):
                if self.magnitude is None:
                    self._tensor = self._sum(self._tensor)
                else:
                    self._tensor = torch.linalg.vector_norm(self._sum(), dim=1)
                self._thin = (self.a.clone(), self.b.clone())
            self._base, self._made_of = base, made_of  # held, so that no other tensor can get one of these ids
        return self._tensor

    def _sum(self, into: Tensor | None = None) -> Tensor:
        """W + s B A.  returns: (out, in), in `into` where it is given"""
        weight = self.base.weight.to(self.a.dtype)
        into = torch.empty_like(weight) if into is None else into
        parts = (t.split(self.sizes) for t in (weight, self.b, into))
        for a, w, b, rows in zip(self.a.split(self.rank), *parts, strict=True):
            torch.addmm(w, b, a, alpha=self.scale, out=rows)
        return into

    def forget(self) -> None:
        """Let go of what is kept between calls."""
        self._tensor, self._base, self._thin, self._made_of = None, [], (), ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()  # moved or cast: the parameters keep their versions
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensor": None, "_base": [], "_thin": (), "_made_of": ()}  # a copy's parameters begin to count anew

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain Linear that computes the same; in the type of W, float32 where that is quantised."""
        weight = self._sum()  # (out, in)
        if self.magnitude is not None:
            weight *= (self.magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
        plain = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(self.base.weight.dtype))
        plain.bias = None if self.base.bias is None else nn.Parameter(self.base.bias.clone())
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, rank={self.rank}, scale={self.scale:g}, dora={self.magnitude is not None}, path={self.path}"


class _Merged(torch.autograd.Function):
    """x (W + s B A)ᵀ + bias, with the gradients of A and B from products as thin as they are; keeps x alone, the rest is the layer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, layer: LowRank) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.layer = layer
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        layer: LowRank = ctx.layer
        dx = gradient @ merged if ctx.needs_input_grad[0] else None
        x, g = x.flatten(0, -2), gradient.flatten(0, -2)  # (N, in), (N, out)
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        parts = g.split(layer.sizes, 1)
        # The thin side comes first in each product: on a CPU that is two to eight times as fast as the other way round.
        inner = (layer.scale * (a @ x.T)).split(layer.rank)  # (R, N) each
        db = torch.cat([h @ part for h, part in zip(inner, parts, strict=True)], 1).T  # (out, R)
        back = torch.cat([rows.T @ part.T for rows, part in zip(b.split(layer.sizes), parts, strict=True)])  # (P · R, N)
        return dx, None, dbias, layer.scale * (back @ x), db, None


def choose_lowrank_path(model: nn.Module, path: str) -> int:
    """Let every adapter of a model take this path.  returns: how many there are"""
    found = [module for module in model.modules() if isinstance(module, LowRank)]
    for module in found:
        module.path = path
        module.forget()
    return len(found)


def add_adapters(
    model: nn.Module,
    parts: Mapping[str, Sequence[int]],
    *,
    rank: int,
    alpha: float,
    rank_stabilised: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    base: str = "full",
    seed: int = 0,
) -> nn.Module:
    """Put a LowRank in the place of each named Linear. All else is left as it is, trained or not.

    parts:    name of a Linear → rows of its parts; (out,) where it is not fused
    base:     full, 8bit or 4bit: how the Linear's own weight is kept
    returns:  the model itself
    raises:   ModelError where a name is no plain Linear inside the model, or its rows are others
    """
    modules, generator = dict(model.named_modules()), torch.Generator().manual_seed(seed)
    for name, sizes in parts.items():
        old = modules.get(name)
        if not name or type(old) is not nn.Linear or old.out_features != sum(sizes):  # a subclass may compute something else
            what = type(old).__name__ + (f" of {old.out_features} rows" if isinstance(old, nn.Linear) else "")
            raise ModelError(
                f"'{name}' is {what if old else 'not there'}, an adapter needs a Linear of {sum(sizes)} rows inside the model",
                mend="leave it out of the targets",
                key="adapter.targets",
            )
        kept = old if base == "full" else QuantizedLinear(old, BITS[base])
        options: dict[str, Any] = {"rank_stabilised": rank_stabilised, "dora": dora, "dropout": dropout, "generator": generator}
        model.set_submodule(name, LowRank(kept, sizes, rank=rank, alpha=alpha, **options).train(old.training))
    return model


def merge_adapters(model: nn.Module) -> float:
    """Put a plain Linear that computes the same in the place of each LowRank inside the model; the Linears train.

    returns: the largest difference between the two on random rows, relative to the largest value; 0 where there is no adapter
    """
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    choose_lowrank_path(model, "plain")
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            plain = module.merged()
            with torch.no_grad():
                x = torch.randn(8, plain.in_features, generator=generator).to(plain.weight)
                before, after = module.eval()(x), plain(x)
                worst = max(worst, ((after - before).abs().max() / before.abs().max().clamp(min=1e-30)).item())
            model.set_submodule(name, plain)
    return worst
