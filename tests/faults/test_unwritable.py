"""A place that cannot be written, a read-only one, a file where a folder should be: refused before anything is read or trained."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fromzero as fz

NO_DATA = {"task": "classify", "model": "mlp", "data": "is-not-there.csv"}  # whoever looks at the data first says so
ROOT = os.getuid() == 0


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with a stopped run in it, mounted so that nobody can write there, root included."""
    folder = tmp_path / "closed"
    folder.mkdir()
    stopped(folder)
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode:
        pytest.skip("NOT CHECKED: no folder can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(40.0).reshape(20, 2), torch.arange(20) % 2


def stopped(runs: Path) -> None:
    values = {"name": "r", "task": "classify", "model": "mlp", "data": {"train": data()}, "report": [], "limits": {"seconds": 1e-9}}
    with pytest.raises(fz.NumbersError):
        fz.run(fz.plan(values, runs=runs, probe=False), quiet=True)


def test_a_read_only_place_is_refused_before_the_data_is_looked_at(read_only: Path) -> None:
    said = r"no run can be written there \(Read-only file system: .*closed(/r)?\); make it writable, or name another folder with --runs"
    for runs in (read_only, read_only / "deeper" / "still"):
        with pytest.raises(fz.UserError, match=said):
            fz.train({**NO_DATA}, runs=runs)
    with pytest.raises(fz.UserError, match=said):
        fz.resume("r", runs=read_only, data=data(), quiet=True)


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_is_refused_before_the_data_is_looked_at(tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(
        fz.UserError, match=r"is no folder that runs can be written to; \S*taken is a file; make it writable, or name another"
    ):
        fz.train({**NO_DATA}, runs=tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_planned_run_is_refused_too_where_its_place_was_closed_since(tmp_path: Path) -> None:
    values = {"name": "r", "task": "classify", "model": "mlp", "data": {"train": data()}, "report": []}
    planned = fz.plan(values, runs=tmp_path / "runs", probe=False)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(fz.UserError, match="is no folder that runs can be written to"):
        fz.run(planned, quiet=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_whoever_may_not_write_is_refused_with_code_2_and_one_line(open_folder: Path) -> None:
    """As somebody else, where this is root, whom no permission stops."""
    closed = open_folder / "closed"
    closed.mkdir(mode=0o755 if ROOT else 0o555)
    (open_folder / "r.yaml").write_text("task: classify\nmodel: mlp\ndata: is-not-there.csv\n")
    other = ["setpriv", "--reuid=65534", "--clear-groups"] if ROOT else []
    code = "import sys; sys.argv[0] = 'fromzero'; from fromzero.cli import main; main()"
    command = [*other, sys.executable, "-B", "-c", code, "train", "r.yaml", "--runs", str(closed / "runs")]
    done = subprocess.run(command, cwd=open_folder, capture_output=True, text=True, env={**os.environ, "HOME": str(open_folder)})
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"{closed}/runs: no run can be written there (Permission denied: {closed}); make it writable, or name another folder with --runs\n"
    )
    assert list(closed.iterdir()) == []
