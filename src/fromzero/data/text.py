"""Text: a column of texts, or a corpus, in; examples out whose batches are tokens end to end with offsets. No padding.

Dims: M examples, B examples of a batch, N their tokens end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fromzero.data.tokens as tk
from fromzero.data.examples import IGNORED, Examples, Inputs
from fromzero.data.table import Table
from fromzero.errors import DataError

MOST_TEXTS_FOR_BPE = 1_000_000


@dataclass(frozen=True)
class TextAsked:
    """What a recipe says of its text. tokenizer: characters, bpe or the text of a tokenizer.json; vocabulary: of bpe."""

    tokenizer: str = "bpe"
    vocabulary: int = 8000
    max_tokens: int | None = None


@dataclass(frozen=True)
class TextFormat:
    """How texts became tokens. tokenizer: the text of its tokenizer.json; special: whether it frames each text."""

    tokenizer: str
    max_tokens: int | None = None
    column: str = "text"
    special: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class TextFacts:
    """What was seen of the tokens in training. cut: examples shortened to max_tokens; unknown: tokens that stand for no text."""

    vocabulary: int
    tokens: int
    longest: int
    cut: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class TextExamples:
    """Spans of one row of tokens.

    flat:    all tokens, int32 to save room
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
        place = torch.arange(int(offsets[-1])) + torch.repeat_interleave(self.starts[index] - offsets[:-1], lengths)  # (N,)
        inputs = (self.flat[place].long(), offsets)
        if self.answers is not None:
            return inputs, self.answers[index]
        following = self.flat[place + 1].long()  # (N,)
        return inputs, following if self.trained is None else following.where(self.trained[place + 1], IGNORED)

    def facts(self, form: TextFormat) -> TextFacts:
        unknown = tk.unknown_id(form.tokenizer)
        return TextFacts(
            vocabulary=tk.vocabulary_size(form.tokenizer),
            tokens=int(self.lengths.sum()),
            longest=int(self.lengths.max()),
            cut=self.cut,
            unknown=0 if unknown is None else int((self.flat == unknown).sum()),
        )


def fit_text(asked: TextAsked, texts: Sequence[str], column: str, *, special: bool) -> TextFormat:
    """Take the tokenizer asked for, or make one from the training texts."""
    tokenizer = asked.tokenizer
    if tokenizer == "characters":
        tokenizer = tk.characters(texts)
    elif tokenizer == "bpe":
        tokenizer = tk.byte_pairs(texts[:MOST_TEXTS_FOR_BPE], asked.vocabulary)
    return TextFormat(tokenizer, asked.max_tokens, column, special)


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


def next_tokens(form: TextFormat, documents: Sequence[str]) -> TextExamples:
    """Each document in pieces of max_tokens; every token but a document's first is predicted exactly once."""
    ids = tk.encode(form.tokenizer, documents, special=form.special)
    size = form.max_tokens or max((len(one) for one in ids), default=1)
    starts, lengths, begin = [], [], 0
    for one in ids:
        for start in range(0, len(one) - 1, size):
            starts.append(begin + start)
            lengths.append(min(size, len(one) - 1 - start))
        begin += len(one)
    return TextExamples(_flat(ids), torch.tensor(starts), torch.tensor(lengths), None)


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
        self.texts = ["" if cell is None else str(cell) for cell in self.table.columns[self.column]]
        for row, text in enumerate(self.texts):
            if not text.strip():
                raise DataError(
                    f"{self.table.where(row)}: column '{self.column}' is empty",
                    why="there is no text to learn from",
                    mend="remove the row",
                    key="data.input",
                )

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
        return whole_texts(form, [self.texts[row] for row in rows], targets)
