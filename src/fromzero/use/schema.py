"""Schema: a JSON schema and a tokenizer in, which tokens may follow out, so that a text is JSON of that schema. Knows no model.

The one place that meets llguidance, which does not fetch what a schema refers to and gives up on one that is too large.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromzero.errors import DataError, MissingExtra, ModelError

LONGEST = 1_000_000  # characters of a schema
KEY = "schema"
# As Python writes JSON; with white space at will a small model writes nothing else. A keyword that would not be kept is refused.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


class Rule:
    """Which tokens may follow in one text. Called with those that were made so far, of which it has seen all but the newest."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._seen = matcher, 0

    def __call__(self, made: Sequence[int]) -> Tensor:
        """returns: (V,) bool; none at all where the library gives up, and fault says why"""
        self._read(made)
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        return mask & (not self._matcher.is_error())

    def fault(self, made: Sequence[int]) -> str:
        """What is wrong with a text that ended; empty where it is whole."""
        self._read(made)
        if self._matcher.is_error():
            return _said(self._matcher)
        return "" if self._matcher.is_accepting() else f"it ends in the midst, after {len(made)} tokens"

    def _read(self, made: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(made[self._seen :]))
        self._seen = len(made)


def rule_of(schema: Any, tokenizer: str, stops: Collection[int]) -> Rule:
    """stops: tokens that end a text, allowed where it is whole

    raises: DataError for a schema that is none, or says what cannot be kept; ModelError for a tokenizer that cannot be held to one;
            MissingExtra
    """
    library = _library()
    if not isinstance(schema, Mapping):
        raise DataError(f"a schema is {type(schema).__name__}, no object", mend='write {"type": "object", "properties": {…}}', key=KEY)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"a schema is no JSON ({error})", key=KEY) from None
    if len(text) > LONGEST:
        raise DataError(f"a schema has {len(text):,} characters, more than {LONGEST:,}", mend="shorten it", key=KEY)
    try:
        grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=WRITTEN)
    except ValueError as error:
        raise DataError(f"a schema is refused: {error}", key=KEY) from None
    limits = library.LLParserLimits(verbose_errors=False)
    matcher = library.LLMatcher(_tokens(tokenizer, tuple(sorted(stops))), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_logit_bias()  # some faults show only here
    if matcher.is_error():
        mend = "leave that out, or check the answer for it yourself"
        raise DataError(f"a schema is refused: {_said(matcher)}", why="what is written could not be held to it", mend=mend, key=KEY)
    return Rule(matcher)


def read_schema(path: str) -> Any:
    """raises: DataError for a file that is no JSON"""
    try:
        return json.loads(Path(path).expanduser().read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})", file=path, key=KEY) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=path, key=KEY) from None


def _said(matcher: Any) -> str:
    return str(matcher.get_error()).partition("\n")[0][:300]


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise MissingExtra("a schema needs the package llguidance", mend="pip install 'fromzero[schema]'", key=KEY) from error


@lru_cache(maxsize=2)
def _tokens(tokenizer: str, stops: tuple[int, ...]) -> Any:
    """It looks at every token, which takes a second for a large vocabulary."""
    if not stops:
        why = "the text would not end where the JSON does"
        raise ModelError("the model has no token that ends a text", why=why, mend="take another model", key=KEY)
    try:
        return _library().LLTokenizer(tokenizer, eos_token=list(stops))
    except ValueError as error:
        raise ModelError(
            f"the model's tokenizer cannot be held to a schema: {str(error)[:200]}", mend="take another model", key=KEY
        ) from None
