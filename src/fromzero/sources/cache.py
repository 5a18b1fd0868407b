"""The cache: a key in, a folder of the user's cache out; files in it appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on this platform: two downloads at once are then both made, and the last one stays
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says where there is no room: on the disk, of a quota, for a file

_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")  # what `writing_whole` writes before it has the file's name


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fromzero`, or `~/.cache/fromzero`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fromzero"


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or will be; 0 where the system does not say."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return 0


def room(folder: Path) -> int:
    """Bytes that the files of a folder may have together: half of what the disk has for them."""
    return (free_disk(folder) + sum(path.stat().st_size for path in _oldest(folder))) // 2


def make_room(folder: Path, needs: int) -> None:
    """Remove the oldest files of a folder until so many bytes have room.  raises: OSError where they have none even then"""
    folder.mkdir(parents=True, exist_ok=True)
    most, files = room(folder), _oldest(folder)
    if needs > most:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    held = sum(path.stat().st_size for path in files)
    for path in files:
        if held + needs <= most:
            return
        held -= path.stat().st_size
        path.unlink(missing_ok=True)


def _oldest(folder: Path) -> list[Path]:
    """Its files, the one that was used longest ago first"""
    return sorted((path for path in folder.glob("*") if path.is_file()), key=lambda path: path.stat().st_atime)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none of it, whatever is killed when."""
    with writing_whole(path) as file:
        file.write(data)


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """The same for what comes bit by bit; an error leaves nothing.  raises: OSError with the name of the file"""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)
        raise


def remove_unfinished(folder: Path) -> list[str]:
    """Take away what a killed `writing_whole` left in a folder to which nobody else writes now.  returns: the names"""
    left = [path for path in sorted(folder.glob(".*")) if _UNFINISHED.fullmatch(path.name) and path.is_file()]
    for path in left:
        path.unlink()
    return [path.name for path in left]


def sync_folder(folder: Path) -> None:
    """Have what was renamed in a folder on the disk, and not only in memory."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder held by one process at a time: who asks for what another is fetching waits, and then finds it there."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: as on a platform without them
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # gives the lock back; the system does so too when the process is killed
