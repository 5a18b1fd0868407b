"""Decoder: tokens of documents end to end in, scores of each next token out; or K scores a document from its last token.

One implementation for all families: a DecoderConfig says what a family is. Knows no published file and no name of one.
Dims: B documents, N tokens end to end, D width, H query heads, G key/value heads, K head width, F hidden width, V vocabulary, L layers,
R documents of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.errors import ModelError, ShapeError
from fromzero.models.layers.attention import Attend, Bits, Kept, Past, bits_of
from fromzero.models.layers.documents import Documents, documents_of
from fromzero.models.layers.experts import Experts
from fromzero.models.layers.feedforward import FeedForward
from fromzero.models.layers.norm import RMSNorm
from fromzero.models.layers.packed import packed
from fromzero.models.layers.rotary import Rope, rotate, turns

Turn = tuple[Tensor, Tensor]  # what rotate takes, (N, 1, R) each


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer: window in tokens (None: the whole document), rope, experts or one feed-forward."""

    window: int | None = None
    rope: Rope | None = None
    experts: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is, completely. Sizes in the letters of the module's legend."""

    vocabulary: int  # V
    width: int  # D
    hidden: int  # F
    heads: int  # H
    kv_heads: int  # G, divides H
    head_width: int  # K
    context: int  # tokens; the longest document, where positions are learned
    layers: tuple[Layer, ...]
    norm: str = "rms"  # rms | layer
    norm_place: str = "pre"  # pre: of a sublayer's input; post: of its output, before it is added (OLMo 2); both (Gemma 2)
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the weight of RMS norms
    qk_norm: str = "none"  # none | head: over K of each head | projection: over all H · K or G · K at once
    learned_positions: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    tied: bool = False  # the head is the token embedding
    scaled_embedding: bool = False  # times √D
    attention_scale: float | None = None  # 1/√K if None
    attention_cap: float | None = None
    logits_cap: float | None = None  # logits become cap · tanh(logit / cap)
    experts: int = 0
    experts_per_token: int = 0
    experts_hidden: int = 0
    experts_normalised: bool = True
    dropout: float = 0.0  # of what each sublayer adds; attention weights are never dropped: the fused kernels are exact
    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                f"{self.kv_heads} key/value heads do not divide {self.heads} query heads", why="each is shared by as many query heads"
            )

    def norm_of(self, width: int) -> nn.Module:
        if self.norm == "layer":
            return nn.LayerNorm(width, eps=self.norm_eps)
        return RMSNorm(width, self.norm_eps, offset=self.norm_offset)


@dataclass
class Cache:
    """What a decoder keeps of R documents that are read bit by bit, with room for equally many tokens of each.

    texts:   the tokens that were read of each
    room:    a power of two; it is widened where a document needs more
    layers:  keys and values
    """

    texts: list[list[int]] = field(default_factory=lambda: [[]])
    room: int = 0
    layers: list[Past] = field(default_factory=list)

    def widen(self, room: int) -> None:
        for past in self.layers:
            past.widen(room)
        self.room = room

    def part(self, rows: Sequence[int]) -> Cache:
        """A copy of some documents; what is held of the others is freed with this one."""
        taken = Cache([self.texts[row] for row in rows], self.room, [replace(past) for past in self.layers])
        for past in taken.layers:
            past.change(lambda t: t[list(rows)])
        return taken

    def join(self, other: Cache) -> None:
        """The documents of another with the same room stand behind these."""
        self.texts += other.texts
        for past, more in zip(self.layers, other.layers, strict=True):
            assert past.k is not None and past.v is not None and more.k is not None and more.v is not None
            past.k, past.v = torch.cat([past.k, more.k]), torch.cat([past.v, more.v])


def room_for(tokens: int) -> int:
    """Tokens of each document that a cache has room for, when the longest has so many."""
    return int(max(64, 1 << (tokens - 1).bit_length()))


