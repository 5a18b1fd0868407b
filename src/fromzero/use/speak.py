"""Speak: a model and a text or a conversation in, the text that goes on from it out, piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import fromzero.data.tokens as tk
from fromzero.data import ChatFormat, TextFormat
from fromzero.data.turns import Conversation, Encoded, Messages, encode_conversations, encode_prompt
from fromzero.devices import look_at_machine
from fromzero.errors import DataError, ModelError
from fromzero.models import FAMILIES
from fromzero.models.generate import context_of, generate
from fromzero.runner.start import Start, build_published, find_start, published_of

BROKEN = "\ufffd"  # what a tokenizer shows for the bytes of a character that is not whole
NEAR = 8  # tokens of a prompt that stand before the first one made, which may begin with a space only because of them


@dataclass(frozen=True)
class Speaker:
    """A model with what is needed to let it speak. framed: ids before a raw text; chat: its template, if any; stops: ids that end."""

    name: str
    model: nn.Module
    tokenizer: str
    framed: tuple[int, ...]
    chat: ChatFormat | None
    stops: frozenset[int]

    @property
    def context(self) -> float:
        return context_of(self.model)

    def encode(self, text: str) -> list[int]:
        """The ids of a raw text, as the model goes on from it."""
        return [*self.framed, *tk.encode(self.tokenizer, [text], special=False)[0]]

    def encode_turns(self, messages: Messages, tools: Messages | None = None) -> list[int]:
        """The ids of messages through the model's own template, up to where it answers.  raises: ModelError where it has none"""
        if self.chat is None:
            why, mend = "it knows no turns of a conversation", f"fromzero generate {self.name} --prompt TEXT goes on with text"
            raise ModelError(f"'{self.name}' has no chat template", why=why, mend=mend)
        return encode_prompt(self.chat, messages, tools)


def open_speaker(source: str, runs: Path) -> Speaker:
    """`run:NAME`, a folder, a file or any published source → a model that can speak, on the machine's device.

    raises: ModelError for a model that does not go on with text or has no tokenizer, SourceError where it is not there
    """
    start, inputs = find_start(source, (Path(),), runs), None
    if start.saved is not None:
        _refuse(start.saved.task in ("classify", "regress"), source, f"was trained to {start.saved.task}")
        inputs, model = start.saved.preparation.inputs, start.saved.load()
    else:
        published = published_of(start, source)
        family = FAMILIES.get(str(start.config.get("model_type")))
        _refuse(family is not None and not family.speaks, source, "reads its input whole")
        if start.tokenizer is None:
            why = str(published.extras.get("no tokenizer", "there is no tokenizer.json"))
            raise ModelError("has no tokenizer, so that no text becomes tokens", why=why, file=published.origin)
        model = build_published(published, {}, per_token=True)[0].eval()
    tokenizer = start.tokenizer
    assert tokenizer is not None
    chat = ChatFormat(tokenizer, start.template, start.special, start.stops) if start.template else None
    chat = inputs if isinstance(inputs, ChatFormat) else chat
    framed = inputs.special if isinstance(inputs, TextFormat) else True
    before = tuple(tk.frame(tokenizer)[0]) if framed else ()
    return Speaker(source, model.to(look_at_machine().device), tokenizer, before, chat, _ends(start, tokenizer, chat))


def _refuse(wrong: bool, source: str, why: str) -> None:
    if wrong:
        raise ModelError(f"'{source}' does not go on with text", why=f"it {why}", mend=f"fromzero predict {source} INPUT")


def _ends(start: Start, tokenizer: str, chat: ChatFormat | None) -> frozenset[int]:
    """The ids that end a text: what the cards of the model say, and what its template writes, of which they may say nothing."""
    named = tk.encode(tokenizer, [start.special.get("eos_token", tk.END), tk.END], special=False)
    ids = {*start.stops, *(one[0] for one in named if len(one) == 1)}
    if chat is not None:
        ids |= {*chat.stops}
        said = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            seen: object = encode_conversations(replace(chat, stops=tuple(ids)), [Conversation(said, "")])[0]
        except DataError:  # a template that nothing can be trained with may still be spoken through
            seen = None
        if isinstance(seen, Encoded):
            ids.add([token for token, trained in zip(seen.ids, seen.trained, strict=True) if trained][-1])
    return frozenset(ids)


