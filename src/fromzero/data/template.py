"""A chat template and conversations in, their texts out. The template is foreign text; a limited child renders it (render.py)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromzero.errors import DataError, Fault

SECONDS = 1  # of computing, for one conversation
_KEPT = ("LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # of the environment; no token goes along
_ENDS = {-24: "is still computing", -27: f"is still computing after {SECONDS} s", -25: "writes without end"}  # SIGXCPU, SIGPROF, SIGXFSZ
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


def render(template: str, special: Mapping[str, str], jobs: Sequence[Job]) -> list[str | Fault]:
    """The text of each job, or why the template refuses that one.

    special:  texts of the special tokens by name, such as bos_token
    raises:   DataError where the template is none, leaves its sandbox, or takes more time, memory or room than it may
    source:   the same characters as transformers' apply_chat_template; sandboxed as in CVE-2025-27516's advice
    """
    if not jobs:
        return []
    lines = [job.line() for job in jobs]
    size = sum(map(len, lines))
    bounds = {
        "seconds": SECONDS,
        "all_seconds": 10 + size // 2**17 + len(lines) // 50,
        "longest": max(map(len, lines), default=0),
        "most": 2**26 + 8 * (size + len(lines) * len(template)),  # bytes of all texts together
    }
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        given.writelines([json.dumps({"template": template, "special": dict(special), **bounds}) + "\n", *lines])
        given.seek(0)
        command = [sys.executable, "-I", str(Path(__file__).with_name("render.py"))]
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        try:
            code = subprocess.run(
                command, env=environment, stdin=given, stdout=said, stderr=wrong, timeout=6 * bounds["all_seconds"]
            ).returncode
        except subprocess.TimeoutExpired:
            code = -24
        said.seek(0)
        wrong.seek(0)
        found = [json.loads(line) for line in said if line.endswith("\n")]
        last = wrong.read()[-200:].strip().rpartition("\n")[2]
    stopped = found.pop()[1] if found and found[-1][:1] == ["stop"] else ""
    if stopped or code != 0 or len(found) != len(jobs) + 1:
        raise DataError(
            f"the chat template {stopped or _ENDS.get(code) or f'ended its renderer with {code}'}",
            why=" ".join(part for part in (f"at {jobs[len(found) - 1].where or f'text {len(found)}'}" if found else "", last) if part),
            mend="take the template that the model was published with",
            key="data.template",
        )
    return [
        text if isinstance(text, str) else Fault(f"the chat template refuses it: {text[1]}", file=job.where)
        for job, text in zip(jobs, found[1:], strict=True)
    ]
