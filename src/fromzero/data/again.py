"""Again: other data and the preparation of a run in, examples as the run's own out, for evaluation."""

from __future__ import annotations

from typing import Any

from fromzero.data.chat import chat_again
from fromzero.data.examples import Examples
from fromzero.data.language import corpus_again
from fromzero.data.load import Preparation, load_again
from fromzero.data.opening import Request
from fromzero.data.text import TextFormat
from fromzero.data.turns import ChatFormat


def again(source: Any, preparation: Preparation, request: Request, *, corpus: bool) -> Examples:
    """corpus: text is to be gone on with, and not a column of texts.  raises: DataError as the three ways do"""
    form = preparation.inputs
    if isinstance(form, ChatFormat):
        return chat_again(source, form, request)
    if corpus and isinstance(form, TextFormat):
        return corpus_again(source, form, request)
    return load_again(source, preparation, request)
