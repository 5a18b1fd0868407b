"""What a request for text asks for in, OpenAI's answers out, whole or event by event. Knows no HTTP.

source: the API reference of OpenAI, chat completions and completions; streams of both
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fromzero.data.tokens as tk
from fromzero.errors import UserError
from fromzero.models.together import Sampling
from fromzero.use.schema import rule_of
from fromzero.use.serve.asked import Asked, Chat, Completion
from fromzero.use.serve.choices import CALL, Choice
from fromzero.use.serve.decoding import Decoding, Told, Wish
from fromzero.use.serve.limits import MOST_TEXTS
from fromzero.use.serve.metrics import Metrics
from fromzero.use.serve.refusal import Refused, said_of
from fromzero.use.speak import NEAR, Speaker, converse

Event = dict[str, Any]


def wishes_of(speaker: Speaker, asked: Chat | Completion) -> list[Wish]:
    """The texts that a request asks for, each prompt n times. Takes a while: a child renders the chat template.

    raises: Refused naming the field
    """
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options is of a stream", mend="set stream, or leave it out", param="stream_options")
    prompts = [_conversation(speaker, asked)] if isinstance(asked, Chat) else [_prompt(speaker, one) for one in asked.prompt]
    if len(prompts) * asked.n > MOST_TEXTS:
        raise Refused(400, f"{len(prompts)} prompts, {asked.n} answers each, are more than {MOST_TEXTS} texts", param="n")
    told = int(asked.top_logprobs if isinstance(asked, Chat) else asked.logprobs or 0)
    sampling = Sampling(
        asked.temperature,
        asked.top_k,
        asked.top_p if asked.top_p < 1 else None,
        asked.min_p,
        asked.repetition_penalty,
        most=(isinstance(asked, Chat) and asked.max_completion_tokens) or asked.max_tokens,
        logprobs=told,
    )
    wishes = []
    for ids in prompts:
        for number in range(asked.n):
            seed = None if asked.seed is None else asked.seed + number
            near = [] if isinstance(asked, Chat) else ids[-NEAR:]
            wishes.append(Wish(ids, near, replace(sampling, seed=seed), _allowed(speaker, asked)))
    return wishes


def _conversation(speaker: Speaker, asked: Chat) -> list[int]:
    if speaker.chat is None:
        raise Refused(400, f"'{speaker.name}' has no chat template", mend="POST /v1/completions goes on with text", param="messages")
    if asked.top_logprobs and not asked.logprobs:
        raise Refused(400, "top_logprobs needs logprobs", mend="set logprobs", param="top_logprobs")
    tools = [tool.seen() for tool in asked.tools] if asked.tool_choice == "auto" else []
    try:
        return converse(speaker, [message.seen() for message in asked.messages], tools or None, whole=True).prompt
    except UserError as error:
        raise said_of("messages", error) from None


def _prompt(speaker: Speaker, given: str | list[int]) -> list[int]:
    ids = speaker.encode(given) if isinstance(given, str) else given
    known = tk.vocabulary_size(speaker.tokenizer)
    if not isinstance(given, str) and not 0 <= min(given) <= max(given) < known:
        raise Refused(400, f"an id is none of the {known} tokens, which are counted from 0", param="prompt")
    if len(ids) >= speaker.context:
        raise Refused(400, f"has {len(ids)} tokens, the model reads {speaker.context}", mend="shorten it", param="prompt")
    return ids


def _allowed(speaker: Speaker, asked: Asked) -> Any:
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if (form.json_schema is None) == (form.type == "json_schema"):
        raise Refused(
            400, f"{form.type} goes {'with' if form.json_schema is None else 'without'} a schema", param="response_format.json_schema"
        )
    schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
    try:
        return rule_of(schema, speaker.tokenizer, speaker.stops)
    except UserError as error:
        raise said_of("response_format", error) from None


@dataclass
class Answer:
    """One request's texts while they are made. Use `whole` or `events`, once."""

    asked: Chat | Completion
    told: Told
    choices: list[Choice]
    read: int  # tokens of the prompts
    metrics: Metrics
    name: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.name = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    @property
    def chat(self) -> bool:
        return isinstance(self.asked, Chat)

    async def pieces(self) -> AsyncGenerator[tuple[int, str], None]:
        """(which choice, text that is certain by now, perhaps none), until every choice has its finish"""
        try:
            while self.told.open:
                place, made = await self.told.next()
                piece = self.choices[place].hear(made)
                if self.choices[place].finish and not made.ended:
                    self.told.stop(place)
                yield place, piece
        finally:
            self.told.leave()
            self.metrics.tokens["prompt"] += self.read
            self.metrics.tokens["completion"] += sum(choice.tokens for choice in self.choices)

    async def whole(self) -> dict[str, Any]:
        texts = [""] * len(self.choices)
        async for place, piece in self.pieces():
            texts[place] += piece
        choices = []
        for place, (choice, text) in enumerate(zip(self.choices, texts, strict=True)):
            told = self._logprobs(choice)
            if self.chat:
                calls = {"tool_calls": choice.called} if choice.called else {}
                said: Event = {"message": {"role": "assistant", "content": None if calls and not text else text, **calls}}
            else:
                said = {"text": text}
            choices.append({"index": place, **said, "logprobs": told, "finish_reason": choice.finish})
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": self.usage}

    async def events(self) -> AsyncGenerator[Event, None]:
        """The first comes with the first token, so that what is wrong is known before anything was sent."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        begun: set[int] = set()
        pieces = self.pieces()
        try:
            async for place, piece in pieces:
                choice = self.choices[place]
                said: Event = {}
                if self.chat and place not in begun:
                    said = {"role": "assistant", "content": ""}
                if piece:
                    said["content"] = piece
                if choice.called:
                    said["tool_calls"] = [{"index": i, **call} for i, call in enumerate(choice.called)]
                begun.add(place)
                if said or choice.finish:
                    content = {"delta": said} if self.chat else {"text": piece}
                    one = {"index": place, **content, "logprobs": self._logprobs(choice), "finish_reason": choice.finish or None}
                    yield {**head, "choices": [one], **({"usage": None} if usage else {})}
            if usage:
                yield {**head, "choices": [], "usage": self.usage}
        finally:
            await pieces.aclose()

    @property
    def usage(self) -> dict[str, int]:
        made = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.read, "completion_tokens": made, "total_tokens": self.read + made}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.asked.model}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not choice.logprobs:
            return None
        told = choice.since()
        if self.chat:
            return {"content": told}
        best = [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in told]
        return {"tokens": [one["token"] for one in told], "token_logprobs": [one["logprob"] for one in told], "top_logprobs": best}


def begin(speaker: Speaker, decoding: Decoding, asked: Chat | Completion, wishes: Sequence[Wish], metrics: Metrics) -> Answer:
    calls = isinstance(asked, Chat) and bool(asked.tools) and speaker.chat is not None and CALL in speaker.chat.template
    told = asked.logprobs if isinstance(asked, Chat) else asked.logprobs is not None
    choices = [Choice(speaker.tokenizer, wish.near, asked.stop, calls=calls, logprobs=told) for wish in wishes]
    return Answer(asked, decoding.begin(wishes), choices, sum(len(wish.ids) for wish in wishes[:: asked.n]), metrics)
