"""JSON lines: events in, one JSON object a line out, and back. Knows nothing of what the events mean."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from fromzero.errors import DataError, Fault
from fromzero.report.events import OF_A_STEP, Event, Planned, Saving, Started, StepDone, as_json

EVENTS = "events.jsonl"  # of a run's folder
MOST_FAULTS = 20  # shown; the rest is counted
_STRICT = json.JSONEncoder(allow_nan=False)  # kept: json.dumps would build one for every line
_BUFFER_BYTES = 1 << 16  # steps wait here; everything that matters after a crash is flushed at once


class JsonLines:
    """An observer that appends to a file. It flushes at every event that is rarer than a step, and syncs before a checkpoint.

    A line that a killed run left half-written is taken off at the first event, for a new line behind it would make both unreadable;
    not earlier, for until a run speaks the file may be another process's.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._mended = path, False
        self._file = path.open("a", encoding="utf-8", newline="\n", buffering=_BUFFER_BYTES)

    def __call__(self, event: Event) -> None:
        if not self._mended:
            _mend_tail(self._path)
            self._mended = True
        if isinstance(event, Saving):
            self._file.flush()
            os.fsync(self._file.fileno())
            return
        self._file.write(_line({**as_json(event), "at": time.time()}))
        if not isinstance(event, StepDone | Planned | Started):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def roll_back(path: Path | str, step: int) -> None:
    """Take off what was said since this step: those steps are taken again, and an end that left no result is no end.

    It is cut in place, so that at every moment the file is a beginning of itself.
    """
    path, kept = Path(path), 0
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            event = _parse(line) or {}
            if (event.get("event") in OF_A_STEP and event.get("step", 0) > step) or event.get("status") == "done":
                break
            kept += len(line)
    os.truncate(path, kept)


def has_saved(path: Path | str) -> bool:
    """Whether a run ever said that a checkpoint was whole."""
    path = Path(path)
    return path.is_file() and any((_parse(line) or {}).get("event") == "Saved" for line in path.read_bytes().splitlines())


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """Read what `JsonLines` wrote. A last line cut by a kill is left out.

    raises: DataError if there is no such file, and for every earlier line that is no JSON object
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("does not exist", file=str(path), why="a run writes its events there", mend="is this the folder of a run?")
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    events: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for number, line in lines:
        event = _parse(line)
        if event is not None:
            events.append(event)
        elif number != lines[-1][0]:
            faults.append(
                Fault("is no JSON object", "only the last line can have been cut by a kill", "take the line out", str(path), number)
            )
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], Fault(f"and {len(faults) - MOST_FAULTS} more lines like these", file=str(path))]
    if faults:
        raise DataError(faults)
    return events


def _line(value: dict[str, Any]) -> str:
    try:
        return _STRICT.encode(value) + "\n"
    except ValueError:  # NaN or infinity, rare: JSON has neither
        return _STRICT.encode(nulled(value)) + "\n"


def nulled(value: Any) -> Any:
    """The same with null in the place of NaN and infinity, which are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nulled(inner) for key, inner in value.items()}
    return [nulled(inner) for inner in value] if isinstance(value, list | tuple) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # also bytes that are no UTF-8
        return None
    return value if isinstance(value, dict) else None


def _mend_tail(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept, newline, tail = file.read().rpartition(b"\n")
        if tail and _parse(tail) is not None:
            file.write(b"\n")
        elif tail:
            file.truncate(len(kept) + len(newline))
