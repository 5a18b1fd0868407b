"""A disk that is full: one message with the bytes, nothing lost that was saved; the run stops, or goes on as its recipe says."""

import errno
import os
import re
import resource
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.report.events import Evaluated, Event, Finished, Saved, StepDone, Warned
from fromzero.runner import checkpoint, execute


class Disk:
    """A place that can be filled and emptied again."""

    def __init__(self, folder: Path, fill: Callable[[], None], empty: Callable[[], None]) -> None:
        self.folder, self.fill, self.empty = folder, fill, empty


@contextmanager
def small_files(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["a disk of 4 MB", "a limit of a file's size"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "a limit of a file's size":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield Disk(
                folder,
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1])),
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"NOT CHECKED: no disk of 4 MB can be mounted here ({mounted.stderr.strip()})")

    def fill() -> None:
        with (folder / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 12)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    try:
        yield Disk(folder, fill, lambda: (folder / "filler").unlink())
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def recipe(name: str, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, generator=generator)
    values = {
        "name": name,
        "task": "classify",
        "model": {"from": "mlp", "hidden": [100, 100]},
        "data": {"train": (x, (x[:, 0] > 0.5).long())},
    }
    return {**values, "batch": 8, "steps": 15, "save": {"every": 3}, "limits": {"threads": 1}, "report": [], **more}


def at(step: int, do: Callable[[], None]) -> Callable[[Event], None]:
    """An observer that does something after a step"""

    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            do()

    return hear


def run(values: dict[str, Any], runs: Path, *observers: Callable[[Event], None]) -> Any:
    return fz.run(fz.plan(values, runs=runs, probe=False), quiet=True, observers=observers)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: Any, other: Any) -> bool:
    theirs = other.model.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.model.state_dict().items())


def test_the_run_stops_with_one_message_and_goes_on_to_the_same_weights_when_there_is_room(disk: Disk, tmp_path: Path) -> None:
    whole = run(recipe("whole"), tmp_path)
    events: list[Event] = []
    with pytest.raises(fz.UserError) as caught:
        run(recipe("part"), disk.folder, at(8, disk.fill), events.append)
    said, folder = str(caught.value), disk.folder / "part"
    assert caught.value.code == 2 and len(caught.value.faults) == 1
    found = re.search(r"part: step 9 could not be saved \((No space left on device|File too large)\): a checkpoint needs .* \(([\d,]+) bytes\), .* \(([\d,]+)\) are free", said)  # fmt: skip
    assert found, said
    assert int(found[2].replace(",", "")) >= 170_000 and (found[1] == "File too large" or int(found[3].replace(",", "")) < 170_000)
    assert "what was saved before is as it was; " in said and said.endswith("; fromzero resume part then goes on from there")
    assert names(folder / "checkpoints") == ["latest", "step-3", "step-6"] and not (folder / "model").exists()
    assert checkpoint.find(folder / "checkpoints") == (folder / "checkpoints" / "step-6", {})
    assert [event.step for event in events if isinstance(event, StepDone)][-1] == 9
    disk.empty()
    data = recipe("part")["data"]["train"]
    assert same(whole, fz.resume("part", runs=disk.folder, data=data, quiet=True))


def test_asked_to_it_goes_on_without_a_checkpoint_says_so_once_and_saves_again_when_there_is_room(disk: Disk, tmp_path: Path) -> None:
    whole = run(recipe("whole"), tmp_path)
    events: list[Event] = []
    part = run(recipe("part", save={"every": 3, "full": "go_on"}), disk.folder, at(5, disk.fill), at(13, disk.empty), events.append)
    assert same(whole, part) and part.result["status"] == "done"
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 15]
    said = [event for event in events if isinstance(event, Warned) and "could not be saved" in event.what]
    assert len(said) == 1 and said[0].what.startswith("step 6 could not be saved (") and "make room: training goes on" in said[0].mend
    assert names(disk.folder / "part" / "checkpoints") == ["latest", "step-15", "step-3"]


def test_a_run_that_goes_on_but_is_stopped_says_that_its_last_steps_are_not_saved(disk: Disk) -> None:
    values = recipe("part", save={"every": 3, "full": "go_on"})
    with pytest.raises(fz.UserError, match="step 8 could not be saved"):
        run(values, disk.folder, at(5, disk.fill), at(8, lambda: os.kill(os.getpid(), 15)))
    assert names(disk.folder / "part" / "checkpoints") == ["latest", "step-3"]


@pytest.mark.parametrize("full", ["stop", "go_on"])
def test_a_model_that_finds_no_room_is_one_message_and_resume_writes_it_later(disk: Disk, tmp_path: Path, full: str) -> None:
    whole = run(recipe("whole"), tmp_path)
    with pytest.raises(
        fz.UserError, match=r"model.safetensors: could not be written \(.*\); .* are free; what was saved before is as it was; make room"
    ):
        run(recipe("part", save={"every": 6, "full": full}), disk.folder, at(15, disk.fill))
    disk.empty()
    folder = disk.folder / "part"
    assert names(folder / "checkpoints") == ["latest", "step-12", "step-6"] and names(folder / "model") == []
    assert same(whole, fz.resume("part", runs=disk.folder, data=recipe("part")["data"]["train"], quiet=True))


