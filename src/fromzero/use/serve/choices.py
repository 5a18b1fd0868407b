"""Tokens of one answer in, the text that is certain so far out: whole characters, ended by a stop string, calls of tools set apart.

Knows no model and no HTTP. A call is read where the model's own template writes calls as <tool_call>{"name": …, "arguments": …}</tool_call>
(Hermes, Qwen 2.5 and 3, SmolLM3); of any other format it stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fromzero.data.tokens as tk
from fromzero.models.together import Made
from fromzero.use.spelling import BROKEN, Cut, Spelling

CALL = "<tool_call>"
_CALLS = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclass
class Choice:
    """One answer as it comes.

    calls:   whether calls of tools are looked for
    tokens:  how many it has
    finish:  empty, stop, length or tool_calls
    told:    per token since it was last asked for, what `logprobs` says
    """

    tokenizer: str
    near: Sequence[int]
    stops: Sequence[str]
    calls: bool = False
    logprobs: bool = False
    tokens: int = 0
    finish: str = ""
    called: list[dict[str, Any]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._spelling = Spelling(self.tokenizer, self.near, self.stops)
        self._call = Cut([CALL] if self.calls else [])

    def hear(self, made: Made) -> str:
        """returns: text that is certain and was not given before"""
        text = ""
        if made.ended != "stop":
            self.tokens += 1
            text = self._spelling.add(made.token)
            if self.logprobs:
                self.told.append(_likely(self.tokenizer, made))
        if made.ended and not self._spelling.stopped:
            text += self._spelling.end()
        if made.ended or self._spelling.stopped:
            self.finish = "stop" if self._spelling.stopped or made.ended == "stop" else "length"
        said = self._call.add(text, last=bool(self.finish))
        if self.finish and self._call.rest is not None:
            self.called = read_calls(self._call.rest)
            said, self.finish = (said.rstrip(), "tool_calls") if self.called else (said + self._call.rest, self.finish)
        return said

    def since(self) -> list[dict[str, Any]]:
        told, self.told = self.told, []
        return told


def read_calls(text: str) -> list[dict[str, Any]]:
    """Calls as OpenAI's API writes them; none where any of them is no plain JSON."""
    calls = []
    for written in _CALLS.findall(text):
        try:
            call = json.loads(written)
            arguments = call["arguments"]
            function = {"name": str(call["name"]), "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
        calls.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return calls


def _likely(tokenizer: str, made: Made) -> dict[str, Any]:
    def of(token: int, logprob: float) -> dict[str, Any]:
        (text,) = tk.pieces(tokenizer, [token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": None if BROKEN in text else list(text.encode())}

    return {**of(made.token, made.logprob), "top_logprobs": [of(*one) for one in made.likeliest]}
