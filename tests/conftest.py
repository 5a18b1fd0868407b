"""What several tests share: real data and real weights, where they are to be had, and a job small enough for hundreds of saves."""

import contextlib
import io
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fromzero as fz
from fromzero.cli import app
from fromzero.report.events import StepDone
from fromzero.runner import checkpoint
from fromzero.runner.assemble import Job, assemble
from fromzero.runner.loop import Best, train
from fromzero.runner.progress import Progress
from fromzero.tuning import frozen_digest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """A source's local file or folder, from the cache or a package registry; without either the test is skipped, saying so."""

    def bring(source: str) -> Path:
        try:
            return fz.fetch(source)
        except fz.SourceError as error:
            pytest.skip(f"NOT CHECKED: {source} could not be fetched ({error})")

    return bring


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


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
        drawn = json.dumps(numbers["random"], default=lambda array: array.tolist())
        return {**held, **numbers["optimizer"], "drawn": drawn, **asdict(self.progress), "seconds": 0}


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
def noise(tmp_path: Path) -> dict[str, Any]:
    """A recipe that trains in milliseconds, on 64 rows of noise: its best evaluation is an early one."""
    draw = random.Random(4)
    rows = [f"{draw.gauss(0, 1):.3f},{draw.gauss(0, 1):.3f},{draw.choice('abc')}" for _ in range(64)]
    (tmp_path / "tiny.csv").write_text("\n".join(["x,y,kind", *rows]) + "\n")
    return {
        "name": "r",
        "task": "classify",
        "model": {"from": "mlp", "hidden": [4]},
        "data": {"train": str(tmp_path / "tiny.csv"), "target": "kind", "hold_out": 0.25},
        "batch": 16,
        "epochs": 3,
        "optimizer": {"name": "adamw", "lr": 0.05},
        "save": "epoch",
        "limits": {"threads": 1},
        "report": (),
    }


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def fromzero(*arguments: str, cwd: Path) -> Done:
    """The command, in this process: importing torch anew for each would cost minutes."""
    out, said, code = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            app(list(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
    return Done(code, out.getvalue(), said.getvalue())


@pytest.fixture
def stopped_at() -> Callable[..., fz.Planned]:
    """Train a recipe until a signal comes at a step; the run is saved there."""

    def stop(recipe: dict[str, Any], runs: Path, step: int) -> fz.Planned:
        def interrupt(event: object) -> None:
            if isinstance(event, StepDone) and event.step == step:
                os.kill(os.getpid(), signal.SIGINT)

        planned = fz.plan(recipe, runs=runs, probe=False)
        with pytest.raises(fz.Interrupted, match=f"stopped after step {step} of"):
            fz.run(planned, quiet=True, observers=[interrupt])
        return planned

    return stop