def test_a_result_that_finds_no_room_is_one_message_and_resume_writes_it_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(execute, "write_whole", full)
    with pytest.raises(fz.UserError, match=r"result.json: could not be written \(No space left on device\)"):
        run(recipe("part"), tmp_path)
    monkeypatch.undo()
    assert fz.resume("part", runs=tmp_path, data=recipe("part")["data"]["train"], quiet=True).result["status"] == "done"


def test_a_log_that_finds_no_room_stops_the_run_or_ends_alone_as_the_recipe_says(tmp_path: Path) -> None:
    with small_files(10**6):  # restores the limit that `full` sets below

        def full() -> None:
            size = max(path.stat().st_size for path in tmp_path.glob("*/events.jsonl"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        def room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        with pytest.raises(
            fz.UserError, match=r"stops: could not be written \(File too large\); .* are free; what was saved before is as it was"
        ):
            run(recipe("stops", evaluate=2), tmp_path, at(8, full))
        room()
        assert names(tmp_path / "stops" / "checkpoints") == ["latest", "step-3", "step-6"]
        events: list[Event] = []
        values = recipe("goes", evaluate=2, save={"every": 3, "full": "go_on"})
        assert run(values, tmp_path, at(8, full), at(14, room), events.append).result["status"] == "done"
        said = [event.what for event in events if isinstance(event, Warned) and "writes no more" in event.what]
        assert said == ["JsonLines writes no more: File too large"]
        assert sum(isinstance(event, Evaluated) for event in events) == 8 and isinstance(events[-1], Finished)


def test_a_page_that_finds_no_room_is_a_warning_beside_a_run_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_files(10**7):

        def full(event: Event) -> None:
            if isinstance(event, Finished):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        values = recipe("r", report=["console", "page"])
        assert fz.run(fz.plan(values, runs=tmp_path, probe=False), observers=[full]).result["status"] == "done"
    said = "".join(capsys.readouterr().err.split())  # whole lines: a folder's name may be broken anywhere
    assert "page.htmlcouldnotbewritten(Filetoolarge);therunitselfisnottouchedbythat" in said
    assert not (tmp_path / "r" / "page.html").exists() and (tmp_path / "r" / "model" / "model.json").exists()


# --------------------------------------------------------------------------------- a save by itself


def test_a_file_too_large_for_its_limit_leaves_the_old_checkpoint_and_nothing_else(tiny: Any, tmp_path: Path) -> None:
    job = tiny().steps(2)
    job.save(tmp_path / "c")
    job.steps(1)
    with small_files(1000), pytest.raises(OSError) as caught:
        job.save(tmp_path / "c", keep=1)
    assert caught.value.errno == errno.EFBIG and caught.value.filename.endswith("optimizer.safetensors")
    assert names(tmp_path / "c") == ["latest", "step-2"] and checkpoint.find(tmp_path / "c") == (tmp_path / "c" / "step-2", {})
    assert job.save(tmp_path / "c", keep=1).name == "step-3" and names(tmp_path / "c") == ["latest", "step-3"]


def test_no_room_from_any_write_on_leaves_the_old_or_the_new_state_whole_and_no_leftovers(
    tiny: Any, struck: Any, equal: Any, tmp_path: Path
) -> None:
    job, folder = tiny().steps(2), tmp_path / "c"
    job.save(folder)
    old = job.state()
    new = job.steps(1).state()
    seen: Counter[str] = Counter()
    for k in range(1, 60):
        code, _ = struck(lambda: job.save(folder), "-e", "trace=write", "-e", f"inject=write:error=ENOSPC:when={k}+")
        if code == 0:
            break
        step, skipped = checkpoint.find(folder)
        assert code == errno.ENOSPC and step is not None and not skipped
        state = tiny().restore(step).state()
        seen["old" if equal(state, old) else "new" if equal(state, new) else "neither"] += 1
        assert names(folder) in (["latest", "step-2"], ["latest", "step-2", "step-3"])
    assert seen["old"] >= 5 and seen["new"] == 1 and not seen["neither"] and code == 0, seen  # at the pointer's write it is whole


def test_a_disk_that_fails_when_it_should_make_bytes_durable_leaves_the_old_checkpoint(tiny: Any, struck: Any, tmp_path: Path) -> None:
    job, folder = tiny().steps(2), tmp_path / "c"
    job.save(folder)
    job.steps(1)
    code, _ = struck(lambda: job.save(folder), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=3")
    assert code == errno.EIO and names(folder) == ["latest", "step-2"]


def test_the_free_bytes_are_looked_at_before_anything_is_written(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny().steps(2)
    needed = checkpoint.bytes_needed(job.job, job.best)
    size = sum(path.stat().st_size for path in job.save(tmp_path / "c").glob("*.safetensors"))
    assert needed <= size <= needed + 5000  # headers
    job.steps(1)
    monkeypatch.setattr(checkpoint, "free_disk", lambda _: needed - 1)
    monkeypatch.setattr(checkpoint, "write_tensors", None)
    with pytest.raises(OSError) as caught:
        job.save(tmp_path / "c")
    assert caught.value.errno == errno.ENOSPC and names(tmp_path / "c") == ["latest", "step-2"]


def test_a_disk_too_small_for_the_run_is_seen_when_it_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fromzero.planner.facts.free_disk", lambda _: 500_000)
    planned = fz.plan(recipe("r"), runs=tmp_path, probe=False)
    with pytest.raises(
        fz.PlanRefused, match=r"checkpoints and model need \d+ kB on the disk, 500 kB are free; the run would stop when it saves"
    ):
        fz.run(planned, quiet=True)
    assert names(tmp_path) == []
