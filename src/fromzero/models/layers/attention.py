"""Attention over documents end to end: queries, keys and values in, their weighted values out; no token sees another document.

One formula, three paths, equal by test: `plain` writes the whole mask out, `documents` calls torch's fused kernel for
all documents of one length together, `varlen` is torch's kernel for documents end to end (GPU only; not measured here).
Dims: N tokens end to end, H query heads, G key/value heads, K head width, T length of a document, C documents of one length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.models.layers.documents import Documents, Group

PATHS = ("plain", "documents", "varlen")


@dataclass
class Past:
    """What one layer keeps of a document that is read bit by bit: keys and values, (T, G, K) each."""

    k: Tensor | None = None
    v: Tensor | None = None

    def add(self, k: Tensor, v: Tensor, reach: int | None) -> tuple[Tensor, Tensor]:
        """k, v: of the new tokens.  returns: with those before, of which only what the next token sees is kept"""
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k]), torch.cat([self.v, v])
        first = 0 if reach is None else max(len(k) - reach, 0)
        self.k, self.v = k[first:], v[first:]
        return k, v


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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, past: Past | None = None) -> Tensor:
        """q: (N, H, K)  k, v: (N, G, K), G divides H.  past: added to, and seen too.  returns: (N, H, K)"""
        if past is not None:
            k, v = past.add(k, v, self.reach)
            if documents.past:
                return self._go_on(q, k, v, documents.positions)
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

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """q: (N, H, K) of the new tokens; k, v: (T, G, K), they end with the new tokens'.  returns: (N, H, K)

        The heads that share a key stand under each other as rows: no key is copied for each of them.
        """
        rows, groups = len(q), k.shape[1]
        seen = self._visible(positions, positions[-1] + torch.arange(1 - len(k), 1, device=q.device))  # (N, T)
        q = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # (G, H/G, N, K)
        out: Tensor = self._weigh(q.flatten(1, 2), k.transpose(0, 1), v.transpose(0, 1), seen.repeat(q.shape[1], 1))  # (G, H/G · N, K)
        out = out.unflatten(1, (-1, rows)).permute(2, 0, 1, 3)  # (N, G, H/G, K)
        return out.flatten(1, 2)

    def _visible(self, positions: Tensor, others: Tensor | None = None, owner: Tensor | None = None) -> Tensor:
        """(T, T) bool: whether a row's token sees a column's; the columns are the rows where no others are given"""
        ahead = positions[:, None] - (positions if others is None else others)  # (T, T)
        seen = torch.ones_like(ahead, dtype=torch.bool) if owner is None else owner[:, None] == owner
        if self.causal:
            seen = seen & (ahead >= 0)
        if self.reach is not None:
            seen = seen & (ahead.abs() <= self.reach)
        return seen

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """The formula written out: (…, T, K) each, seen (T, T)"""
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale)  # (…, T, T)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v

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
