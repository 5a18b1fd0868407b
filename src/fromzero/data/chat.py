"""Chat: conversations in, examples out whose trained tokens are what the assistant says; and what was seen on the way.

Dims: M examples, N all tokens end to end.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import median
from typing import Any

import torch

import fromzero.data.tokens as tk
from fromzero.data.answers import Soft
from fromzero.data.contents import Contents, contents
from fromzero.data.conversations import ChatFacts, Conversations, read_conversations
from fromzero.data.load import DataFacts, Loaded, Preparation, conflicts, nothing_apart
from fromzero.data.opening import ChatAsked, Request
from fromzero.data.split import hold_out, sample
from fromzero.data.table import refuse
from fromzero.data.template import template_digest
from fromzero.data.text import TextExamples, TextFormat
from fromzero.data.turns import ChatFormat, Conversation, Encoded, encode_conversations
from fromzero.errors import DataError, Fault

MOST_PLACES = 8  # named; the others are counted


def load_chat(request: Request) -> Loaded:
    """Read, split by distinct content, render and encode. Conversations that are too long are left out until the recipe says what to do.

    raises: DataError with every row that is no conversation, or that the template refuses
    """
    asked = _asked(request)
    read = read_conversations(request.train, asked.mapping, request.folders, request.skip_broken)
    notes = [f"columns that are no part of a conversation: {', '.join(read.unused)}"] if read.unused else []
    notes += [f"broken, left out: {fault}" for fault in read.left_out]
    apart = (
        () if request.validation is None else (read_conversations(request.validation, asked.mapping, request.folders, request.skip_broken),)
    )
    notes += [f"validation: broken, left out: {fault}" for other in apart for fault in other.left_out]
    train, held, shared = _sides(read, apart, request, notes)
    rooms = [room for room in (asked.max_tokens, asked.context) if room is not None]
    form = ChatFormat(asked.tokenizer, asked.template, asked.special, asked.stops, min(rooms, default=None))
    encoded = _encode(form, [*train, *held], asked.turns)
    form = replace(form, stops=tuple(dict.fromkeys([*form.stops, *_ends(encoded)])))  # the model's cards may not say how a turn ends
    examples, validation = (_examples(form, part, asked.too_long) for part in (encoded[: len(train)], encoded[len(train) :]))
    if not len(examples):
        what = f"no conversation is left to learn from: all {len(train)} have more than {form.max_tokens} tokens"
        raise DataError(what, mend="raise data.max_tokens, or set data.too_long: cut or split", file=read.name, key="data.max_tokens")
    keys = [_key(one.messages) for one in train]
    text = examples.facts(TextFormat(form.tokenizer))
    return Loaded(
        examples,
        validation if len(validation) else None,
        Preparation(form, Soft(())),
        DataFacts(
            source=read.name,
            kind="chat",
            train=len(examples),
            validation=len(validation),
            input_shape=(),
            outputs=text.vocabulary,
            notes=tuple(notes),
            repeats=len(keys) - len(set(keys)),
            shared=shared,
            conflicting=conflicts(*zip(*(_question_and_answer(one) for one in train), strict=True)),
            bytes=sum(5 * part.flat.numel() + 16 * len(part) for part in (examples, validation)),
            digest=_digest(form, examples, validation),
            text=text,
            chat=_facts(read.shape, asked, form, [*train, *held], encoded, examples),
        ),
        tuple(map(_contents, [read, *apart])),
    )


def chat_again(source: Any, form: ChatFormat, request: Request) -> TextExamples:
    """Other conversations in the tokens of a run, for evaluation; those that are too long are treated as in the run."""
    asked = _asked(request)
    items = read_conversations(source, asked.mapping, request.folders).items
    examples = _examples(form, _encode(form, items, asked.turns), asked.too_long)
    if not len(examples):
        raise DataError(f"none of its {len(items)} conversations has at most {form.max_tokens} tokens", file=str(source))
    return examples


def _asked(request: Request) -> ChatAsked:
    assert request.chat is not None, "the request says nothing of conversations"
    return request.chat


def _sides(
    read: Conversations, validation: Sequence[Conversations], request: Request, notes: list[str]
) -> tuple[Sequence[Conversation], Sequence[Conversation], int]:
    """Conversations to learn from, those to measure on, and how many of these stand in train too."""
    train: Sequence[Conversation] = read.items
    held: Sequence[Conversation] = ()
    if validation:
        held = validation[0].items
    elif request.hold_out:
        places = hold_out([_key(one.messages) for one in train], [""] * len(train), request.hold_out, request.seed)
        train, held = (tuple(read.items[p] for p in side) for side in places)
    if request.limit or request.per_class:
        kept = sample(range(len(train)), [""] * len(train), request.seed, examples=request.limit, per_class=request.per_class)
        notes.append(f"data.limit keeps {len(kept)} of {len(train)} training conversations")
        train = tuple(train[i] for i in kept)
    known = {_key(one.messages) for one in train}
    apart = tuple(one for one in held if _key(one.messages) not in known)
    if held and not apart and not request.keep_shared:
        raise nothing_apart(len(held), str(request.validation))
    return train, held if request.keep_shared else apart, len(held) - len(apart)


def _contents(read: Conversations) -> Contents:
    rows = [repr((one.messages, one.tools)).encode("utf-8", "surrogatepass") for one in read.items]
    return contents(read.name, "conversation", rows, lines=[int(one.where.rpartition(":")[2]) for one in read.items])


def _key(messages: Sequence[dict[str, Any]]) -> bytes:
    """Conversations that differ in white space alone count as one."""
    said = (f"{m['role']} {m['content']} {m.get('tool_calls', '')}" for m in messages)
    return "\0".join(" ".join(text.split()) for text in said).encode("utf-8", "surrogatepass")


def _question_and_answer(one: Conversation) -> tuple[bytes, bytes]:
    last = max(i for i, message in enumerate(one.messages) if message["role"] == "assistant")
    return _key(one.messages[:last]), _key(one.messages[last:])


def _encode(form: ChatFormat, items: Sequence[Conversation], turns: Any) -> list[Encoded]:
    encoded = encode_conversations(form, items, turns=turns)
    refuse([one for one in encoded if isinstance(one, Fault)])
    return [one for one in encoded if isinstance(one, Encoded)]


def _examples(form: ChatFormat, encoded: Sequence[Encoded], way: str | None) -> TextExamples:
    """Spans of all tokens end to end. A piece in which nothing is trained is left out where a conversation is split."""
    room = form.max_tokens
    starts, lengths, begin = [], [], 0
    for one in encoded:
        count = len(one.ids) - 1  # inputs: the last token is a target alone
        spans = [(0, count)]
        if room is not None and count > room:
            pieces = [(at, min(room, count - at)) for at in range(0, count, room)]
            kept = [(at, size) for at, size in pieces if any(one.trained[at + 1 : at + size + 1])]
            spans = {"cut": [(0, room)], "split": kept}.get(way or "", [])
        starts += [begin + at for at, _ in spans]
        lengths += [size for _, size in spans]
        begin += len(one.ids)
    flat = [token for one in encoded for token in one.ids]
    trained = [flag for one in encoded for flag in one.trained]
    said = (
        [t for t, flag in zip(flat[s + 1 : s + n + 1], trained[s + 1 : s + n + 1], strict=True) if flag]
        for s, n in zip(starts, lengths, strict=True)
    )
    return TextExamples(
        torch.tensor(flat, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
        None,
        trained=torch.tensor(trained, dtype=torch.bool),
        bytes=sum(len(tk.decode(form.tokenizer, ids).encode("utf-8", "surrogatepass")) for ids in said),
    )


def _ends(encoded: Sequence[Encoded]) -> list[int]:
    """The ids that end an answer, the most frequent first; always tokens that stand for no text"""
    last = Counter(next(t for t, flag in zip(one.ids[::-1], one.trained[::-1], strict=True) if flag) for one in encoded if any(one.trained))
    return [token for token, _ in last.most_common()]


def _facts(
    shape: str, asked: ChatAsked, form: ChatFormat, items: Sequence[Conversation], encoded: Sequence[Encoded], examples: TextExamples
) -> ChatFacts:
    room, way = form.max_tokens, asked.too_long
    long = [one for one in encoded if room is not None and len(one.ids) - 1 > room]
    beyond = [one.trained[(room or 0) + 1 :] for one in long]
    seen = {id(one): one.trained[1 : room + 1] if way == "cut" and room is not None else one.trained[1:] for one in encoded}
    untrained = [item.where for item, one in zip(items, encoded, strict=True) if not any(seen[id(one)])]
    empty = [item.where for item, one in zip(items, encoded, strict=True) if one.empty]
    assert examples.trained is not None
    counted = [0, *accumulate(examples.trained.tolist())]  # (N + 1,) trained tokens before each
    each = [counted[s + n + 1] - counted[s + 1] for s, n in zip(examples.starts.tolist(), examples.lengths.tolist(), strict=True)]
    ends = _ends(encoded)
    return ChatFacts(
        shape=shape,
        turns=asked.turns,
        conversations=len(items),
        one_turn=sum(sum(m["role"] == "assistant" for m in item.messages) == 1 for item in items),
        tokens=sum(len(one.ids) for one in encoded),
        trained=sum(sum(one.trained) for one in encoded),
        least=min(each),
        median=int(median(each)),
        most=max(each),
        untrained=len(untrained),
        untrained_at=tuple(untrained[:MOST_PLACES]),
        empty=len(empty),
        empty_at=tuple(empty[:MOST_PLACES]),
        longest=max(len(one.ids) for one in encoded),
        room=room,
        too_long=len(long),
        way=way,
        lost={
            "cut": (sum(map(len, beyond)), sum(map(sum, beyond))),
            "drop": (sum(len(one.ids) for one in long), sum(sum(one.trained) for one in long)),
            "split": (0, 0),
        },
        terminator=tk.decode(form.tokenizer, ends[:1]),
        crossing=sum(one.crossing for one in encoded),
        template=template_digest(form.template)[:12],
    )


def _digest(form: ChatFormat, *parts: TextExamples) -> str:
    digest = hashlib.sha256(form.tokenizer.encode())
    for part in parts:
        assert part.trained is not None
        for tensor in (part.flat, part.trained, part.starts, part.lengths):
            digest.update(tensor.numpy().tobytes() + b"|")
    return digest.hexdigest()
