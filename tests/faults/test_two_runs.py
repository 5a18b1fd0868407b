"""Two runs, one folder: the second is told who holds it; a killed one leaves nothing behind."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import fromzero as fz
from fromzero.report.jsonlines import EVENTS, read_events
from fromzero.runner import begun
from fromzero.runner.lock import LOCK, holding

HOLD = "import sys, time, pathlib; from fromzero.runner.lock import holding\nwith holding(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(30)"


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """returns: its process, which is killed in the end"""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()


def test_the_second_is_refused_by_name_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        said = rf"is being trained by process {other} on {socket.gethostname()}, since 20.*end it"
        with pytest.raises(fz.UserError, match=said), holding(tmp_path):
            pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == other
    with holding(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_note_of_another_host_is_believed_until_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00"}))
    with pytest.raises(fz.UserError, match=r"process 1 on elsewhere.*if that one is dead, remove .*lock"), holding(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with holding(tmp_path):
        pass


def test_a_spoiled_note_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"\xff{")
    with holding(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()


def test_of_many_that_race_for_one_folder_one_at_a_time_has_it(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib, time; from fromzero.runner.lock import holding; from fromzero.errors import UserError\n"
        "folder, won, until = pathlib.Path(sys.argv[1]), 0, time.monotonic() + 60\n"
        "while won < 100 and time.monotonic() < until:\n"
        "    try:\n"
        "        with holding(folder):\n"
        "            mark = os.open(folder / 'inside', os.O_CREAT | os.O_EXCL)\n"
        "            os.close(mark); os.unlink(folder / 'inside'); won += 1\n"
        "    except UserError:\n"
        "        pass\n"
        "print(won)"
    )
    racers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    won = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers) and won == [100, 100, 100]


def test_a_run_that_is_being_trained_is_not_resumed_beside_it(tmp_path: Path) -> None:
    x, y = torch.rand(40, 4), torch.arange(40) % 3
    torch.manual_seed(0)
    recipe = {"name": "one", "task": "classify", "model": nn.Linear(4, 3), "data": {"train": (x, y)}, "limits": {"seconds": 1e-9}}
    with pytest.raises(fz.NumbersError):
        fz.run(fz.plan(recipe, runs=tmp_path, probe=False), quiet=True)
    with held_by_another(tmp_path / "one"):
        before = sorted(path.name for path in (tmp_path / "one").rglob("*"))
        with pytest.raises(fz.UserError, match="one is being trained by process"):
            fz.resume("one", runs=tmp_path, model=nn.Linear(4, 3), data=(x, y), quiet=True)
        assert sorted(path.name for path in (tmp_path / "one").rglob("*")) == before


# Two children, forked when all is imported, wait at a gate and resume one run; which one comes first is up to the system.
RACE = """
import json, os, signal, sys
from pathlib import Path
import torch, fromzero as fz
from fromzero.report.events import StepDone

torch.set_num_threads(1)
x, y = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
values = {"task": "classify", "model": "mlp", "data": (x, y), "batch": 8, "steps": 12, "evaluate": {"every": 3}, "save": {"every": 2}, "limits": {"threads": 1}}

def stop(event):
    if isinstance(event, StepDone) and event.step == 3:
        os.kill(os.getpid(), signal.SIGINT)

def racer(name, gate):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            os.read(gate, 1)
            fz.resume(name, runs="runs", data=(x, y), quiet=True)
            code = 0
        except fz.UserError as error:
            code = 2 if "is being trained by" in str(error) or "is done after" in str(error) else 1
        finally:
            os._exit(code)
    return pid

for number in range(int(sys.argv[1])):
    name = f"r{number}"
    try:
        fz.run(fz.plan({**values, "name": name}, runs="runs", probe=False), observers=[stop], quiet=True)
    except fz.Interrupted:
        pass
    reads, opens = os.pipe()
    racers = [racer(name, reads) for _ in range(2)]
    os.write(opens, b"..")
    print(json.dumps(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers)))
"""


@pytest.mark.parametrize("races", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_that_resume_one_run_at_once_one_trains_and_the_other_leaves_no_trace(tmp_path: Path, races: int) -> None:
    command = [sys.executable, "-c", RACE, str(races)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, 2]] * races
    logs = [read_events(tmp_path / "runs" / f"r{number}" / EVENTS) for number in range(races)]
    for events in logs:
        assert [event["step"] for event in events if event["event"] == "StepDone"] == list(range(1, 13))
        assert [event["status"] for event in events if event["event"] == "Finished"] == ["interrupted", "done"]


def test_a_run_that_another_process_ended_in_between_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(40, 4), torch.arange(40) % 3
    planned = fz.plan({"name": "one", "task": "classify", "model": "mlp", "data": (x, y), "steps": 2}, runs=tmp_path, probe=False)
    fz.run(planned, quiet=True)
    before = (tmp_path / "one" / EVENTS).read_bytes()
    honest, looks = begun.read_result, [{}, {}]  # the other one comes to its end after these two looks, and before the folder is held
    monkeypatch.setattr(begun, "read_result", lambda folder: looks.pop() if looks else honest(folder))
    with pytest.raises(fz.UserError, match="run 'one' is done after 2 steps"):
        fz.resume("one", runs=tmp_path, data=(x, y), quiet=True)
    assert (tmp_path / "one" / EVENTS).read_bytes() == before
