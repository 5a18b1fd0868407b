"""Archives: a zip in, one member's bytes out, within limits. Nothing is ever unpacked onto the disk."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path, PurePosixPath

from fromzero.errors import SourceError, did_you_mean

MOST_MEMBERS = 20_000
MOST_BYTES = 4 * 2**30  # of one archive, unpacked
MOST_RATIO = 200  # unpacked to packed; text rarely passes 20, a bomb has 1,000 and more
RATIO_COUNTS_FROM = 2**20  # bytes: small members may shrink as they like


def is_zip(path: Path) -> bool:
    """By its first bytes, as torch tells: zipfile looks at the end, and would find a zip behind a pickle."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_zip(path: Path, most_bytes: int | None = None) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name, after every entry was looked at; unpacked it has MOST_BYTES, or what is given.

    raises: SourceError naming the entry that leads outside, is a link or device, stands twice or is a bomb
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # a damaged zip raises what its first wrong byte leads to: BadZipFile, struct.error, …
        raise SourceError(f"is not a whole zip archive ({error})", file=str(path), mend="fetch it again") from None
    if len(entries) > MOST_MEMBERS:
        raise SourceError(f"holds {len(entries)} files, more than {MOST_MEMBERS}", file=str(path))
    members: dict[str, zipfile.ZipInfo] = {}
    total, most_bytes = 0, most_bytes or MOST_BYTES
    for entry in entries:
        wrong = _wrong_with(entry, members)
        total += entry.file_size
        if not wrong and total > most_bytes:
            wrong = f"brings the archive over {most_bytes // 2**30} GiB unpacked"
        if wrong:
            raise SourceError(f"its entry {entry.filename!r} {wrong}", why="the archive is not to be trusted", file=str(path))
        members[entry.filename] = entry
    return members


def _wrong_with(entry: zipfile.ZipInfo, members: dict[str, zipfile.ZipInfo]) -> str:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.is_absolute() or ".." in name.parts or entry.filename[1:2] == ":":
        return "leads outside the archive"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if entry.filename in members:
        return "stands twice"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > RATIO_COUNTS_FROM and entry.file_size > MOST_RATIO * max(entry.compress_size, 1):
        return f"would grow from {entry.compress_size} to {entry.file_size} bytes"
    return ""


def read_member(path: Path, member: str) -> bytes:
    """The bytes of one member of a checked zip, no more than its entry promised."""
    members = check_zip(path)
    if member not in members or member.endswith("/"):
        files = [name for name in members if not name.endswith("/")]
        mend = did_you_mean(member, files) or f"it holds {len(files)} files, such as {', '.join(files[:3])}"
        raise SourceError(f"has no file {member!r} inside", file=path.name, mend=mend)
    size = members[member].file_size
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            data = file.read(size + 1)
    except Exception as error:  # zlib.error, BadZipFile, NotImplementedError of an odd compression
        raise SourceError(f"its entry {member!r} is damaged ({error})", file=str(path), mend="fetch it again") from None
    if len(data) != size:
        raise SourceError(f"its entry {member!r} promised {size} bytes and holds other", file=str(path))
    return data
