"""Conversations in, tokens out, and which of them train: what the assistant must say itself, its terminator included.

Both are found from the rendered text alone. A turn is what its rendering adds to the prompt that the model would have seen;
where a template renders earlier turns otherwise than the last one, it is what a rendering with another answer does not share.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import fromzero.data.tokens as tk
from fromzero.data.template import Job, Renderer, render
from fromzero.errors import DataError, Fault

MARK = "\U0010fffd"  # of the private use area; stands for an answer where its place in a text is looked for
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become tokens. tokenizer, template: their texts; special: texts by name; stops: ids that end an answer."""

    tokenizer: str
    template: str
    special: dict[str, str]
    stops: tuple[int, ...]
    max_tokens: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Conversation:
    """A message may carry `weight: 0`, and is not trained then. where: file:line."""

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """trained: of each id, whether it is to be said; crossing: tokens partly so; empty: whether some answer has no words."""

    ids: list[int]
    trained: list[bool]
    text: str
    crossing: int
    empty: bool


def encode_conversations(
    form: ChatFormat, conversations: Sequence[Conversation], *, turns: Literal["all", "last"] = "all"
) -> list[Encoded | Fault]:
    """The tokens of each conversation, or what is wrong with that one.

    raises: DataError where the template is at fault, whatever the conversation
    """
    ending = _ending(form)
    drafting = [_draft(one, turns, ending) for one in conversations]
    done: list[Any] = [None] * len(drafting)
    replies: dict[int, Any] = dict.fromkeys(range(len(drafting)))
    while replies:  # two rounds at most: one child renders all that a round asks for
        asked: dict[int, list[Job]] = {}
        for c, reply in replies.items():
            try:
                asked[c] = drafting[c].send(reply)
            except StopIteration as end:
                done[c] = end.value
        texts = iter(render(form.template, form.special, [job for jobs in asked.values() for job in jobs]))
        replies = {c: [next(texts) for _ in jobs] for c, jobs in asked.items()}
    whole = {c: draft for c, draft in enumerate(done) if isinstance(draft, _Draft)}
    bos = form.special.get("bos_token")
    for c, draft in whole.items():
        if bos and draft.text.startswith(2 * bos):
            raise DataError(f"the chat template begins a text with {bos} twice", file=conversations[c].where, key="data.template")
    tokens = tk.encode_spans(form.tokenizer, [draft.text for draft in whole.values()])
    for (c, draft), (ids, covered) in zip(whole.items(), tokens, strict=True):
        done[c] = _encoded(draft, ids, covered)
    return done


def encode_prompt(form: ChatFormat, renderer: Renderer, messages: Messages, tools: Messages | None = None) -> list[int]:
    """The tokens that the model goes on from to answer.  raises: DataError where the template refuses the messages"""
    [text] = renderer.render([Job(_plain(messages), tools, prompt=True)])
    if isinstance(text, Fault):
        raise DataError([replace(text, key="data.template")])
    return tk.encode(form.tokenizer, [text], special=False)[0]


@dataclass(frozen=True)
class _Ending:
    """How a template's answers end. lead: what stands between a prompt and an answer; borrowed: the token of the next turn
    that ends an answer, where the template itself writes none; the rest: where one of the terminators stands."""

    lead: str
    borrowed: str
    last: re.Pattern[str]
    following: re.Pattern[str]
    anywhere: re.Pattern[str]

    def of(self, text: str, begin: int, end: int) -> int | None:
        """Where the first terminator ends: of those at the end of text[begin:end], or else right after it."""
        if inside := self.last.search(text[begin:end]):
            return begin + inside.end(1)
        after = self.following.match(text, end)
        return after.end(1) if after else None