@dataclass
class Speech:
    """Text as it is made: iterate once. Afterwards `ids` are the tokens, and `stopped` says why there are no more.

    prompt:   the ids that it goes on from;  near: those whose text it stands beside
    most:     tokens at most
    dropped:  messages of the conversation that had no room in the context
    """

    speaker: Speaker
    prompt: list[int]
    near: list[int]
    most: int
    drawn: Mapping[str, Any]
    dropped: int = 0
    ids: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        made = generate(self.speaker.model, self.prompt, most=self.most, stops=self.speaker.stops, **self.drawn)
        return as_text(self.speaker.tokenizer, self._noted(made), self.near)

    def _noted(self, made: Iterator[int]) -> Iterator[int]:
        for token in made:
            self.ids.append(token)
            yield token

    @property
    def stopped(self) -> str:
        """stop: it ended by itself; length: `most` were made; context: the model reads no more"""
        full = len(self.prompt) + len(self.ids) >= self.speaker.context
        return "length" if len(self.ids) >= self.most else "context" if full else "stop"


class Spelling:
    """Ids one at a time in, their text out in whole characters: what is not whole waits for the next.

    before: ids whose text stands before and is not given
    """

    def __init__(self, tokenizer: str, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._window, self._fresh = tokenizer, list(before), list[int]()
        self._text = self._said = tk.decode(tokenizer, before)

    def add(self, token: int) -> str:
        self._fresh.append(token)
        self._text = tk.decode(self._tokenizer, [*self._window, *self._fresh])
        if self._text.endswith(BROKEN) or len(self._text) <= len(self._said):
            return ""
        piece = self._text[len(self._said) :]
        self._window, self._fresh = self._fresh, []  # they stay as what stands before: a token by itself may be written otherwise
        self._text = self._said = tk.decode(self._tokenizer, self._window)
        return piece

    def rest(self) -> str:
        """What the last ids still give; half a character is left out."""
        return self._text[len(self._said) :].rstrip(BROKEN)


def as_text(tokenizer: str, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The pieces of a Spelling that are not empty."""
    spelling = Spelling(tokenizer, before)
    for token in ids:
        if piece := spelling.add(token):
            yield piece
    if rest := spelling.rest():
        yield rest


def complete(speaker: Speaker, prompt: str, *, max_tokens: int = 256, **drawn: Any) -> Speech:
    """The model goes on with raw text.

    drawn:   temperature, top_k, top_p, seed: see models.generate
    raises:  ModelError where the prompt leaves no room in the model's context
    """
    ids = _with_room(speaker, speaker.encode(prompt), "the prompt")
    return Speech(speaker, ids, ids[-NEAR:], max_tokens, drawn)


def converse(
    speaker: Speaker, messages: Messages, tools: Messages | None = None, *, max_tokens: int = 1024, whole: bool = False, **drawn: Any
) -> Speech:
    """The model's answer to a conversation. The oldest turns that leave it no room are left out, a first system message is not.

    tools:   what the model may call, for the template to write; never left out
    whole:   nothing is left out; it is refused where it is too long
    drawn:   temperature, top_k, top_p, seed: see models.generate
    raises:  ModelError without a chat template, with one that writes no tools, or where it is too long; DataError where the template
             refuses the messages, or a tool is no object
    """
    if wrong := [tool for tool in tools or () if not isinstance(tool, Mapping)]:
        raise DataError(f"a tool is {type(wrong[0]).__name__}, no object", mend='write {"type": "function", "function": {"name": …}}')
    if tools and speaker.encode_turns(messages, tools) == speaker.encode_turns(messages):
        raise ModelError(f"the chat template of '{speaker.name}' writes no tools", mend="describe them in a system message")
    begin = int(bool(messages) and messages[0].get("role") == "system")
    room = min(max_tokens, speaker.context // 4)  # what an answer should have at least
    starts = [i for i, message in enumerate(messages) if i > begin and message.get("role") == "user"]
    for first in [begin, *starts]:
        ids = speaker.encode_turns([*messages[:begin], *messages[first:]], tools)
        if whole or len(ids) + room <= speaker.context:
            break
    return Speech(speaker, _with_room(speaker, ids, "the conversation"), [], max_tokens, drawn, dropped=first - begin)


def _with_room(speaker: Speaker, ids: list[int], what: str) -> list[int]:
    if len(ids) >= speaker.context:
        raise ModelError(f"{what} has {len(ids)} tokens, the model reads {speaker.context}", mend="shorten it")
    return ids
