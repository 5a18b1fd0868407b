"""rnn: sequences of vectors, or texts of tokens, in; class scores or numbers a sequence, or scores a token, out. Knows no vocabulary's words.

A text is read without padding: all documents advance together, and one that has ended takes no part in the later positions.
Dims: B batch, T positions, N tokens end to end, F values a position, D width, K outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fromzero.errors import ModelError, ShapeError, did_you_mean
from fromzero.models.layers.documents import Documents, documents_of

CELLS: dict[str, Callable[..., nn.Module]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
PER = ("sequence", "token")


class RNN(nn.Module):
    """(Embedding –) recurrent layers – head on each sequence's last state, or on each token's.

    Each layer is a module of its own, so that the lower ones can be frozen. With `bidirectional` a second cell reads
    backwards, and its last state stands at the first position. Dropout is on each layer's outputs and on the last states.

    source: Elman, Cognitive Science 14 (1990); LSTM with forget gate: Hochreiter and Schmidhuber, Neural Computation 9
    (1997), Gers et al., Neural Computation 12 (2000); GRU: arXiv:1406.1078 section 2.3, in torch's variant; bidirectional:
    Schuster and Paliwal, IEEE Trans. Signal Processing 45 (1997)
    """

    def __init__(
        self,
        inputs: Sequence[int] | None = None,
        *,
        outputs: int,
        vocabulary: int | None = None,
        cell: str = "lstm",
        width: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        embedding: int | None = None,
        per: str = "sequence",
    ) -> None:
        """inputs: (T, F) of one sample, or vocabulary: V.  outputs: K.  per: sequence or token.  embedding: its width, D if None

        raises: ModelError for options that do not go together
        """
        super().__init__()
        shape = None if inputs is None else tuple(inputs)
        for key, wrong, what in (
            ("cell", cell not in CELLS, f"has no cell '{cell}'; {did_you_mean(cell, CELLS) or 'lstm, gru or rnn'}"),
            ("per", per not in PER, f"predicts per sequence or per token, not per '{per}'"),
            ("layers", layers < 1, f"needs at least one layer, not {layers}"),
            ("per", per == "token" and vocabulary is None, "predicts per token only for texts: give a vocabulary"),
            ("bidirectional", per == "token" and bidirectional, "cannot predict next tokens when bidirectional: it would see the answers"),
            ("vocabulary", (shape is None) == (vocabulary is None), "reads vectors or tokens: give either inputs or a vocabulary"),
            ("from", shape is not None and len(shape) != 2, f"takes sequences (positions, values); the data has inputs of shape {shape}"),
        ):
            if wrong:
                raise ModelError(f"rnn {what}", key=f"model.{key}")
        self.per = per
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, embedding or width)
        size = self.embedding.embedding_dim if self.embedding else (shape or (0,))[-1]
        both = width * (2 if bidirectional else 1)
        self.blocks = nn.ModuleList(
            CELLS[cell](both if i else size, width, batch_first=True, bidirectional=bidirectional) for i in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(both, outputs)
        for block in self.blocks:
            _initialise(block)

    @property
    def stages(self) -> tuple[str, ...]:
        return (*(("embedding",) if self.embedding else ()), *(f"blocks.{i}" for i in range(len(self.blocks))), "head")

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x: (B, T, F) float, or (N,) int64 with offsets: (B + 1,) int64 where built with a vocabulary

        returns:  (B, K), or (N, K) per token
        raises:   ShapeError where offsets are missing or out of place
        """
        if self.embedding is None or offsets is None:
            if self.embedding is not None or offsets is not None:
                raise ShapeError("rnn reads tokens with offsets, or vectors without", why="it was built for the other")
            return self._read(x, self.dropout)
        documents, vectors = documents_of(x, offsets), self.embedding(x)  # (N, D)
        if len(documents.groups) == 1:
            dense = vectors.reshape(len(documents.lengths), documents.longest, -1)
            read = self._read(dense, lambda x: self.dropout(x.flatten(0, 1)).view_as(x))
            return read.flatten(0, 1) if self.per == "token" else read
        packed, order = pack(vectors, documents)
        back = order.argsort()
        read = self._read(packed, lambda x: x._replace(data=self.dropout(x.data[back])[order]))
        return read[back] if self.per == "token" else read

    def _read(self, x: Any, drop: Callable[[Any], Any]) -> Tensor:
        """x: (B, T, D) or a packed sequence.  drop: dropout that sees tokens end to end, so that what falls out does not depend on packing

        returns: (B, K), or per token (B, T, K) for a dense batch, (N, K) in the order of the packed one
        """
        for i, block in enumerate(self.blocks):
            x, state = block(drop(x) if i > 0 else x)
        if self.per == "token":
            x = drop(x)
            scores: Tensor = self.head(x.data if isinstance(x, PackedSequence) else x)
            return scores
        last = state[0] if isinstance(state, tuple) else state  # (directions, B, D)
        of_all: Tensor = self.head(self.dropout(last.transpose(0, 1).flatten(1)))
        return of_all


def pack(values: Tensor, documents: Documents) -> tuple[PackedSequence, Tensor]:
    """Documents end to end to torch's form: all first positions, then all second ones …, the longest document first in each.

    values:   (N, …)
    returns:  the packed sequence, and order: (N,) int64, the place in `values` of each of its rows
    """
    lengths = torch.tensor(documents.lengths)
    longest_first = lengths.argsort(descending=True, stable=True)  # (B,)
    rank, longest_first = longest_first.argsort().to(values.device), longest_first.to(values.device)
    order = (documents.positions * len(lengths) + rank[documents.owner]).argsort()  # (N,)
    running = (lengths > torch.arange(documents.longest)[:, None]).sum(1)  # (T,) documents not yet ended; torch wants it on the CPU
    return PackedSequence(values[order], running, longest_first, rank), order


@torch.no_grad()
def _initialise(block: nn.Module) -> None:
    """Torch's own, but recurrent matrices orthogonal gate by gate, and the forget gate of an LSTM open at first.

    source: orthogonal arXiv:1312.6120 section 3; forget bias 1 Jozefowicz, Zaremba, Sutskever, PMLR 37 (2015) section 2.2
    """
    for name, parameter in block.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.split(parameter.shape[1]):
                nn.init.orthogonal_(gate)
        elif isinstance(block, nn.LSTM) and name.startswith("bias"):  # torch has two biases, which add up
            parameter.chunk(4)[1].fill_(1.0 if name.startswith("bias_ih") else 0.0)
