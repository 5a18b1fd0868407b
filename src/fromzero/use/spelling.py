"""Spelling: ids as they are made in, the text they spell out, in whole characters and up to the first stop string. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import fromzero.data.tokens as tk

BROKEN = "\ufffd"  # what a tokenizer shows for the bytes of a character that is not whole


@dataclass
class Cut:
    """Text up to the first of some marks. Of several, that counts which is whole first, wherever the text comes in pieces.

    rest: the mark and what follows it, once it was found
    """

    marks: Sequence[str]
    rest: str | None = None
    _held: str = ""

    def add(self, text: str, *, last: bool = False) -> str:
        """returns: what is before any mark for certain; what may begin one is held back unless it is the last"""
        if self.rest is not None:
            self.rest += text
            return ""
        text = self._held + text
        whole = [(at + len(mark), at) for mark in self.marks if (at := text.find(mark)) >= 0]
        if whole:
            self.rest = text[min(whole)[1] :]
            return text[: min(whole)[1]]
        begun = (size for mark in self.marks for size in range(1, len(mark)) if text.endswith(mark[:size]))
        sure = len(text) - (0 if last else max(begun, default=0))
        self._held = text[sure:]
        return text[:sure]


class Spelling:
    """The text of one row of ids. What is not a whole character waits for the next id, and at the end is left out; what may begin a
    stop string waits too.

    before:  ids whose text stands before and is not given
    stops:   texts that end it and are no part of it: see Cut
    """

    def __init__(self, tokenizer: str, before: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._cut = tokenizer, Cut(stops)
        self._window, self._said = list(before), tk.decode(tokenizer, before)
        self._fresh: list[int] = []

    @property
    def stopped(self) -> bool:
        return self._cut.rest is not None

    def add(self, token: int) -> str:
        """returns: the text that is sure now"""
        self._fresh.append(token)
        text = tk.decode(self._tokenizer, [*self._window, *self._fresh])
        if text.endswith(BROKEN) or len(text) <= len(self._said):
            return ""
        new = text[len(self._said) :]
        self._window, self._fresh = self._fresh, []  # they stay as what stands before: a token by itself may be written otherwise
        self._said = tk.decode(self._tokenizer, self._window)
        return self._cut.add(new)

    def end(self) -> str:
        """returns: the text that was waiting; there is no more"""
        text = tk.decode(self._tokenizer, [*self._window, *self._fresh])
        return self._cut.add(text[len(self._said) :].rstrip(BROKEN), last=True)


def as_text(tokenizer: str, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The text of ids as they come."""
    spelling = Spelling(tokenizer, before)
    for token in ids:
        if piece := spelling.add(token):
            yield piece
    if rest := spelling.end():
        yield rest
