"""Attention over documents end to end: queries, keys and values in, their weighted values out; no token sees another document.

One formula, three paths, equal by test: `plain` writes the whole mask out, `documents` calls torch's fused kernel for
all documents of one length together, `varlen` is torch's kernel for documents end to end (GPU only; not measured here).
Dims: N tokens end to end, H query heads, G key/value heads, K head width, T length of a document, C documents of one length;
in what is kept of documents that are read bit by bit: R documents, C places for tokens of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.models.layers.documents import Documents, Group


@dataclass(frozen=True)
class Bits:
    """The next tokens of the R documents of a cache, and where a layer that keeps C places of each puts them: position p at p mod C.

    shape:     (R, G, C) of what is kept
    size:      new tokens of all documents
    places:    (M · G,) int64 into the R · G · C places, of the tokens that stay
    staying:   (M,) int64, which of the new ones those are; None where all stay
    read:      places of the document that fills the most of them
    seen:      (R, 1, 1, read) bool, those that each document fills; None where all do
    """

    shape: tuple[int, int, int]
    size: int
    places: Tensor
    staying: Tensor | None
    read: int
    seen: Tensor | None


def bits_of(pasts: Sequence[int], counts: Sequence[int], heads: int, room: int, device: torch.device) -> Bits:
    """pasts: tokens of each document that were read before.  heads, room: G and C"""
    places: list[int] = []
    staying: list[int] = []
    first = 0
    for row, (past, count) in enumerate(zip(pasts, counts, strict=True)):
        gone = max(count - room, 0)
        places += [row * heads * room + position % room for position in range(past + gone, past + count)]
        staying += range(first + gone, first + count)
        first += count
    filled = [min(past + count, room) for past, count in zip(pasts, counts, strict=True)]
    seen = None
    if min(filled) < max(filled):
        seen = torch.arange(max(filled), device=device) < torch.tensor(filled, device=device)[:, None, None, None]  # (R, 1, 1, read)
    chosen = None if len(staying) == first else torch.tensor(staying, device=device)
    every = torch.tensor(places, device=device)[:, None] + room * torch.arange(heads, device=device)  # (M, G)
    return Bits((len(counts), heads, room), first, every.flatten(), chosen, max(filled), seen)


@dataclass
class Past:
    """What one layer keeps of the R documents of a cache: keys and values, (R, G, C, K) each.

    C is never more than the window: of a document that is longer the last C tokens stay, in a ring.
    """

    window: int | None
    k: Tensor | None = None
    v: Tensor | None = None

    def places(self, room: int) -> int:
        """C, in a cache with room for so many tokens of each document"""
        return room if self.window is None else min(room, self.window)

    def add(self, k: Tensor, v: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
        """k, v: (N, G, K) of the new tokens.  returns: what is kept of all, (R, G, read, K) each"""
        self.k, self.v = _put(self.k, k, bits), _put(self.v, v, bits)
        return self.k[:, :, : bits.read], self.v[:, :, : bits.read]

    def widen(self, room: int) -> None:
        places = self.places(room)
        self.change(lambda t: F.pad(t, (0, 0, 0, places - t.shape[2])))

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = how(self.k), how(self.v)


def _put(kept: Tensor | None, new: Tensor, bits: Bits) -> Tensor:
    if kept is None:  # zeros: what a mask leaves out is still multiplied by its weight of 0, and must be a number
        kept = new.new_zeros(*bits.shape, new.shape[2])
    kept.view(-1, new.shape[2]).index_copy_(0, bits.places, (new if bits.staying is None else new[bits.staying]).flatten(0, 1))
    return kept


Kept = Sequence[tuple[Past, Bits]]  # of one layer: the documents of a call are those of the first, then of the second …


class Attend(nn.Module):
    """softmax(q kᵀ · scale) v within each document. It has no parameters.

    causal:   a token sees itself and what stands before it
    reach:    a token sees others at most this far away (sliding window; a window of W tokens reaches W - 1)
    scale:    of the scores; 1/√K if None
    softcap:  scores become cap · tanh(score / cap); arXiv:2408.00118 section 2
    source:   arXiv:1706.03762 section 3.2; grouped heads arXiv:2305.13245
    """

    def __init__(self, *, causal: bool, reach: int | None = None, scale: float | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.causal, self.reach, self.scale, self.softcap = causal, reach, scale, softcap
        self.path = "documents"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, kept: Kept | None = None) -> Tensor:
        """q: (N, H, K)  k, v: (N, G, K), G divides H.  kept: added to, and seen too.  returns: (N, H, K)"""
        if kept is not None:
            queries, keys, values = (t.split([bits.size for _, bits in kept]) if len(kept) > 1 else (t,) for t in (q, k, v))
            held = [(*past.add(new, value, bits), bits.seen) for (past, bits), new, value in zip(kept, keys, values, strict=True)]
            if any(documents.pasts):
                parts = [self._next(part, *one) for part, one in zip(queries, held, strict=True)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.path == "varlen" and self.softcap is None:
            return self._varlen(q, k, v, documents)
        if self.path == "plain":
            k, v = self._shared(q, k, v)
            whole = self._visible(documents.positions, owner=documents.owner)
            out = self._weigh(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), whole)  # (H, N, K)
            return out.transpose(0, 1)
        sizes = [group.count * group.length for group in documents.groups]
        runs = zip(q.split(sizes), k.split(sizes), v.split(sizes), documents.groups, strict=True)
        parts = [self._group(*run) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _group(self, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
        """All documents of one length at once: (C · T, H, K) each"""
        q, k, v = (t.reshape(group.count, group.length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))  # (C, H, T, K)
        near = self.reach is None or group.length <= self.reach + 1
        if near and self.softcap is None:
            shared = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=shared)
        else:
            k, v = self._shared(q, k, v)
            seen = self._visible(torch.arange(group.length, device=q.device))
            if self.softcap is None:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
            else:
                out = self._weigh(q, k, v, seen)
        return out.transpose(1, 2).reshape(group.count * group.length, *q.shape[1::2])  # (C · T, H, K)

    def _shared(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each key and value once for every query head that shares it"""
        repeats = q.shape[1] // k.shape[1]  # both (N, H, K) and (C, H, T, K) have their heads there
        return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))

    def _next(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """One token of each document.  q: (R, H, K)  k, v: (R, G, T, K)  seen: (R, 1, 1, T).  returns: (R, H, K)"""
        if self.softcap is None and (len(q) == 1 or q.dtype.itemsize < 4):  # a short type would round the scores that are written out
            shared = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen, scale=self.scale, enable_gqa=shared)[:, :, 0]
        q = q.view(len(q), k.shape[1], -1, q.shape[2])  # the heads that share a key stand under each other
        scores = (k @ (q * self._scale(q)).transpose(-1, -2)).transpose(-1, -2)  # keys first: quicker
        return self._mixed(scores, v, seen).flatten(1, 2)

    def _visible(self, positions: Tensor, owner: Tensor | None = None) -> Tensor:
        """(T, T) bool: whether a row's token sees a column's"""
        ahead = positions[:, None] - positions  # (T, T)
        seen = torch.ones_like(ahead, dtype=torch.bool) if owner is None else owner[:, None] == owner
        if self.causal:
            seen = seen & (ahead >= 0)
        if self.reach is not None:
            seen = seen & (ahead.abs() <= self.reach)
        return seen

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """The formula written out: (…, T, K) each; seen fits (…, T, T), None where all is"""
        return self._mixed(q @ k.transpose(-1, -2) * self._scale(q), v, seen)

    def _scale(self, q: Tensor) -> float:
        return 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale

    def _mixed(self, scores: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """scores: (…, S, T) of S queries.  v: (…, T, K).  returns: (…, S, K)"""
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(dim=-1) @ v

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # imports the GPU kernels

        offsets = documents.offsets.to(torch.int32)
        reach = -1 if self.reach is None else self.reach
        window = (reach, 0 if self.causal else reach)
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, offsets, offsets, documents.longest, documents.longest, scale=self.scale, window_size=window, enable_gqa=grouped
        )
        assert isinstance(out, Tensor)
        return out


def choose_path(model: nn.Module, path: str) -> int:
    """Let every attention of a model take this path.  returns: how many there are"""
    found = [module for module in model.modules() if isinstance(module, Attend)]
    for module in found:
        module.path = path
    return len(found)