def _ending(form: ChatFormat) -> _Ending:
    """Seen from one question and its answer."""
    named = tk.texts_of(form.tokenizer, form.stops) | {form.special.get("eos_token", "")}
    whole = tk.special_tokens(form.tokenizer)
    stops = named & whole.keys()
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}
    jobs = [Job([question], prompt=True), Job([question, answer]), Job([question, answer, question])]
    prompt, text, longer = render(form.template, form.special, jobs)
    if isinstance(text, Fault) or MARK not in text:
        raise DataError("the chat template does not write a question and its answer", why=getattr(text, "what", ""), key="data.template")
    before, _, after = text.partition(MARK)
    lead = before[len(prompt) :] if isinstance(prompt, str) and before.startswith(prompt) else ""
    special = re.compile(rf"\s*({_any_of(stops | {name for name, is_special in whole.items() if is_special})})")
    written = special.match(after)
    borrowed = None if written or isinstance(longer, Fault) else special.match(longer.partition(MARK)[2])
    if not written and (borrowed is None or borrowed[1] not in stops):
        raise DataError(
            "the chat template writes no terminator at the end of an answer; the model would never learn to stop",
            why=f"what follows an answer is {borrowed[1]}, which does not stop the model" if borrowed else "",
            mend="take the template that the model was published with",
            key="data.template",
        )
    ends = _any_of(stops | {written[1]} if written else stops)
    patterns = (re.compile(rf"({ends})(?:\s|{ends})*\Z"), re.compile(rf"\s*({ends})"), re.compile(f"({ends})"))
    return _Ending(lead, borrowed[1] if borrowed else "", *patterns)


@dataclass(frozen=True)
class _Draft:
    """A rendered conversation. spans: the characters (begin, end) to be said"""

    text: str
    spans: Sequence[tuple[int, int]]
    empty: bool


def _draft(conversation: Conversation, turns: str, ending: _Ending) -> Generator[list[Job], list[str | Fault], _Draft | Fault]:
    """Asks for renderings of one conversation, twice at most, and finds in them what is to be said."""
    messages, where = conversation.messages, conversation.where
    for i, message in enumerate(messages):
        if message.get("weight") not in (None, 0, 1):
            return Fault(f"message {i + 1} has weight {message['weight']!r}, which is neither 0 nor 1", file=where)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    answers = [i for i in (answers[-1:] if turns == "last" else answers) if messages[i].get("weight") != 0]
    plain = _plain(messages)
    whole = Job(plain, conversation.tools, where=where)
    prompts = [replace(whole, messages=plain[:i], prompt=True) for i in answers]
    text, *parts = yield [whole, *prompts, *(replace(whole, messages=plain[: i + 1]) for i in answers)]
    if isinstance(text, Fault):
        return text
    closing = ending.borrowed if messages[-1].get("role") == "assistant" else ""
    text += closing
    before, after = (
        [str(part) if isinstance(part, str) else MARK for part in half] for half in (parts[: len(answers)], parts[len(answers) :])
    )
    spans: dict[int, tuple[int, int]] = {}
    for i, prompt, until in zip(answers, before, after, strict=True):
        end = None
        if text.startswith(until) and until.startswith(prompt):
            end = ending.of(text, len(prompt), len(until))
        elif text.startswith(prompt) and messages[i].get("tool_calls"):  # which no mark can stand for
            end = stop.end() if (stop := ending.anywhere.search(text, len(prompt))) else None
        if end:
            spans[i] = (len(prompt), end)
    lost = [i for i in answers if i not in spans]
    marked = (yield [replace(whole, messages=[*plain[:i], {**plain[i], "content": MARK}, *plain[i + 1 :]]) for i in lost]) if lost else []
    for i, seen in zip(lost, marked, strict=True):
        head, _, tail = (MARK * 2 if isinstance(seen, Fault) else seen + closing).partition(MARK)
        begin, end = len(head), len(text) - len(tail)
        ended = ending.of(text, begin, end) if begin <= end and text.startswith(head) and text.endswith(tail) and MARK not in tail else None
        if ended is None:
            return Fault(
                f"message {i + 1}: its end is not found in the rendered text",
                why="the chat template writes it otherwise than other answers, or no token that stops the model follows it",
                file=where,
            )
        spans[i] = (begin - len(ending.lead) if head.endswith(ending.lead) else begin, ended)
    return _Draft(text, list(spans.values()), any(_is_empty(messages[i]) for i in answers))


def _encoded(draft: _Draft, ids: list[int], covered: Sequence[tuple[int, int]]) -> Encoded:
    """A token trains if any of its characters does; one that stands for no character goes with the next."""
    said = bytearray(len(draft.text) + 1)
    for begin, end in draft.spans:
        said[begin:end] = b"\1" * (end - begin)
    parts = [said[begin : max(end, begin + 1)] for begin, end in covered]
    trained = [1 in part for part in parts]
    return Encoded(ids, trained, draft.text, sum(1 in part and 0 in part for part in parts), draft.empty)


def _plain(messages: Messages) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _is_empty(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return not (content.strip() if isinstance(content, str) else content) and not message.get("tool_calls")


def _any_of(texts: Collection[str]) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")" if texts else "(?!)"
