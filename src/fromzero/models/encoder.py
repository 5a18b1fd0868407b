"""Encoder: tokens of documents end to end in, one vector or K outputs for each document out, by one bidirectional transformer.

BERT and its kin differ by a description (`EncoderConfig`), not by code. Knows no file, no published name and no tokenizer.
Dropout falls on the embedding, on what each half of a block adds, and before the head. The attention weights get none, unlike
in the papers: each path of attention would draw it in its own order, and the paths would no longer be equal.
Dims: N tokens end to end, B documents, D width, H heads, K head width, F hidden width, V vocabulary, L layers, R head width / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.errors import ModelError, ShapeError, did_you_mean
from fromzero.models.layers.attention import Attend
from fromzero.models.layers.documents import Documents, documents_of
from fromzero.models.layers.rotary import angles, rotate

POOLINGS = ("mean", "first", "pooler")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}  # as config files name them
ACTIVATIONS["gelu_new"] = partial(nn.GELU, approximate="tanh")
Turn = tuple[Tensor, Tensor]  # what rotate takes, (N, 1, R) each


@dataclass(frozen=True)
class EncoderConfig:
    """What sets one family of encoders apart from another.

    context:  tokens of the longest document
    first:    rows of the position table before the first one used
    types:    rows of the token type table; row 0 is added to every token; 0: no such table
    bias:     of all Linear and LayerNorm but the head
    gated:    the hidden layer is act(a) · b, with a and b from one Linear; arXiv:2002.05202 section 2
    prenorm:  blocks norm what they read, the first attention excepted (the embedding is normed), and a norm ends the body;
              else they norm what they write
    reaches:  per layer, how far a token sees to each side, None: to the ends; empty: None for all
    bases:    per layer, of the rotary frequencies; empty: learned positions
    pooler:   what published classifiers put between states and head: pooler_over (first | mean), a Linear, pooler_activation, perhaps a norm
    head_dropout: before the head; dropout if None
    """

    vocabulary: int
    width: int
    hidden: int
    heads: int
    layers: int
    context: int
    first: int = 0
    types: int = 0
    eps: float = 1e-12
    activation: str = "gelu"
    bias: bool = True
    gated: bool = False
    prenorm: bool = False
    reaches: tuple[int | None, ...] = ()
    bases: tuple[float, ...] = ()
    pooler_over: str = "first"
    pooler_activation: str = "tanh"
    pooler_norm: bool = False
    dropout: float = 0.0
    head_dropout: float | None = None


class Encoder(nn.Module):
    """Weights begin normal with deviation 0.02, biases at 0, norms at 1; arXiv:1810.04805 and its published code.

    outputs:    K of the head; None: no head, the pooled vector is the output
    pooling:    mean over a document's tokens | first token | pooler: as the family's published classifiers do
    dropout:    in the place of the config's, everywhere
    normalize:  the pooled vector has length 1, as sentence embeddings do; arXiv:1908.10084
    raises:     ModelError for an unknown pooling, or a width that the heads do not divide
    """

    def __init__(
        self,
        config: EncoderConfig,
        outputs: int | None = None,
        pooling: str = "mean",
        dropout: float | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            known = did_you_mean(pooling, POOLINGS) or f"one of {', '.join(POOLINGS)}"
            raise ModelError(f"no pooling is called '{pooling}'", mend=known, key="model.pooling")
        if config.width % config.heads:
            raise ModelError(f"{config.heads} heads do not divide a width of {config.width}", key="model.heads")
        if dropout is not None:
            config = replace(config, dropout=dropout, head_dropout=dropout)
        self.config, self.pooling, self.normalize = config, pooling, normalize
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = _norm(config) if config.prenorm else nn.Identity()
        self.pooler = Pooler(config, pooling)
        self.dropout = nn.Dropout(config.dropout if config.head_dropout is None else config.head_dropout)
        self.head = nn.Identity() if outputs is None else nn.Linear(config.width, outputs)
        self.apply(_begin)

    @property
    def stages(self) -> tuple[str, ...]:
        """The parts that hold parameters, in the order they run."""
        names = ("embedding", *(f"blocks.{layer}" for layer in range(self.config.layers)), "norm", "pooler", "head")
        return tuple(name for name in names if any(True for _ in self.get_submodule(name).parameters()))

    def forward(self, tokens: Tensor, offsets: Tensor | None) -> Tensor:
        """tokens: (N,) int64.  offsets: (B + 1,) int64; None: one document.  returns: (B, K), or (B, D) without a head"""
        documents = documents_of(tokens, offsets)
        pooled: Tensor = self.pooler(self._run(tokens, documents), documents)  # (B, D)
        if self.normalize:
            pooled = F.normalize(pooled, dim=-1)
        out: Tensor = self.head(self.dropout(pooled))
        return out

    def states(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """tokens: (N,) int64.  offsets: (B + 1,) int64.  returns: (N, D)"""
        return self._run(tokens, documents_of(tokens, offsets))

    def _run(self, tokens: Tensor, documents: Documents) -> Tensor:
        if documents.longest > self.config.context:
            raise ShapeError(
                f"a document has {documents.longest} tokens, the model reads {self.config.context}",
                why="it has learned no position beyond",
                mend="cut the documents with data.max_tokens",
            )
        x = self.embedding(tokens, documents)  # (N, D)
        turns = {base: self._turn(base, documents, x.dtype) for base in set(self.config.bases)}
        for layer, block in enumerate(self.blocks):
            x = block(x, documents, turns[self.config.bases[layer]] if turns else None)
        states: Tensor = self.norm(x)
        return states

    def _turn(self, base: float, documents: Documents, dtype: torch.dtype) -> Turn:
        """In float32 even for narrower weights: a long document turns by thousands of radians."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        width = self.config.width // self.config.heads
        places = torch.arange(0, width, 2, device=documents.positions.device).to(wide)
        return angles(documents.positions, 1 / base ** (places / width), dtype=wide)


