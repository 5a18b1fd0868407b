"""Speak: a model and a text or a conversation in, the text that goes on from it out, piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import fromzero.data.tokens as tk
from fromzero.data import ChatFormat, TextFormat
from fromzero.data.template import Renderer
from fromzero.data.turns import Conversation, Encoded, Messages, encode_conversations, encode_prompt
from fromzero.devices import look_at_machine
from fromzero.errors import DataError, ModelError, UserError
from fromzero.models import FAMILIES
from fromzero.models.scores import Outside, context_of
from fromzero.models.together import Batch, Made, Sampling
from fromzero.runner.start import Start, build_published, find_start, published_of
from fromzero.use.schema import Rule, rule_of
from fromzero.use.spelling import Spelling

NEAR = 8  # tokens of a prompt that stand before the first one made, which may begin with a space only because of them
TOGETHER = 16  # texts that are made at a time; each holds the keys and values of all its tokens


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

    @property
    def together(self) -> int:
        """How many texts are made at a time"""
        return 1 if isinstance(self.model, Outside) else TOGETHER

    def encode(self, text: str) -> list[int]:
        """The ids of a raw text, as the model goes on from it."""
        return [*self.framed, *tk.encode(self.tokenizer, [text], special=False)[0]]

    def encode_turns(self, messages: Messages, tools: Messages | None = None) -> list[int]:
        """The ids of messages through the model's own template, up to where it answers.  raises: ModelError where it has none"""
        if self.chat is None:
            why, mend = "it knows no turns of a conversation", f"fromzero generate {self.name} --prompt TEXT goes on with text"
            raise ModelError(f"'{self.name}' has no chat template", why=why, mend=mend)
        return encode_prompt(self.chat, self._renderer, messages, tools)

    @cached_property
    def _renderer(self) -> Renderer:
        """One for all conversations: to start a process for each would take tenths of a second"""
        assert self.chat is not None
        return Renderer(self.chat.template, self.chat.special)


def open_speaker(source: str, runs: Path, *, merge: bool = False) -> Speaker:
    """`run:NAME`, a folder, a file or any published source → a model that can speak, on the machine's device.

    merge:  plain matrices stand in the place of a run's adapters
    raises: ModelError for a model that does not go on with text or has no tokenizer, SourceError where it is not there
    """
    start = start_of_speech(source, runs)
    if start.saved is not None:
        return speaker_of(source, start, start.saved.load(merge=merge))
    return speaker_of(source, start, build_published(published_of(start, source), {}, per_token=True)[0].eval())


def start_of_speech(source: str, runs: Path) -> Start:
    """What a model that can speak begins with, its weights unread.  raises: as open_speaker does"""
    start = find_start(source, (Path(),), runs)
    if start.saved is not None:
        _refuse(start.saved.task in ("classify", "regress"), source, f"was trained to {start.saved.task}")
        return start
    published = published_of(start, source)
    family = FAMILIES.get(str(start.config.get("model_type")))
    _refuse(family is not None and not family.speaks, source, "reads its input whole")
    if start.tokenizer is None:
        why = str(published.extras.get("no tokenizer", "there is no tokenizer.json"))
        raise ModelError("has no tokenizer, so that no text becomes tokens", why=why, file=published.origin)
    return start