class Embedding(nn.Module):
    """Tokens become vectors, plus those of their positions where positions are learned."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.tokens = _table(config.vocabulary, config.width)
        self.positions = _table(config.context, config.width) if config.learned_positions else None
        self.scale = math.sqrt(config.width) if config.scaled_embedding else None
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        """tokens: (N,) int64.  returns: (N, D).  raises: ShapeError where a document is longer than the learned positions"""
        x: Tensor = self.tokens(tokens)
        if self.scale is not None:  # rounded to the type of the weights, as in Gemma's training
            x = x * torch.full((), self.scale, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            if documents.longest > self.positions.num_embeddings:
                raise ShapeError(
                    f"a document has {documents.longest} tokens, the model's learned positions end at {self.positions.num_embeddings}",
                    mend="cut the documents, or take a family with rotary positions",
                )
            x = x + self.positions(documents.positions)
        dropped: Tensor = self.dropout(x)
        return dropped


def _table(rows: int, width: int) -> nn.Embedding:
    """Not drawn: Decoder._fill does it once."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return table


class SelfAttention(nn.Module):
    """Queries, keys and values by one product, normed and turned where the family does so, attended, and projected back to D."""

    def __init__(self, config: DecoderConfig, layer: Layer) -> None:
        super().__init__()
        self.head_width, self.interleaved = config.head_width, layer.rope is not None and layer.rope.interleaved
        self.heads = [config.heads, config.kv_heads]
        sizes = [heads * config.head_width for heads in self.heads]
        self.qkv = nn.Linear(config.width, sum(sizes) + sizes[1], bias=config.qkv_bias)
        normed = sizes if config.qk_norm == "projection" else [config.head_width] * 2
        self.q_norm, self.k_norm = (nn.Identity() if config.qk_norm == "none" else config.norm_of(width) for width in normed)
        self.is_normed, self.normed = config.qk_norm != "none", normed
        reach = None if layer.window is None else layer.window - 1
        self.attend = Attend(causal=True, reach=reach, scale=config.attention_scale, softcap=config.attention_cap)
        self.out = nn.Linear(sizes[0], config.width, bias=config.out_bias)

    def forward(self, x: Tensor, documents: Documents, turn: Turn | None, kept: Kept | None = None) -> Tensor:
        """x: (N, D).  returns: (N, D)"""
        heads, kv_heads = self.heads
        rows = x.shape[0]  # not len(x), which a program that is made of the model would hold as a constant
        every = self.qkv(x).view(rows, -1, self.head_width)  # (N, H + 2 G, K)
        both, v = every[:, :-kv_heads], every[:, -kv_heads:]
        if self.is_normed:
            parts = zip((self.q_norm, self.k_norm), both.split(self.heads, dim=1), self.normed, strict=True)
            both = torch.cat([norm(part.reshape(rows, -1, width)).view(rows, -1, self.head_width) for norm, part, width in parts], dim=1)
        if turn is not None:  # queries and keys are turned in one go
            both = rotate(both, *turn, interleaved=self.interleaved)
        q, k = both[:, :heads], both[:, heads:]  # (N, H, K)  (N, G, K)
        mixed = self.attend(q.to(v.dtype), k.to(v.dtype), v, documents, kept)  # autocast norms and turns in float32
        out: Tensor = self.out(mixed.flatten(1))
        return out


class Block(nn.Module):
    """Attention, then the feed-forward or experts, each added to what came in; a norm that the family lacks is an identity."""

    def __init__(self, config: DecoderConfig, layer: Layer) -> None:
        super().__init__()
        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.before_attention = config.norm_of(config.width) if before else nn.Identity()
        self.attention = SelfAttention(config, layer)
        self.after_attention = config.norm_of(config.width) if after else None
        self.before_mlp = config.norm_of(config.width) if before else nn.Identity()
        self.mlp: nn.Module
        if layer.experts:
            self.mlp = Experts(
                config.width,
                config.experts_hidden,
                experts=config.experts,
                per_token=config.experts_per_token,
                normalised=config.experts_normalised,
                activation=config.activation,
            )
        else:
            self.mlp = FeedForward(config.width, config.hidden, activation=config.activation, gated=config.gated, bias=config.mlp_bias)
        self.after_mlp = config.norm_of(config.width) if after else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, documents: Documents, turn: Turn | None, kept: Kept | None = None) -> Tensor:
        """x: (N, D).  returns: (N, D)"""
        x = self._add(x, self.attention(self.before_attention(x), documents, turn, kept), self.after_attention)
        return self._add(x, self.mlp(self.before_mlp(x)), self.after_mlp)

    def _add(self, x: Tensor, added: Tensor, norm: nn.Module | None) -> Tensor:
        """What would do nothing is not called: making one token is hundreds of short calls."""
        added = added if norm is None else norm(added)
        return x + self.dropout(added) if self.dropout.training else x + added


