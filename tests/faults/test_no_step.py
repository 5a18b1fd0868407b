"""No optimizer step would ever run, or none that moves a weight: refused by the planner with the arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fromzero as fz
from fromzero.report.events import StepDone


def recipe(count: int, **keys: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.rand(count, 4), torch.arange(count) % 2
    data = {"train": (x, y), "hold_out": 0}
    return {"task": "classify", "model": nn.Linear(4, 2), "data": data, "batch": 8, "report": (), "limits": {"threads": 1}, **keys}


def refused(tmp_path: Path, keys: dict[str, Any]) -> str:
    with pytest.raises(fz.PlanRefused) as error:
        fz.run(fz.plan(keys, runs=tmp_path, probe=False), quiet=True)
    assert error.value.code == 2 and not list(tmp_path.iterdir()), "refused before anything is written"
    return str(error.value)


def test_three_rows_in_batches_of_eight_are_a_step_each_epoch_and_every_row_counts(tmp_path: Path) -> None:
    heard: list[StepDone] = []
    planned = fz.plan(recipe(3, epochs=4), runs=tmp_path, probe=False)
    fz.run(planned, observers=[lambda event: heard.append(event) if isinstance(event, StepDone) else None], quiet=True)
    assert planned.plan.steps == 4 and [event.samples for event in heard] == [3, 6, 9, 12]


def test_pieces_larger_than_the_epoch_still_make_its_steps(tmp_path: Path) -> None:
    planned = fz.plan(recipe(11, epochs=2, limits={"micro_batch": 500, "threads": 1}), runs=tmp_path, probe=False)
    assert fz.run(planned, quiet=True).result["steps"] == 4


def test_a_length_that_comes_to_no_step_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    said = refused(tmp_path, recipe(24, epochs=0.1))
    assert "epochs: 0.1 comes to 0.3 steps, which is none; an epoch of 24 training examples has 3" in said
    mended = said.rpartition("epochs: ")[2].removesuffix(" or more")
    assert "set steps: 1" in said and fz.plan(recipe(24, epochs=float(mended)), probe=False).plan.steps == 1
    assert not [f for f in fz.plan(recipe(24, epochs=float(mended)), probe=False).plan.findings if f.severity == "error"]
    assert "tokens: 5 comes to" in refused(tmp_path, text(tokens=5))


def text(**keys: Any) -> dict[str, Any]:
    words = [
        f"the {a} boat waits for the {b} tide in the harbour of the seven hills" for a in ("red", "old") for b in ("low", "high", "late")
    ]
    model = {"from": "decoder", "width": 16, "layers": 1, "heads": 2, "context": 32}
    data = {"train": words * 4, "tokenizer": "characters", "max_tokens": 32}
    return {"task": "language", "model": model, "data": data, "batch": 8, "report": (), **keys}


def test_a_learning_rate_of_nothing_is_refused(tmp_path: Path) -> None:
    keys = recipe(24, epochs=2, optimizer={"lr_scale": {"*": 0.0}})
    assert "optimizer.lr_scale multiplies the learning rate of all 2 tensors that train by 0; no step could change" in refused(
        tmp_path, keys
    )
    keys = recipe(24, epochs=2, optimizer={"lr_scale": {"weight": 0.0}})
    assert not [f for f in fz.plan(keys, probe=False).plan.findings if f.code == "no-step"]


def test_a_warm_up_longer_than_the_run_is_warned_of(tmp_path: Path) -> None:
    def found(warmup: float) -> list[str]:
        planned = fz.plan(recipe(24, epochs=3, schedule={"name": "cosine", "warmup": warmup}), runs=tmp_path, probe=False)
        return [str(f) for f in planned.plan.findings if f.code == "long-warmup"]

    (said,) = found(89)
    assert "schedule.warmup: 89 steps, and the run has 9; the learning rate ends at 10% of what is asked for" in said
    assert not found(9) and not found(0.5)


def test_a_run_whose_every_tensor_stands_still_is_refused(tmp_path: Path) -> None:
    assert "every parameter is frozen; no step could change anything" in refused(tmp_path, recipe(24, freeze=["*"]))