class Embedding(nn.Module):
    """The token's vector, plus those of its place in its document and of token type 0 where the family has them; normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.first = config.first
        self.tokens = _table(config.vocabulary, config.width)
        self.positions = None if config.bases else _table(config.first + config.context, config.width)
        self.types = _table(config.types, config.width) if config.types else None
        self.norm = _norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        """returns: (N, D)"""
        x = self.tokens(tokens)
        if self.types is not None:
            x = x + self.types(tokens.new_zeros(1))
        if self.positions is not None:
            x = x + self.positions(documents.positions + self.first)
        out: Tensor = self.dropout(self.norm(x))
        return out


class Block(nn.Module):
    """Attention, then a hidden layer, each added to what it read. source: arXiv:1706.03762 section 3.1; prenorm arXiv:2002.04745"""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.prenorm, self.gated, self.heads = config.prenorm, config.gated, config.heads
        self.attend = Attend(causal=False, reach=config.reaches[layer] if config.reaches else None)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.attention_norm = nn.Identity() if config.prenorm and layer == 0 else _norm(config)
        self.up = nn.Linear(config.width, (2 if config.gated else 1) * config.hidden, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)
        self.hidden_norm = _norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, documents: Documents, turn: Turn | None) -> Tensor:
        """x: (N, D)  turn: for rotary positions.  returns: (N, D)"""
        if self.prenorm:
            x = x + self.dropout(self._attention(self.attention_norm(x), documents, turn))
            out: Tensor = x + self.dropout(self._hidden(self.hidden_norm(x)))
        else:
            x = self.attention_norm(x + self.dropout(self._attention(x, documents, turn)))
            out = self.hidden_norm(x + self.dropout(self._hidden(x)))
        return out

    def _attention(self, x: Tensor, documents: Documents, turn: Turn | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (N, H, K) each
        if turn is not None:
            q, k = rotate(q, *turn).to(v.dtype), rotate(k, *turn).to(v.dtype)
        out: Tensor = self.out(self.attend(q, k, v, documents).flatten(1))  # (N, D)
        return out

    def _hidden(self, x: Tensor) -> Tensor:
        up, *gate = self.up(x).chunk(2 if self.gated else 1, dim=-1)  # (N, F) each
        up = self.activation(up)
        out: Tensor = self.down(up * gate[0] if gate else up)
        return out


class Pooler(nn.Module):
    """Token states in, one vector a document out."""

    def __init__(self, config: EncoderConfig, pooling: str) -> None:
        super().__init__()
        published = pooling == "pooler"
        self.over = config.pooler_over if published else pooling
        self.dense = nn.Linear(config.width, config.width, bias=config.bias) if published else nn.Identity()
        self.activation = ACTIVATIONS[config.pooler_activation]() if published else nn.Identity()
        self.norm = _norm(config) if published and config.pooler_norm else nn.Identity()

    def forward(self, states: Tensor, documents: Documents) -> Tensor:
        """states: (N, D).  returns: (B, D)"""
        if self.over == "first":
            pooled = states[documents.offsets[:-1]]
        else:  # each document's sum by itself, in one order: index_add on a GPU would add in any order
            every = torch.arange(states.shape[0], device=states.device)
            pooled = F.embedding_bag(every, states, documents.offsets, mode="mean", include_last_offset=True)
        out: Tensor = self.norm(self.activation(self.dense(pooled)))
        return out


def _norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, eps=config.eps, bias=config.bias)


def _table(rows: int, width: int) -> nn.Embedding:
    """Not drawn: `_begin` does it once."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return table


def _begin(module: nn.Module) -> None:
    if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
        return  # on the meta device, where names and sizes are asked for, the first draw makes torch import for seconds
    nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
