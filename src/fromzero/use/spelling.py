"""Spelling: ids as they are made in, the text they spell out, in whole characters and up to the first stop string. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import fromzero.data.tokens as tk

BROKEN = "\ufffd"  # what a tokenizer shows for the bytes of a character that is not whole


class Spelling:
    """The text of one row of ids. What is not a whole character waits for the next id, and at the end is left out; what may begin a
    stop string waits too.

    before:  ids whose text stands before and is not given
    stops:   texts that end it and are no part of it. Of several, that counts which is whole first, wherever the tokens are cut
    """

    def __init__(self, tokenizer: str, before: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._window, self._said = list(before), tk.decode(tokenizer, before)
        self._fresh: list[int] = []
        self._waiting = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """returns: the text that is sure now"""
        self._fresh.append(token)
        text = tk.decode(self._tokenizer, [*self._window, *self._fresh])
        if text.endswith(BROKEN) or len(text) <= len(self._said):
            return ""
        new = text[len(self._said) :]
        self._window, self._fresh = self._fresh, []  # they stay as what stands before: a token by itself may be written otherwise
        self._said = tk.decode(self._tokenizer, self._window)
        return self._sure(new)

    def end(self) -> str:
        """returns: the text that was waiting; there is no more"""
        text = tk.decode(self._tokenizer, [*self._window, *self._fresh])
        sure = self._sure(text[len(self._said) :].rstrip(BROKEN))
        return sure + self._waiting

    def _sure(self, new: str) -> str:
        text, self._waiting = self._waiting + new, ""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        beginnings = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        sure = len(text) - max(beginnings, default=0)
        self._waiting = text[sure:]
        return text[:sure]


def as_text(tokenizer: str, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The text of ids as they come."""
    spelling = Spelling(tokenizer, before)
    for token in ids:
        if piece := spelling.add(token):
            yield piece
    if rest := spelling.end():
        yield rest
