"""A save that is killed at any of its calls: a whole checkpoint is found, with the old or the new state bit for bit."""

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fromzero.runner import checkpoint
from fromzero.runner.manifest import wrong_with

CALLS = "?rename,?renameat,?renameat2,?mkdir,?mkdirat,?unlink,?unlinkat,?rmdir,openat,write,fsync"  # on any machine: ? before what a system may lack


def calls_of(log: str) -> list[tuple[str, str]]:
    """Name and arguments of each call, in order"""
    return [found.group(1, 2) for line in log.splitlines() if (found := re.match(r"(?:\d+ +)?(\w+)\((.*)", line))]


def sweep(
    tiny: Callable[..., Any], struck: Callable[..., tuple[int, str]], equal: Callable[..., bool], tmp_path: Path, *, every: bool
) -> int:
    """Kill a save at its calls, every one or three of each kind.  returns: how often"""
    job, template = tiny().steps(2), tmp_path / "template"
    job.save(template, keep=1)
    old = job.state()
    new = job.steps(1).state()
    assert not equal(old, new)
    shutil.copytree(template, tmp_path / "counted")
    code, log = struck(lambda: job.save(tmp_path / "counted", keep=1), "-e", f"trace={CALLS}")
    counts = Counter(name for name, _ in calls_of(log))
    assert code == 0 and {"mkdir", "rename", "openat", "write", "fsync", "unlinkat"} <= {name.removesuffix("at") for name in counts} | set(
        counts
    )
    points = [(name, k) for name, count in counts.items() for k in (range(1, count + 1) if every else sorted({1, (count + 1) // 2, count}))]
    seen, again = Counter[str](), tiny()
    for name, k in points:
        folder = tmp_path / "killed"
        shutil.copytree(template, folder)
        code, _ = struck(
            lambda: job.save(tmp_path / "killed", keep=1), "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={k}"
        )
        assert code == -9, (name, k)
        step, skipped = checkpoint.find(folder)
        assert step is not None and not skipped, (name, k, skipped)
        state = again.restore(step).state()
        seen["old" if equal(state, old) else "new" if equal(state, new) else f"neither after {name} {k}"] += 1
        assert not [path for path in folder.glob("step-?") if wrong_with(path)], (name, k)  # what is half gone has another name
        checkpoint.tidy(folder, skipped)
        assert {path.name for path in folder.iterdir()} <= {"latest", "step-2", "step-3"}, (name, k)
        job.save(folder, keep=1)  # the run goes on and comes through the same step
        assert {path.name for path in folder.iterdir()} == {"latest", "step-3"}, (name, k)
        assert equal(again.restore(checkpoint.find(folder)[0]).state(), new), (name, k)
        shutil.rmtree(folder)
    assert set(seen) == {"old", "new"} and seen.total() == len(points), seen
    return len(points)


def test_a_save_killed_at_some_calls_of_each_kind_leaves_the_old_or_the_new_state_whole(
    tiny: Any, struck: Any, equal: Any, tmp_path: Path
) -> None:
    assert sweep(tiny, struck, equal, tmp_path, every=False) >= 18


@pytest.mark.slow
def test_a_save_killed_at_each_of_its_calls_leaves_the_old_or_the_new_state_whole(
    tiny: Any, struck: Any, equal: Any, tmp_path: Path
) -> None:
    assert sweep(tiny, struck, equal, tmp_path, every=True) >= 55  # 59 measured


def test_every_byte_is_on_the_disk_before_the_rename_and_the_rename_before_the_pointer_and_that_before_anything_goes(
    tiny: Any, struck: Any, tmp_path: Path
) -> None:
    """A killed process loses no byte that it wrote, a machine without power does: only the order of the calls shows this guard."""
    job, folder = tiny().steps(2), tmp_path / "c"
    job.save(folder, keep=1)
    job.steps(1)
    code, log = struck(lambda: job.save(folder, keep=1), "-e", "trace=?rename,?renameat,?renameat2,fsync,?unlinkat,?unlink,?rmdir")
    assert code == 0
    calls = [f"{name} {re.sub(r'tmp-[0-9]+', 'tmp', said).replace(str(folder), 'C')}" for name, said in calls_of(log)]

    def at(pattern: str) -> int:
        found = [place for place, call in enumerate(calls) if re.search(pattern, call)]
        assert len(found) == 1, (pattern, calls)
        return found[0]

    begun, renamed, pointed = at(r'rename.*"C/step-3.tmp".*"C/step-3"'), at(r'rename.*"C/latest"'), at(r'rename.*"C/step-2"')
    files = ("weights.safetensors", "optimizer.safetensors", "best.safetensors", "progress.json", "manifest.json")
    synced = [at(rf"fsync \d+<C/step-3.tmp/\.{name}") for name in files]
    assert synced == sorted(synced) and synced[-1] < begun < renamed < pointed
    assert any(re.search(r"fsync \d+<C/step-3.tmp>", call) for call in calls[synced[-1] : begun])
    assert any(re.search(r"fsync \d+<C>", call) for call in calls[begun:renamed])
    assert any(re.search(r"fsync \d+<C/\.latest", call) for call in calls[begun:renamed])
    assert any(re.search(r"fsync \d+<C>", call) for call in calls[renamed:pointed])
    gone = [place for place, call in enumerate(calls) if "unlink" in call or "rmdir" in call]
    assert len(gone) >= 5 and min(gone) > pointed


def test_a_checkpoint_that_is_replaced_stands_aside_until_the_new_one_is_whole(tiny: Any, struck: Any, equal: Any, tmp_path: Path) -> None:
    """The only checkpoint there is, saved anew at its own step, and killed between the two renames."""
    job, folder = tiny().steps(1), tmp_path / "c"
    job.save(folder, keep=1)
    old = job.state()
    next(iter(job.job.model.parameters())).data.add_(1)
    new, killed = job.state(), 0
    for k in range(1, 30):
        code, _ = struck(
            lambda: job.save(folder, keep=1), "-e", "trace=?rename,?renameat", "-e", f"inject=?rename,?renameat:signal=SIGKILL:when={k}"
        )
        if code == 0:
            break
        killed += 1
        step, skipped = checkpoint.find(folder)
        assert code == -9 and step is not None and not skipped
        state = tiny().restore(step).state()
        assert equal(state, old) or equal(state, new)
    assert checkpoint.tidy(folder, [])
    assert killed >= 7 and [path.name for path in sorted(folder.iterdir())] == ["latest", "step-1"]