class Decoder(nn.Module):
    """outputs: None for a language model; K for scores of a whole document, from the state of its last token.

    A tied head has no parameters of its own and therefore no module: a copy of the name would be saved twice, and come apart
    when a model is built on the meta device.
    """

    def __init__(self, config: DecoderConfig, outputs: int | None = None) -> None:
        super().__init__()
        self.config, self.outputs = config, outputs
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = config.norm_of(config.width)
        self.head: nn.Module | None = None
        if outputs is not None:
            self.head = nn.Linear(config.width, outputs, bias=False)
        elif not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)
        self.ropes = tuple(dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None))
        self._fill()

    @property
    def stages(self) -> tuple[str, ...]:
        """Submodules in the order they run; a tied head runs in none."""
        blocks = (f"blocks.{i}" for i in range(len(self.blocks)))
        return ("embedding", *blocks, "norm", *(["head"] if self.head is not None else []))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The parameters with a row for each token"""
        kept = ("embedding.tokens.", *(("head.",) if self.outputs is None else ()))
        return tuple(name for name, _ in self.named_parameters() if name.startswith(kept))

    @torch.no_grad()
    def grow(self, rows: int) -> None:
        """More tokens, up to `rows`: each new row of embedding and head begins as the mean of the others.

        source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021
        """
        if rows <= self.config.vocabulary:
            return
        self.config = replace(self.config, vocabulary=rows)
        for name in self.vocabulary:
            place, _, kind = name.rpartition(".")
            module, old = self.get_submodule(place), self.get_parameter(name)
            grown = torch.cat([old, old.mean(0, keepdim=True).expand(rows - len(old), *old.shape[1:])])
            setattr(module, kind, nn.Parameter(grown))
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)

    @torch.no_grad()
    def pack(self, kind: str) -> None:
        """From here on it is only read: its matrices become Packed, and what they took in memory is freed.

        kind:  as there; the head keeps 8 bits where 4 are asked for, for what its rounding costs is more than all the rest
        """
        for module in [m for m in self.modules() if isinstance(m, SelfAttention | FeedForward)]:
            for name, linear in [(n, m) for n, m in module.named_children() if type(m) is nn.Linear]:  # adapters stay as they are
                setattr(module, name, packed(linear, kind))
        head = self.head
        if head is None:  # tied: the embedding keeps the matrix, and this is a second one
            head = nn.Linear(self.config.width, self.config.vocabulary, bias=False, device="meta")
            head.weight = self.embedding.tokens.weight
        self.head = packed(head, "int8" if kind == "int4" else kind)
        self.train(self.training)  # a new module is in training mode

    def forward(self, tokens: Tensor, offsets: Tensor | None) -> Tensor:
        """tokens: (N,) int64.  offsets: (B + 1,) int64; None: one document.  returns: (N, V), or (B, K) with outputs"""
        return self.scores(self.states(tokens, offsets))

    def states(self, tokens: Tensor, offsets: Tensor | None, caches: Sequence[Cache] | None = None) -> Tensor:
        """What the head reads.  returns: (N, D), or (B, D) with outputs: each document's last token

        caches:  what was read before of the documents: those of the first cache, then those of the second …; the tokens are added.
                 Begun documents go on by one token each, a single one by any number
        raises:  ShapeError for tokens and offsets that do not fit, or documents that the caches do not hold
        """
        if caches is not None and offsets is not None:
            return self._go_on(tokens, offsets, caches)
        return self._states(tokens, documents_of(tokens, offsets), [None] * len(self.blocks))

    def _go_on(self, tokens: Tensor, offsets: Tensor, caches: Sequence[Cache]) -> Tensor:
        texts = [text for cache in caches for text in cache.texts]
        if len(texts) != len(offsets) - 1:
            raise ShapeError(f"{len(offsets) - 1} documents for caches of {len(texts)}", mend="give each document a place in a cache")
        documents = documents_of(tokens, offsets, [len(text) for text in texts])
        begun, counts = any(documents.pasts), documents.lengths
        if begun and max(counts) > 1:
            if len(counts) > 1:
                raise ShapeError("documents that were begun go on by one token each", mend="read a new one by itself")
            return torch.cat([self._go_on(token, offsets.new_tensor([0, 1]), caches) for token in tokens.split(1)])
        said = iter(tokens.tolist())
        new = [list(islice(said, count)) for count in counts]
        if any(rope.far and 0 < len(text) == rope.limit for rope in self.ropes for text in texts):
            return self._read_again([text + more for text, more in zip(texts, new, strict=True)], caches, tokens.device)
        first, kept = 0, []
        for cache in caches:
            part = slice(first, first := first + len(cache.texts))
            kept.append(self._prepared(cache, documents.pasts[part], counts[part], tokens.device))
        states = self._states(tokens, documents, list(zip(*kept, strict=True)))
        for text, more in zip(texts, new, strict=True):
            text += more  # last, so that a call that fails changes no document
        return states

    def _read_again(self, texts: Sequence[list[int]], caches: Sequence[Cache], device: torch.device) -> Tensor:
        """Where from one token on every key of a document is turned otherwise.  returns: (B, D) of the last tokens"""
        offsets = torch.tensor([0, *map(len, texts)], device=device).cumsum(0)
        fresh = [Cache([[] for _ in cache.texts], cache.room) for cache in caches]
        states = self._go_on(torch.tensor([token for text in texts for token in text], device=device), offsets, fresh)
        for cache, read in zip(caches, fresh, strict=True):
            cache.texts, cache.layers, cache.room = read.texts, read.layers, read.room
        return states if self.outputs is not None else states[offsets[1:] - 1]

    def _prepared(self, cache: Cache, pasts: Sequence[int], counts: Sequence[int], device: torch.device) -> list[tuple[Past, Bits]]:
        """What each layer keeps, with room for the new tokens, and where it puts them."""
        cache.layers = cache.layers or [Past(layer.window) for layer in self.config.layers]
        longest = max(past + count for past, count in zip(pasts, counts, strict=True))
        if longest > cache.room:
            cache.widen(room_for(longest))
        rooms = [past.places(cache.room) for past in cache.layers]
        bits = {room: bits_of(pasts, counts, self.config.kv_heads, room, device) for room in set(rooms)}
        return [(past, bits[room]) for past, room in zip(cache.layers, rooms, strict=True)]

    def _states(self, tokens: Tensor, documents: Documents, kept: Sequence[Kept | None]) -> Tensor:
        x = self.embedding(tokens, documents)
        turned = {rope: turns(rope, documents, dtype=x.dtype) for rope in self.ropes}
        for block, layer, held in zip(self.blocks, self.config.layers, kept, strict=True):
            x = block(x, documents, turned[layer.rope] if layer.rope is not None else None, held)
        states: Tensor = x if self.outputs is None else x[documents.last]
        return states

    def scores(self, states: Tensor) -> Tensor:
        """Row by row, so that only rows whose scores are wanted need be given.  states: (N, D).  returns: (N, V) or (N, K)"""
        x = self.norm(states)
        logits: Tensor = F.linear(x, self.embedding.tokens.weight) if self.head is None else self.head(x)  # (N, V)
        cap = self.config.logits_cap if self.outputs is None else None
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def _fill(self) -> None:
        """Normal 0.02, what is added to the residual stream divided by √(2 L), biases 0; norms begin as they were made.

        source: GPT-2 report section 2.3, and its code for the 0.02
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # where only names and sizes are asked for, the first draw makes torch import for seconds
                continue
            added = ".out." in name or ".down" in name
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(std=0.02 / math.sqrt(2 * len(self.blocks)) if added else 0.02)
