"""A preempted job is resumed by the command it was started with: SIGTERM saves and exits 143, the same command goes on, and then is done."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import fromzero as fz
from fromzero.recipe.read import from_values, write
from fromzero.runner.lock import holding
from fromzero.sources.cache import digest_of
from tests.conftest import fromzero as shell

Stop = Callable[..., fz.Planned]


@pytest.fixture
def recipe(noise: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(write(from_values({**noise, "data": {**noise["data"], "train": "tiny.csv"}, "certificate": "off"})))
    return path


def stopped(recipe: Path, step: int, stopped_at: Stop, *overrides: str) -> None:
    """As `train RECIPE` under a signal at a step, without its trial steps."""
    with contextlib.chdir(recipe.parent):
        stopped_at(fz.read(recipe.name, *overrides), Path("runs"), step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs").iterdir() if path.is_dir())


COMMAND = ["train", "r.yaml", "--requeue", "--json"]


def test_the_same_command_after_sigterm_goes_on_to_the_bits_of_an_unbroken_run(recipe: Path, tmp_path: Path) -> None:
    asked = [*COMMAND, "steps=400", "evaluate=150", "save.every=1000"]
    slow = (
        "import sys, time, fromzero.runner.loop as loop\nwas = loop.set_learning_rate\n"
        "def wait(job, step):\n    time.sleep(0.02)\n    return was(job, step)\n"
        "loop.set_learning_rate = wait\nfrom fromzero.cli import main\nmain()"
    )
    job = subprocess.Popen([sys.executable, "-c", slow, *asked], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = tmp_path / "runs" / "r" / "events.jsonl"
    while job.poll() is None and not (events.exists() and "Evaluated" in events.read_text()):  # which is flushed at once
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, said = job.communicate(timeout=60)
    assert job.returncode == 143 and json.loads(out)["code"] == 143 and "saved; fromzero resume r goes on" in said, said
    (checkpoint,) = (tmp_path / "runs" / "r" / "checkpoints").glob("step-*")
    assert 150 <= int(checkpoint.name.removeprefix("step-")) < 400
    code, out, said = shell(*asked, cwd=tmp_path)
    assert code == 0 and json.loads(out)["steps"] == 400 and names(tmp_path) == ["r"], said
    assert shell(*[word for word in asked if word != "--requeue"], "name=whole", cwd=tmp_path)[0] == 0
    ours, theirs = (json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("r", "whole"))
    assert all(ours[key] == theirs[key] for key in ("steps", "validation", "kept_step", "train", "grade"))
    digests = {digest_of(tmp_path / "runs" / name / "model" / "model.safetensors") for name in ("r", "whole")}
    assert len(digests) == 1


def test_a_run_that_is_done_is_said_to_be_and_nothing_is_trained(recipe: Path, tmp_path: Path) -> None:
    assert shell(*COMMAND, cwd=tmp_path)[0] == 0 and names(tmp_path) == ["r"]
    before = {path: path.read_bytes() for path in (tmp_path / "runs" / "r").rglob("*") if path.is_file()}
    code, out, _ = shell("train", "r.yaml", "--requeue", cwd=tmp_path)
    assert code == 0 and out.startswith("nothing was trained: the run of this recipe is done\nr: 9 steps")
    code, out, _ = shell(*COMMAND, cwd=tmp_path)
    assert code == 0 and json.loads(out)["steps"] == 9
    assert {path: path.read_bytes() for path in (tmp_path / "runs" / "r").rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["r"]


def test_without_requeue_the_same_command_begins_another_run(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    assert shell("train", "r.yaml", "--json", cwd=tmp_path)[0] == 0
    assert names(tmp_path) == ["r", "r-2"]


def test_another_recipe_or_another_override_is_another_run(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    code, out, said = shell(*COMMAND, "optimizer.lr=0.01", cwd=tmp_path)
    assert code == 0 and json.loads(out)["run"] == "r-2", said
    code, out, _ = shell(*COMMAND, "optimizer.lr=0.01", cwd=tmp_path)
    assert (code, json.loads(out)["run"]) == (0, "r-2") and names(tmp_path) == ["r", "r-2"]
    code, out, _ = shell(*COMMAND, "optimizer.lr=0.05", cwd=tmp_path)
    assert (code, json.loads(out)["run"], json.loads(out)["steps"]) == (0, "r", 9), "a default written out is the same recipe"
    assert names(tmp_path) == ["r", "r-2"]


def test_a_recipe_in_another_folder_is_another_recipe(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("r.yaml", "tiny.csv"):
        (other / name).write_bytes((tmp_path / name).read_bytes())
    code, out, _ = shell("train", "other/r.yaml", "--requeue", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["run"] == "r-2"


def test_the_newest_of_several_is_gone_on_with(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    stopped(recipe, 5, stopped_at)
    code, out, _ = shell(*COMMAND, cwd=tmp_path)
    assert (code, json.loads(out)["run"]) == (0, "r-2")


def test_a_run_held_by_another_process_is_left_alone(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    with holding(tmp_path / "runs" / "r"):
        code, out, _ = shell(*COMMAND, cwd=tmp_path)
    assert (code, json.loads(out)["run"]) == (0, "r-2")


def test_a_run_that_left_no_checkpoint_is_begun_anew_and_one_whose_checkpoints_are_spoiled_is_not(
    recipe: Path, tmp_path: Path, stopped_at: Stop
) -> None:
    stopped(recipe, 4, stopped_at)
    (weights,) = (tmp_path / "runs" / "r" / "checkpoints" / "step-4").glob("weights*")
    for spoiled in (tmp_path / "runs" / "r" / "checkpoints").glob("step-*/weights*"):
        spoiled.write_bytes(spoiled.read_bytes()[:-1])
    code, _, said = shell(*COMMAND, cwd=tmp_path)
    assert code == 2 and "has no whole checkpoint to go on from" in said and names(tmp_path) == ["r"] and weights.exists()
    os.rename(tmp_path / "runs" / "r" / "checkpoints", tmp_path / "away")
    code, out, _ = shell(*COMMAND, cwd=tmp_path)
    assert (code, json.loads(out)["run"]) == (0, "r-2")


def test_a_run_that_was_made_longer_by_hand_is_still_the_run_of_its_recipe(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    with pytest.raises(fz.NumbersError):
        fz.resume("r", "epochs=5", "limits.seconds=1e-9", runs=tmp_path / "runs", quiet=True)
    fz.resume("r", "limits.seconds=none", runs=tmp_path / "runs", quiet=True)
    code, out, _ = shell(*COMMAND, cwd=tmp_path)
    assert (code, json.loads(out)["run"], json.loads(out)["steps"]) == (0, "r", 15)


def test_changed_data_is_refused_and_no_other_run_is_begun(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    with (tmp_path / "tiny.csv").open("a") as file:
        file.write("1,1,a\n")
    code, _, said = shell(*COMMAND, cwd=tmp_path)
    assert code == 2 and "row 65 (line 66) is new" in said and names(tmp_path) == ["r"]
    code, out, _ = shell("resume", "r", "--accept-changed-data", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["status"] == "done"
    assert "goes on with changed data, as accepted" in (tmp_path / "runs" / "r" / "events.jsonl").read_text()


def test_resume_takes_overrides_from_the_shell_and_refuses_the_others_with_2(recipe: Path, tmp_path: Path, stopped_at: Stop) -> None:
    stopped(recipe, 4, stopped_at)
    code, out, said = shell("resume", "r", "optimizer.lr=1", "batch=2", "--json", cwd=tmp_path)
    assert code == 2 and said.count("cannot become") == 2 and len(json.loads(out)["faults"]) == 2
    code, out, _ = shell("resume", "r", "epochs=4", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["steps"] == 12
    assert yaml.safe_load((tmp_path / "runs" / "r" / "recipe.yaml").read_text())["epochs"] == 4


def test_from_python_with_a_model_and_data_of_ones_own(tmp_path: Path, stopped_at: Stop) -> None:
    x, y = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    keys: dict[str, Any] = {"name": "r", "task": "classify", "batch": 16, "epochs": 3, "report": (), "certificate": "off"}

    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))

    whole = fz.train(**keys, model=net(), data=(x, y), runs=tmp_path / "whole", requeue=True, quiet=True)
    stopped_at({**keys, "model": net(), "data": (x, y)}, tmp_path / "runs", 5)
    for _ in range(2):  # gone on with, then done
        ours = net()
        done = fz.train(**keys, model=ours, data=(x, y), runs=tmp_path / "runs", requeue=True, quiet=True)
        assert done.result["steps"] == whole.result["steps"] and names(tmp_path) == ["r"]
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, done.model.state_dict()[name]) and torch.equal(tensor, ours.state_dict()[name])
