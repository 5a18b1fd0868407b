"""Checkpoints: what is in one, what it belongs to, what is refused, what stays; files of released versions; other readers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import fromzero as fz
from fromzero.report.events import Event, StepDone
from fromzero.report.jsonlines import read_events
from fromzero.runner import checkpoint

RELEASED = Path(__file__).parent / "released"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_state_comes_back_bit_for_bit_into_a_job_that_was_elsewhere(tiny: Any, equal: Callable[..., bool], tmp_path: Path) -> None:
    one = tiny(model={"from": "mlp", "hidden": [4], "dropout": 0.3}).steps(5)
    step, state = one.save(tmp_path / "c"), one.state()
    other = tiny(model={"from": "mlp", "hidden": [4], "dropout": 0.3}).steps(9)
    assert not equal(other.state(), state)
    assert equal(other.restore(step).state(), state)
    assert equal(other.steps(3).state(), one.restore(step).steps(3).state())  # and both go on alike, draws included


def test_a_manifest_says_what_wrote_it_and_notes_what_was_to_be_written(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny().steps(2)
    values = json.loads((job.save(tmp_path / "c") / "manifest.json").read_text())
    assert list(values) == ["format", "step", "recipe", "data", "frozen", "versions", "files", "sha256"]
    assert values["format"] == 2 and values["step"] == 2 and values["recipe"]["model"] == {"from": "mlp", "hidden": [4]}
    assert values["data"] == job.job.plan.facts.data.digest and values["frozen"] == job.frozen
    assert values["versions"] == {"fromzero": fz.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    assert sorted(values["files"]) == ["best.safetensors", "optimizer.safetensors", "progress.json", "weights.safetensors"]
    assert (tmp_path / "c" / "latest").read_text() == "step-2\n"
    real = checkpoint.write_tensors

    def bad_disk(path: Path, tensors: Any) -> str:
        digest = real(path, tensors)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        return digest

    monkeypatch.setattr(checkpoint, "write_tensors", bad_disk)
    assert "safetensors has changed" in checkpoint.find(job.steps(1).save(tmp_path / "c").parent)[1][tmp_path / "c" / "step-3"]


def test_so_many_stay_and_a_damaged_one_is_not_among_them(tiny: Any, tmp_path: Path) -> None:
    job, folder = tiny(), tmp_path / "c"
    for _ in range(4):
        job.steps(1).save(folder, keep=2)
    assert names(folder) == ["latest", "step-3", "step-4"]
    (folder / "step-4" / "weights.safetensors").write_bytes(b"")
    step, damaged = checkpoint.find(folder)
    assert step is not None and checkpoint.tidy(folder, damaged) == ["step-4 was set aside as step-4.aside; the next save removes it"]
    again = tiny().restore(step)
    assert checkpoint.find(folder)[0] == step and names(folder) == ["latest", "step-3", "step-4.aside"]
    again.steps(2).save(folder, keep=2)
    assert names(folder) == ["latest", "step-3", "step-5"]


def test_another_recipe_other_data_and_other_shapes_are_refused_all_at_once(tiny: Any, tmp_path: Path) -> None:
    step = tiny().steps(2).save(tmp_path / "c")
    data = (torch.rand(24, 5), torch.arange(24) % 2)
    other = tiny(
        model={"from": "mlp", "hidden": [7]}, data={"train": data, "hold_out": 0.25}, seed=3, optimizer={"name": "adam", "lr": 0.5}
    )
    before = {name: tensor.clone() for name, tensor in other.job.model.state_dict().items()}
    with pytest.raises(fz.SourceError) as caught:
        other.restore(step)
    said = [str(fault) for fault in caught.value.faults]
    assert len(said) == 5
    ending = "the saved tensors would mean something else; put it back, or train anew"
    assert said[0] == f"{step} model.hidden: was [4] when this was saved, and is [7]; {ending}"
    assert said[1] == f"{step} optimizer.name: was adamw when this was saved, and is adam; {ending}"
    assert said[2] == f"{step} seed: was left out when this was saved, and is 3; {ending}"
    assert said[3].startswith(f"{step} data: was saved with other data, whose digest was ")
    assert "its tensors do not fit the model: body.0.weight is (4, 3), not (7, 5); body.0.bias is (4,), not (7,)" in said[4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.job.model.state_dict().items())


def test_what_does_not_change_the_meaning_of_a_tensor_may_change(tiny: Any, equal: Callable[..., bool], tmp_path: Path) -> None:
    one = tiny().steps(2)
    step = one.save(tmp_path / "c")
    other = tiny(
        seed=0, save={"every": 1, "keep": 5}, limits={"threads": 1, "seconds": 1e9}, optimizer={"name": "adamw", "lr": 0.5}, steps=9
    )
    assert equal(other.restore(step).state(), one.state())


def test_a_checkpoint_of_a_newer_version_is_no_reason_to_go_on_from_an_older_one(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny().steps(1)
    job.save(tmp_path / "c")
    monkeypatch.setattr("fromzero.runner.manifest.FORMAT", 3)
    job.steps(1).save(tmp_path / "c")
    monkeypatch.undo()
    with pytest.raises(
        fz.SourceError, match=r"step-2: was written by a newer fromzero \(format 3; this one reads up to 2\); go on with that"
    ):
        checkpoint.find(tmp_path / "c")


# ------------------------------------------------------------------------------ what is no number


@pytest.mark.parametrize("where", ["weight", "optimizer", "best", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_not_saved_and_the_last_good_one_stays(tiny: Any, tmp_path: Path, where: str, value: float) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].register_buffer("mask", torch.zeros(4, 4))
    job, folder = tiny(model=net).steps(2), tmp_path / "c"
    good = job.save(folder, keep=1)
    job.steps(1)
    state = {id(p): s for p, s in job.job.optimizer.state.items()}
    model: Any = job.job.model
    places = {"weight": model[2].weight.data, "optimizer": state[id(model[2].weight)]["exp_avg"], "buffer": model[0].mask}
    places["best"] = job.best.weights["2.weight"]
    places[where][0, 1] = value
    with pytest.raises(fz.NumbersError) as caught:
        job.save(folder, keep=1)
    name = {"weight": "2.weight", "optimizer": "state.4.exp_avg", "best": "2.weight", "buffer": "0.mask"}[where]
    found = f"{name} is no finite number: 1 of its {places[where].numel()} values are NaN or infinite"
    said = f"after step 3 {found}; such numbers are neither kept nor saved, and what was saved before is as it was; try "
    assert str(caught.value).startswith(said) and caught.value.code == 3
    assert names(folder) == ["latest", "step-2"] and checkpoint.find(folder) == (good, {})


def test_a_run_whose_weights_became_no_numbers_ends_there_and_its_good_checkpoint_stays(tmp_path: Path) -> None:
    net, hurt = nn.Linear(3, 2), []

    def observer(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 4:  # as a broken machine does; the loss is looked at a step later
            hurt[0].data[0, 0] = float("nan")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hurt[:] = [self.inner.weight]
            return self.inner(x)  # type: ignore[no-any-return]

    x = torch.rand(24, 3, generator=torch.Generator().manual_seed(0))
    values = {
        "name": "r",
        "task": "classify",
        "model": Own(),
        "data": {"train": (x, (x[:, 0] > 0.5).long())},
        "batch": 6,
        "steps": 8,
        "report": [],
    }
    planned = fz.plan({**values, "save": {"every": 2}, "evaluate": {"every": 8, "keep": "last"}}, runs=tmp_path, probe=False)
    with pytest.raises(fz.NumbersError, match=r"after step 4 inner.weight is no finite number: 1 of its 6 values are NaN"):
        fz.run(planned, quiet=True, observers=[observer])
    assert names(tmp_path / "r" / "checkpoints") == ["latest", "step-2"]
    assert json.loads((tmp_path / "r" / "result.json").read_text())["kept_step"] == 2, "the model is that of the good checkpoint"


def test_a_model_that_holds_no_numbers_at_its_end_is_not_written(tmp_path: Path) -> None:
    model: list[nn.Module] = []

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            model[:] = [self]
            return super().forward(x)

    def observer(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            model[0].bias.data[0] = float("inf")  # type: ignore[union-attr, operator]

    x = torch.rand(24, 3)
    values = {
        "name": "r",
        "task": "classify",
        "model": Own(3, 2),
        "data": {"train": (x, torch.arange(24) % 2), "hold_out": 0},
        "batch": 6,
        "steps": 4,
    }
    with pytest.raises(fz.NumbersError, match="after step 4 bias is no finite number: 1 of its 2 values are NaN or infinite"):
        fz.run(fz.plan({**values, "report": []}, runs=tmp_path, probe=False), quiet=True, observers=[observer])
    assert not (tmp_path / "r" / "model").exists()


# ------------------------------------------------------------------------------ what stands still


def test_only_what_trains_is_saved_and_a_changed_base_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(3, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 2))\n"
    )
    base = {k: torch.rand(v) for k, v in {"0.weight": (50, 3), "0.bias": (50,), "3.weight": (2, 50), "3.bias": (2,)}.items()}
    base |= {f"1.{k}": torch.rand(50) for k in ("weight", "bias", "running_mean", "running_var")} | {
        "1.num_batches_tracked": torch.tensor(7)
    }
    save_file(base, "base.safetensors")
    Path("rows.csv").write_text("a,b,c,kind\n" + "".join(f"{i % 7},{i % 5},{i % 3},{'odd' if i % 2 else 'even'}\n" for i in range(40)))
    values = {"name": "r", "task": "classify", "model": {"from": "net.py:Net", "weights": "base.safetensors"}, "freeze": "body", "batch": 8}
    values |= {
        "data": {"train": "rows.csv", "target": "kind"},
        "steps": 8,
        "save": 2,
        "report": [],
        "limits": {"seconds": 1e-9, "threads": 1},
    }
    with pytest.raises(fz.NumbersError):
        fz.run(fz.plan(values, probe=False), quiet=True)
    text = Path("runs/r/recipe.yaml").read_text()
    Path("runs/r/recipe.yaml").write_text(text.replace("seconds: 1.0e-09, ", "").replace("seconds: 1e-09, ", ""))
    step = next(Path("runs/r/checkpoints").glob("step-*"))
    assert sorted(load_file(step / "weights.safetensors")) == ["3.bias", "3.weight"]
    for name in ("0.weight", "1.running_mean"):  # a parameter, and a buffer of a frozen layer
        changed = {key: tensor.clone() for key, tensor in base.items()}
        changed[name].view(-1)[0] += 1
        save_file(changed, "base.safetensors")
        with pytest.raises(
            fz.SourceError, match=r"step-\d+ model: what stands still in net.py:Net is no longer what it was: its SHA-256 is"
        ):
            fz.resume("r", quiet=True)
    save_file(base, "base.safetensors")
    after = fz.resume("r", quiet=True).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items() if not name.startswith("3."))


# ---------------------------------------------------------------------------- of released versions


@pytest.mark.parametrize("version", ["0.1.0"])
def test_a_run_that_a_released_version_began_goes_on(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in RELEASED.iterdir() if path.is_dir() and path.name[0].isdigit()) == ["0.1.0"]
    shutil.copytree(RELEASED / version, tmp_path / "runs")
    (tmp_path / "runs" / "rows.csv").rename(tmp_path / "rows.csv")
    monkeypatch.chdir(tmp_path)
    whole = fz.run(fz.plan({**json.loads(json.dumps(recipe_of(version))), "name": "whole"}, probe=False), quiet=True)
    part = fz.resume("old", quiet=True)
    events = read_events(tmp_path / "runs" / "old" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "Started"] == [6] and part.result["steps"] == 12
    assert not [event for event in events if event["event"] == "Warned" and "step-" in event["what"]]
    for name, tensor in whole.model.state_dict().items():  # its first half was computed on another machine
        torch.testing.assert_close(part.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def recipe_of(version: str) -> Any:
    from fromzero.recipe.read import parse

    return parse((RELEASED / version / "old" / "recipe.yaml").read_bytes(), "recipe.yaml").values


# ---------------------------------------------------------------------------------- other readers


def empty_like(files: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 77) for tensors in files.values() for name, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it says that it reads alone
def test_torchs_distributed_checkpoint_reads_a_whole_checkpoint(tiny: Any, tmp_path: Path) -> None:
    job = tiny().steps(3)
    step, files = job.save(tmp_path / "c"), checkpoint._files(job.job, job.best)[0]
    found = empty_like(files)
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(step)), no_dist=True)
    wanted = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert len(wanted) >= 20 and len(wanted) == sum(map(len, files.values())), "no name stands twice"
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def _one_of_two(rank: int, store: str, step: str, wanted: dict[str, torch.Tensor]) -> None:
    """A rank that asks for its half of every matrix"""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        found = {
            name: distribute_tensor(torch.full_like(tensor, 77), mesh, [Shard(0)]) if tensor.dim() == 2 else torch.full_like(tensor, 77)
            for name, tensor in wanted.items()
        }
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(step))
        for name, tensor in wanted.items():
            mine = found[name].to_local() if tensor.dim() == 2 else found[name]  # type: ignore[attr-defined]
            assert torch.equal(mine, tensor.chunk(2)[rank] if tensor.dim() == 2 else tensor), name
            assert tensor.dim() != 2 or mine.shape[0] < tensor.shape[0]
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children use none of this process's threads
def test_torchs_distributed_checkpoint_reads_it_in_halves_on_two_ranks(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    job = tiny().steps(3)
    step, files = job.save(tmp_path / "c"), checkpoint._files(job.job, job.best)[0]
    wanted = {name: tensor.clone() for tensors in files.values() for name, tensor in tensors.items()}
    torch.multiprocessing.start_processes(_one_of_two, (str(tmp_path / "store"), str(step), wanted), nprocs=2, start_method="fork")
