"""Lock: a run's folder in, held by this process alone; a second one that would train into it is told who holds it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fromzero.errors import UserError

try:
    import fcntl
except ImportError:  # a platform without locks of files
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run's folder. The system lets go when the process ends, however it ends, so that nothing stale is in the way on this host.

    raises: UserError where another process holds it, or one on another host may
    """
    path = folder / LOCK
    handle, ours = _opened(path)
    try:
        said = _read(handle)
        elsewhere = said.get("host", socket.gethostname()) != socket.gethostname()
        if not ours or elsewhere:
            who = f"process {said.get('pid', '?')} on {said.get('host', 'this host')}, since {said.get('since', '?')}"
            mend = f"if that one is dead, remove {path}" if elsewhere else "wait for it, or end it"
            raise UserError(f"{folder.name} is being trained by {who}", why="two would overwrite each other's checkpoints", mend=mend)
        _write(handle, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def held(folder: Path) -> bool:
    """Whether another process holds it, or one on another host may."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with holding(folder):
            return False
    except UserError:
        return True


def _opened(path: Path) -> tuple[int, bool]:
    """The lock's file, and whether it is ours; opened anew where another process removed it in between."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        ours = _take(handle)
        with suppress(FileNotFoundError):
            if not ours or path.stat().st_ino == os.fstat(handle).st_ino:
                return handle, ours
        os.close(handle)


def _take(handle: int) -> bool:
    if fcntl is None:
        return not _read(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the note alone says who
        return not _read(handle)
    return True


def _read(handle: int) -> dict[str, object]:
    try:
        values = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _write(handle: int, values: dict[str, object]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(values).encode(), 0)
    os.fsync(handle)
