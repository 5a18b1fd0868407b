"""What tests of checkpoints share: a job small enough for hundreds of saves, and a fork of this process that strace strikes."""

import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.report.events import StepDone
from fromzero.runner import checkpoint
from fromzero.runner.assemble import Job, assemble
from fromzero.runner.loop import Best, train
from fromzero.runner.progress import Progress
from fromzero.tuning import frozen_digest


class Tiny:
    """A job with its progress: `steps` trains it, `save` saves it, `state` is all that a restart needs, bit for bit."""

    def __init__(self, runs: Path, **recipe: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(24, 3, generator=generator)
        y = (x.sum(1) > 1.5).long()
        values = {"task": "classify", "model": {"from": "mlp", "hidden": [4]}, "data": {"train": (x, y), "hold_out": 0.25}, "batch": 6}
        values |= {"steps": 60, "evaluate": 1, "optimizer": {"lr": 0.02}, "limits": {"threads": 1}, "report": []}
        planned = fz.plan({**values, **recipe}, runs=runs, probe=False)
        torch.manual_seed(0)
        self.job: Job = assemble(planned.plan, planned.loaded, planned.place)
        self.progress, self.best = Progress(), Best()
        self.frozen = frozen_digest(self.job.model, self.job.frozen)

    def steps(self, count: int) -> "Tiny":
        done = (event for event in train(self.job, self.progress, self.best, lambda: False) if isinstance(event, StepDone))
        assert len(list(islice(done, count))) == count
        return self

    def save(self, folder: Path, *, keep: int = 2) -> Path:
        return checkpoint.save(folder, self.job, self.progress, self.best, keep=keep, frozen=self.frozen)

    def restore(self, step: Path) -> "Tiny":
        self.progress = checkpoint.restore(step, self.job, self.best, frozen=self.frozen)
        return self

    def state(self) -> dict[str, Any]:
        files, numbers = checkpoint._files(self.job, self.best)
        held = {f"{file}/{name}": tensor.clone() for file, tensors in files.items() for name, tensor in tensors.items()}
        return {**held, **numbers, **asdict(self.progress), "seconds": 0}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys() and len(one) >= 25
    return all(torch.equal(a, other[k]) if isinstance(a, torch.Tensor) else a == other[k] for k, a in one.items())


@pytest.fixture
def equal() -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    return _equal


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Tiny]:
    return lambda **recipe: Tiny(tmp_path / "runs", **recipe)


@pytest.fixture
def struck(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run work in a fork of this process, from its first call on under strace with some options.

    returns: its exit code (-9 after SIGKILL, else the number of the OSError that ended it, else 0), and what strace wrote
    """
    if shutil.which("strace") is None:
        pytest.skip("NOT CHECKED: there is no strace to strike with")

    def strike(work: Callable[[], object], *options: str) -> tuple[int, str]:
        wait, go = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none of them
            child = os.fork()
        if child == 0:
            code = 121
            try:
                os.read(wait, 1)
                work()
                code = 0
            except OSError as error:
                code = error.errno or 122
            finally:
                os._exit(code)
        log = tmp_path / "strace.log"
        tracer = subprocess.Popen(["strace", "-qq", "-y", "-o", str(log), "-p", str(child), *options], stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 20
        while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text() and tracer.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        held = tracer.poll() is None
        os.write(go, b"x")
        _, status = os.waitpid(child, 0)
        _, said = tracer.communicate(timeout=20)
        os.close(wait)
        os.close(go)
        if not held:
            pytest.skip(f"NOT CHECKED: strace may not hold another process here ({said.strip()})")
        return os.waitstatus_to_exitcode(status), log.read_text()

    return strike