def speaker_of(source: str, start: Start, model: nn.Module) -> Speaker:
    """model: what runs the weights; how text becomes tokens, and where a text ends, is what the start says"""
    tokenizer, inputs = start.tokenizer, None if start.saved is None else start.saved.preparation.inputs
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
    """Text as it is made: iterate once. Afterwards `text`, `made` and `ids` hold what was said, and `stopped` why there is no more.

    prompt:   the ids that it goes on from;  near: those whose text it stands beside
    stop:     texts that end it, and are no part of it
    rule:     which tokens may follow
    dropped:  messages of the conversation that had no room in the context
    made:     its tokens, those of a stop string included
    stopped:  stop, it ended by itself or at a stop string; length, `most` tokens were made; context, the model reads no more
    """

    speaker: Speaker
    prompt: list[int]
    near: list[int]
    asked: Sampling
    stop: tuple[str, ...] = ()
    rule: Rule | None = None
    dropped: int = 0
    made: list[Made] = field(default_factory=list)
    text: str = ""
    stopped: str = ""

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise UserError("a stop string is empty", mend="leave it out")
        self._spelling = Spelling(self.speaker.tokenizer, self.near, self.stop)

    def __iter__(self) -> Iterator[str]:
        return (piece for _, piece in speak([self]))

    @property
    def ids(self) -> list[int]:
        return [made.token for made in self.made]

    def heard(self, made: Made) -> str:
        """Takes in one more token.  returns: the text that is sure now"""
        ended, piece = made.ended, ""
        if ended != "stop":
            self.made.append(made)
            piece = self._spelling.add(made.token)
        if ended and not self._spelling.stopped:
            piece += self._spelling.end()
        self.stopped = "stop" if self._spelling.stopped else ended
        self.text += piece
        return piece

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it; with logprobs, in nats, where they were asked for."""
        told: dict[str, Any] = {"text": self.text, "tokens": len(self.made), "stopped": self.stopped}
        if self.asked.logprobs:
            told["logprobs"] = [
                {**self._told(one.token, one.logprob), "likeliest": [self._told(*other) for other in one.likeliest]} for one in self.made
            ]
        return told

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": tk.decode(self.speaker.tokenizer, [token]), "logprob": logprob}


def speak(speeches: Sequence[Speech]) -> Iterator[tuple[Speech, str]]:
    """The pieces of several texts of one speaker as they are made, some at a time: when one ends, the next begins.

    raises: ModelError at the end, where a text that is held to a schema was cut
    """
    if not speeches:
        return
    batch, waiting, writing = Batch(speeches[0].speaker.model, speeches[0].speaker.stops), list(speeches), {}
    while waiting or len(batch):
        while waiting and len(batch) < speeches[0].speaker.together:
            speech = waiting.pop(0)
            writing[batch.add(speech.prompt, speech.asked, allowed=speech.rule)] = speech
        for made in batch.step():
            speech = writing[made.number]
            if piece := speech.heard(made):
                yield speech, piece
            if speech.stopped:
                batch.remove(made.number)
    for speech in speeches:
        if speech.rule is not None and (fault := speech.rule.fault(speech.ids)):
            said = f"'{speech.text[-40:]}' is no whole JSON of the schema"
            raise ModelError(said, why=fault, mend="raise max_tokens, or bound lengths in the schema", key="schema")


def complete(speaker: Speaker, prompt: str, *, max_tokens: int = 256, stop: Sequence[str] = (), schema: Any = None, **drawn: Any) -> Speech:
    """The model goes on with raw text.

    stop:    texts that end it
    schema:  a JSON schema that it is held to
    drawn:   temperature, top_k, top_p, min_p, repetition_penalty, seed, logprobs: see models.together
    raises:  ModelError where the prompt leaves no room in the model's context; what rule_of raises
    """
    ids = _with_room(speaker, speaker.encode(prompt), "the prompt")
    return _speech(speaker, ids, ids[-NEAR:], max_tokens, stop, schema, drawn)


def converse(
    speaker: Speaker,
    messages: Messages,
    tools: Messages | None = None,
    *,
    max_tokens: int = 1024,
    whole: bool = False,
    stop: Sequence[str] = (),
    schema: Any = None,
    **drawn: Any,
) -> Speech:
    """The model's answer to a conversation. The oldest turns that leave it no room are left out, a first system message is not.

    tools:   what the model may call, for the template to write; never left out
    whole:   nothing is left out; it is refused where it is too long
    stop, schema, drawn: as in complete
    raises:  ModelError without a chat template, with one that writes no tools, or where it is too long; DataError where the template
             refuses the messages, or a tool is no object; what rule_of raises
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
    ids = _with_room(speaker, ids, "the conversation")
    return replace(_speech(speaker, ids, [], max_tokens, stop, schema, drawn), dropped=first - begin)


def _speech(
    speaker: Speaker, prompt: list[int], near: list[int], most: int, stop: Sequence[str], schema: Any, drawn: Mapping[str, Any]
) -> Speech:
    rule = None if schema is None else rule_of(schema, speaker.tokenizer, speaker.stops)
    return Speech(speaker, prompt, near, Sampling(most=most, **drawn), (stop,) if isinstance(stop, str) else tuple(stop), rule)


def _with_room(speaker: Speaker, ids: list[int], what: str) -> list[int]:
    if len(ids) >= speaker.context:
        raise ModelError(f"{what} has {len(ids)} tokens, the model reads {speaker.context}", mend="shorten it")
    return ids
