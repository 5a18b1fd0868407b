"""Text: a column of texts, or a corpus, in; examples out whose batches are tokens end to end with offsets. No padding.

Dims: M examples, B examples of a batch, N their tokens end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

import fromzero.data.tokens as tk
from fromzero.data.examples import IGNORED, Examples, Inputs
from fromzero.data.table import Table, refuse
from fromzero.errors import DataError, Fault

MOST_TEXTS_FOR_BPE = 1_000_000


@dataclass(frozen=True)
class TextAsked:
    """What a recipe says of its text. tokenizer: characters, bpe or the text of a tokenizer.json; vocabulary: of bpe; stream: as in TextFormat."""

    tokenizer: str = "bpe"
    vocabulary: int = 8000
    max_tokens: int | None = None
    stream: bool = False


@dataclass(frozen=True)
class TextFormat:
    """How texts became tokens.

    tokenizer: the text of its tokenizer.json;  special: whether it frames each text
    stream:    documents are one stream with the tokenizer's end between them, and pieces run across it; else none does
    """

    tokenizer: str
    max_tokens: int | None = None
    column: str = "text"
    special: bool = True
    stream: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class TextFacts:
    """What was seen of the tokens in training. cut: examples shortened to max_tokens; unknown: tokens that stand for no text;
    bytes: UTF-8 length of what is predicted, 0 where that is not asked."""

    vocabulary: int
    tokens: int
    longest: int
    cut: int = 0
    unknown: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class TextExamples:
    """Spans of one row of tokens.

    flat:    all tokens, int32 or uint16 to save room; it may be a file's memory map: nothing here copies the whole
    starts:  (M,) where each example begins;  lengths: (M,)
    answers: (M, …) targets of the examples; None: each token's target is the next one of `flat`
    cut:     examples that were shortened
    trained: bool for each of `flat`: whether it is to be predicted; None: all are
    bytes:   UTF-8 length of what the targets say, for bits a byte; 0 where that is not asked
    """

    flat: Tensor
    starts: Tensor
    lengths: Tensor
    answers: Tensor | None
    cut: int = 0
    trained: Tensor | None = None
    bytes: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def targets(self) -> Tensor:
        return self.lengths[:, None] if self.answers is None else self.answers

    def take(self, index: Tensor) -> tuple[Inputs, Tensor]:
        """index: (B,)  returns: ((N,) int64 tokens, (B + 1,) int64 offsets), and (B, …) answers or (N,) next tokens, IGNORED where not trained"""
        lengths = self.lengths[index]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        place = places(self.starts[index], lengths)
        inputs = (self.flat[place].long(), offsets)
        if self.answers is not None:
            return inputs, self.answers[index]
        following = self.flat[place + 1].long()  # (N,)
        return inputs, following if self.trained is None else following.where(self.trained[place + 1], IGNORED)

    def beginning(self, example: int) -> list[int]:
        """The tokens before the first that is trained; where all are, the first half, of which 32 are enough."""
        start, length = int(self.starts[example]), int(self.lengths[example])
        first = min(32, (length + 1) // 2) if self.trained is None else int(self.trained[start : start + length + 1].int().argmax())
        return [int(token) for token in self.flat[start : start + first]]

    def facts(self, form: TextFormat) -> TextFacts:
        unknown = tk.unknown_id(form.tokenizer)
        return TextFacts(
            vocabulary=tk.vocabulary_size(form.tokenizer),
            tokens=int(self.lengths.sum()),
            longest=int(self.lengths.max()),
            cut=self.cut,
            unknown=0 if unknown is None else sum(int((part == unknown).sum()) for part in self.flat.split(2**24)),
            bytes=self.bytes,
        )


def places(starts: Tensor, lengths: Tensor) -> Tensor:
    """Where spans lie, one behind the other.  starts, lengths: (B,).  returns: (N,)"""
    ends = lengths.cumsum(0)
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - (ends - lengths), lengths)


def fit_text(asked: TextAsked, texts: Iterable[str], column: str, *, special: bool) -> TextFormat:
    """Take the tokenizer asked for, or make one from the training texts.

    raises: DataError where documents are to be a stream and the tokenizer has nothing to put between them
    """
    tokenizer = asked.tokenizer
    if tokenizer == "characters":
        tokenizer = tk.characters(texts, end=asked.stream)
    elif tokenizer == "bpe":
        tokenizer = tk.byte_pairs(islice(texts, MOST_TEXTS_FOR_BPE), asked.vocabulary)
    if asked.stream and tk.end_id(tokenizer) is None:
        raise DataError(
            "the tokenizer has no token that ends a document",
            why="a stream needs one between documents",
            mend=f"say data.documents: apart, or name a tokenizer with one of {' '.join(tk.ENDS)}",
            key="data.tokenizer",
        )
    return TextFormat(tokenizer, asked.max_tokens, column, special, asked.stream)


def whole_texts(form: TextFormat, texts: Sequence[str], answers: Tensor) -> TextExamples:
    """One example a text, cut to max_tokens inside its frame."""
    before, after = tk.frame(form.tokenizer) if form.special else ([], [])
    room = None if form.max_tokens is None else form.max_tokens - len(before) - len(after)
    if room is not None and room < 1:
        raise DataError(f"leaves no room for text beside {len(before) + len(after)} special tokens", key="data.max_tokens")
    ids, cut = [], 0
    for one in tk.encode(form.tokenizer, texts, special=form.special):
        if form.max_tokens is not None and len(one) > form.max_tokens:
            one, cut = [*before, *one[len(before) : len(before) + (room or 0)], *after], cut + 1
        ids.append(one)
    lengths = torch.tensor([len(one) for one in ids])
    return TextExamples(_flat(ids), lengths.cumsum(0) - lengths, lengths, answers, cut)


def next_tokens(form: TextFormat, flat: Tensor, tokens: Tensor, sizes: Tensor, first: Tensor) -> TextExamples:
    """Documents in pieces of max_tokens; every token but a document's first, or the stream's, is predicted exactly once.

    flat:           (N,) the documents end to end, each with the tokenizer's end behind it if there is one
    tokens, sizes:  (documents,) tokens of each, with its end, and UTF-8 bytes
    first:          (documents,) their first tokens, whose bytes are not counted, as they are not predicted
    """
    begins = tokens.cumsum(0) - tokens
    if form.stream:
        begins, tokens, sizes, first = begins[:1], tokens.sum(0, keepdim=True), sizes.sum(0, keepdim=True), first[:1]
    follow = (tokens - (1 if tk.end_id(form.tokenizer) is None else 2)).clamp(min=0)  # predicted of each document; none behind the last end
    size = form.max_tokens or max(int(follow.sum()), 1)
    counts = (follow + size - 1) // size
    within = (torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)) * size
    lengths = (follow.repeat_interleave(counts) - within).clamp(max=size)
    ids, times = first[counts > 0].unique(return_counts=True)
    unsaid = sum(tk.byte_length(form.tokenizer, token) * n for token, n in zip(ids.tolist(), times.tolist(), strict=True))
    said = int(sizes[counts > 0].sum()) - unsaid
    return TextExamples(flat, begins.repeat_interleave(counts) + within, lengths, None, bytes=said)


def _flat(ids: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for one in ids for token in one], dtype=torch.int32)


@dataclass
class TextRows:
    """Rows of a table of which one column holds text."""

    table: Table
    target: str
    column: str
    asked: TextAsked
    set_aside: dict[str, str]
    kind: str = "text"

    def __post_init__(self) -> None:
        cells = self.table.columns[self.column]
        self.texts = ["" if cell is None else str(cell) for cell in cells]
        words = any(isinstance(cell, str) for cell in cells)  # where there are none, numbers are what is to be read
        faults: list[Fault] = []
        for line, cell, text in zip(self.table.lines, cells, self.texts, strict=True):
            what = "is empty" if not text.strip() else f"is {type(cell).__name__} {text:.20}, in other rows text"
            if not text.strip() or (words and not isinstance(cell, str)):
                faults.append(Fault(f"column '{self.column}' {what}", mend="correct or remove the row", file=self.name, line=line))
        refuse(faults)

    @property
    def name(self) -> str:
        return self.table.file

    @property
    def labels(self) -> Sequence[object]:
        return self.table.columns[self.target]

    def __len__(self) -> int:
        return len(self.table)

    def keys(self) -> list[bytes]:
        """Texts that differ in white space alone count as one: most tokenizers do not tell them apart."""
        return [" ".join(text.split()).encode("utf-8", "surrogatepass") for text in self.texts]

    def where(self, row: int) -> str:
        return self.table.where(row)

    def fit(self, rows: Sequence[int]) -> TextFormat:
        return fit_text(self.asked, [self.texts[row] for row in rows], self.column, special=True)

    def examples(self, rows: Sequence[int], form: object, targets: Tensor) -> Examples:
        assert isinstance(form, TextFormat)
        made = whole_texts(form, [self.texts[row] for row in rows], targets)
        if len(empty := (made.lengths == 0).nonzero()[:, 0]):
            what = f"{len(empty)} texts become no token at all, the first in {self.table.where(rows[int(empty[0])])}"
            why = "the tokenizer takes away all they say, and nothing is left to learn from"
            raise DataError(what, why=why, mend="remove the rows, or take another tokenizer", key="data.input")
        return made
