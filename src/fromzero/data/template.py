"""A chat template and conversations in, their texts out. The template is foreign text; a limited child renders it (render.py)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromzero.errors import DataError, Fault

SECONDS = 1  # of computing, for one conversation
PATIENCE = 6  # how much longer than it may compute a child may take, asleep or not
_KEPT = ("LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # of the environment; no token goes along
_ENDS = {-24: "is still computing", -27: f"is still computing after {SECONDS} s", -25: "writes without end", -9: "does not end"}
# of SIGXCPU, SIGPROF, SIGXFSZ and SIGKILL
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what published data call a message's thoughts; templates read the first


@dataclass(frozen=True)
class Job:
    """One text asked for. prompt: up to where the model begins to answer; where: the conversation, in messages."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    prompt: bool = False
    where: str = ""

    def line(self) -> str:
        """What the template sees: as with transformers, an entry that is None is left out and thoughts have one name."""
        messages = [{key: value for key, value in message.items() if value is not None} for message in self.messages]
        for message in messages:
            thoughts = [message[name] for name in _REASONING if name in message][:1]
            message.update({"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]} if thoughts else {})
        seen = {"messages": messages, "tools": self.tools, "documents": None, "add_generation_prompt": self.prompt}
        return json.dumps(seen, default=str) + "\n"


def template_digest(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


class Renderer:
    """The child of one template. It begins with the first jobs and stays for more; one call at a time, others wait.

    A child that was used before and then ends may have done so for what came before: a new one is given the same jobs, and what
    that one does is told. So each call has all the time and memory that it may take, and none that fails harms the next.

    special:  texts of the special tokens by name, such as bos_token
    """

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        self._template, self._special = template, dict(special)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, jobs: Sequence[Job]) -> list[str | Fault]:
        """The text of each job, or why the template refuses that one.

        raises:   DataError where the template is none, leaves its sandbox, or takes more time, memory or room than it may
        source:   the same characters as transformers' apply_chat_template; sandboxed as in CVE-2025-27516's advice
        """
        if not jobs:
            return []
        with self._lock:
            if self._child is not None:
                with suppress(DataError):
                    return self._ask(self._child, jobs)
            command = [sys.executable, "-I", str(Path(__file__).with_name("render.py"))]
            environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
            self._end = weakref.finalize(self, _end, self._child)
            return self._ask(self._child, jobs, begin=True)

    def close(self) -> None:
        """The child ends. More jobs begin a new one."""
        if self._child is not None:
            self._child = None
            self._end()

    def _ask(self, child: subprocess.Popen[bytes], jobs: Sequence[Job], *, begin: bool = False) -> list[str | Fault]:
        """begin: the child is new.  Where anything goes wrong there is no child afterwards."""
        lines = [job.line() for job in jobs]
        size = sum(map(len, lines))
        seconds, room = 10 + size // 2**17 + len(lines) // 50, 2**26 + 8 * (size + len(lines) * len(self._template))
        if begin:
            bounds = {"seconds": SECONDS, "all_seconds": seconds, "longest": max(map(len, lines), default=0)}
            lines.insert(0, json.dumps({"template": self._template, "special": self._special, **bounds}) + "\n")
        found: list[Any] = []
        feed, watch = threading.Thread(target=_feed, args=(child, lines)), threading.Timer(PATIENCE * seconds, child.kill)
        try:
            assert child.stdout is not None and child.stderr is not None
            feed.start()
            watch.start()
            while len(found) < len(lines) and (line := child.stdout.readline(room)).endswith(b"\n"):
                room -= len(line)
                found.append(json.loads(line))
            stopped = found.pop()[1] if found and found[-1][:1] == ["stop"] else ""
            if len(found) == len(lines):
                return [
                    text if isinstance(text, str) else Fault(f"the chat template refuses it: {text[1]}", file=job.where)
                    for job, text in zip(jobs, found[begin:], strict=True)
                ]
            code = -25 if room <= len(line) else child.wait()
            last = child.stderr.read()[-200:].decode(errors="replace").strip().rpartition("\n")[2] if code != -25 else ""
        finally:
            if len(found) < len(lines):
                self.close()
            feed.join()
            watch.cancel()
        raise DataError(
            f"the chat template {stopped or _ENDS.get(code) or f'ended its renderer with {code}'}",
            why=" ".join(part for part in (f"at {jobs[len(found) - 1].where or f'text {len(found)}'}" if found else "", last) if part),
            mend="take the template that the model was published with",
            key="data.template",
        )


def render(template: str, special: Mapping[str, str], jobs: Sequence[Job]) -> list[str | Fault]:
    """By a child that ends with it: as Renderer."""
    renderer = Renderer(template, special)
    try:
        return renderer.render(jobs)
    finally:
        renderer.close()


def _feed(child: subprocess.Popen[bytes], lines: Sequence[str]) -> None:
    assert child.stdin is not None
    with suppress(OSError, ValueError):  # it has ended, as its answers show
        child.stdin.writelines(line.encode() for line in lines)
        child.stdin.flush()


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(OSError), child:
        child.kill()
