"""Terminal: lines of a person in, a model's answers out as they are made; the same in a pipe, one question a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fromzero.errors import UserError, did_you_mean
from fromzero.sources.cache import write_whole
from fromzero.use.speak import Speaker, converse

HELP = {
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation as JSON, in the shape that a model is trained on",
    "/tokens": "how full the model's context is",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer, and nothing else",
}


def talk(speaker: Speaker, *, system: str | None, quiet: bool, **asked: Any) -> list[dict[str, Any]]:
    """Ask and answer until the input ends.

    quiet:    answers are returned and not written
    asked:    as in converse
    returns:  each question with its answer
    raises:   what converse raises; at a terminal it is said there, and the conversation goes on without that question
    """
    first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    said, forgotten, turns, at_terminal = list(first), 0, [], sys.stdin.isatty()
    speaker.encode_turns([*first, {"role": "user", "content": "a"}])  # a model that cannot chat says so before the first question
    while (line := _line("» " if at_terminal and not quiet else "", at_terminal)) != "/exit":
        heard = [*first, *said[len(first) + forgotten :]]
        try:
            if line == "/reset":
                said, forgotten = list(first), 0
            elif line.startswith("/"):
                say(_obey(speaker, line, said, heard))
            elif line:
                question = {"role": "user", "content": line}
                turn, dropped = _answer(speaker, [*heard, question], quiet, asked)
                turns.append(turn)
                said, forgotten = [*said, question, {"role": "assistant", "content": turn["answer"]}], forgotten + dropped
        except (UserError, OSError) as error:
            if not at_terminal:
                raise
            say(str(error))
    return turns


def _line(prompt: str, at_terminal: bool) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return "/exit"
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        say("(/exit or Ctrl-D ends)")
        return ""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _obey(speaker: Speaker, line: str, said: list[dict[str, Any]], heard: list[dict[str, Any]]) -> str:
    """What a command says. said: the whole conversation; heard: as much of it as the model still reads"""
    command, _, name = line.partition(" ")
    if command == "/save" and name:
        write_whole(Path(name).expanduser(), (json.dumps({"messages": said}, ensure_ascii=False) + "\n").encode())
        return f"{len(said)} messages in {name}"
    if command == "/tokens":
        return f"{len(speaker.encode_turns(heard)) if heard else 0} of {speaker.context} tokens"
    if command == "/help":
        return "\n".join(f"{name:<12}{meaning}" for name, meaning in HELP.items())
    raise UserError(f"'{line}' is no command here", mend=did_you_mean(line, HELP) or f"they are {', '.join(HELP)}")


def _answer(speaker: Speaker, messages: list[dict[str, Any]], quiet: bool, asked: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """returns: the question with its answer, and how many of the messages were left out"""
    speech, answer, stopped = converse(speaker, messages, **asked), "", None
    if speech.dropped:
        say(f"the oldest {speech.dropped} messages are left out: the model reads {speaker.context} tokens")
    try:
        for piece in speech:
            answer += piece
            if not quiet:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = "interrupted"
    if not quiet:
        print(flush=True)
    stopped = stopped or speech.stopped
    if stopped != "stop":
        say(f"({stopped})")
    return {"question": messages[-1]["content"], "answer": answer, "tokens": len(speech.ids), "stopped": stopped}, speech.dropped
