"""A JSON schema in, which tokens may come next at each place of a text out, by the `llguidance` package. Knows no model.

Dims: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import fromzero.data.tokens as tk
from fromzero.errors import DataError, MissingExtra

ANY_OBJECT = {"type": "object"}
INSTALL = "pip install 'fromzero[serve]'"
SPACE = r"[ \n\t]{0,16}"  # between the parts of JSON: a small model would go on with white space for ever


def allowed_by(schema: Any, tokenizer: str, stops: Collection[int]) -> Callable[[Sequence[int]], Tensor]:
    """stops: tokens that may end the text where it is whole.

    returns: tokens made so far → (V,) bool; of one text, asked for once a token. It never raises: where no more can be said, the text may end
    raises:  MissingExtra without the package, DataError for a schema that is none or cannot be met; an address in it is not fetched
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise MissingExtra("the package llguidance is not installed", why="it holds a text to a schema", mend=INSTALL) from error
    vocabulary = _vocabulary(tokenizer, tuple(sorted(stops)))
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": SPACE})
    if wrong := LLMatcher.validate_grammar(grammar, vocabulary):
        raise DataError(f"the schema cannot be followed: {str(wrong)[:200]}", mend="schemas are those of llguidance")
    matcher, seen = LLMatcher(vocabulary, grammar), 0
    size = tk.vocabulary_size(tokenizer)
    ends = torch.zeros(size, dtype=torch.bool)
    ends[sorted(stops)] = True
    bits = torch.arange(8, dtype=torch.uint8)

    def allowed(made: Sequence[int]) -> Tensor:
        nonlocal seen
        fine = matcher.consume_tokens(list(made[seen:]))
        seen = len(made)
        if not fine or matcher.is_stopped():
            return ends
        packed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        return ((packed[:, None] >> bits) & 1).flatten()[:size].bool()  # (V,)

    return allowed


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: str, stops: tuple[int, ...]) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer, n_vocab=tk.vocabulary_size(tokenizer), eos_token=list(stops))
