"""The claim of the demo, on the real digits: what was learned on 0 to 4 is worth points on 5 to 9. Slow."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fromzero as fz
from fromzero.errors import SourceError


@pytest.fixture
def digits() -> Path:
    try:
        return fz.fetch("mnist-5k")
    except SourceError as error:
        pytest.skip(f"mnist-5k cannot be fetched here: {error}")


def test_the_frozen_convolutions_of_the_digits_are_bit_identical_after_fine_tuning(repository: Path, tmp_path: Path, digits: Path) -> None:
    recipes = repository / "recipes"
    base = fz.read(recipes / "digits.yaml", "report=[]", "steps=5", "evaluate=1000")
    first = fz.run(fz.plan(base, runs=tmp_path, probe=False, beside=recipes), quiet=True)
    tuned = fz.read(recipes / "digits-finetune.yaml", "report=[]", "epochs=2", "evaluate=1000")
    planned = fz.plan(tuned, runs=tmp_path, probe=False, beside=recipes)
    frozen = {row.layer for row in planned.plan.trains if not row.trains}
    second = fz.run(planned, quiet=True)
    before, after = first.model.state_dict(), second.model.state_dict()
    assert frozen == {"conv1", "conv2"}
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["fc1.weight"], after["fc1.weight"])
    assert after["fc2.weight"].shape == (5, 128) and before["fc2.weight"].shape == (10, 128)


def test_the_tutorials_two_slips_are_explained_by_the_plan(repository: Path, digits: Path) -> None:
    planned = fz.plan(repository / "recipes" / "seed.yaml", probe=False)
    found = {f.code: str(f) for f in planned.plan.findings}
    assert "ends in log_softmax" in found["softmax-twice"] and "return the last Linear's output" in found["softmax-twice"]
    assert "layer 'dropout2' is Dropout2d but gets flat features" in found["dropout2d-flat"] and "nn.Dropout" in found["dropout2d-flat"]
    assert planned.plan.steps == 710 and not any(f.severity == "error" for f in planned.plan.findings)


@pytest.mark.slow
def test_fine_tuning_beats_from_zero_by_three_points_over_five_seeds(repository: Path, tmp_path: Path, digits: Path) -> None:
    import json

    script = repository / "benchmarks" / "transfer.py"
    subprocess.run([sys.executable, script, "--only", "as shipped (adamw 1e-3)", "--json", tmp_path / "r.json"], check=True)
    row = json.loads((tmp_path / "r.json").read_text())["as shipped (adamw 1e-3)"]
    assert len(row["pairs"]) == 5 and row["tuned"] - row["zero"] >= 0.03
