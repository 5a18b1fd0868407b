"""What a frozen part says is computed once and kept: the same training, and refused where it would not be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fromzero as fz
from fromzero.report.jsonlines import read_events
from fromzero.runner import execute, prefix


class Net(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p
        self.first, self.norm, self.drop, self.head = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)).relu())
        return self.head(F.dropout(x, self.p, self.training))


class Half(nn.Module):
    """Its head is fed with half of what a hook would see, and something follows it"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu()) * x.mean(1, keepdim=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prefix, "LEAST_SECONDS", 0.0)
    return tmp_path / "cache" / "fromzero" / "kept"


def recipe(model: nn.Module, **keys: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(150, 6, generator=generator)
    return {
        "name": "kept",
        "task": "classify",
        "model": model,
        "data": (x, x[:, :3].argmax(1)),
        "freeze": "body",
        "optimizer": {"name": "adamw", "lr": 0.01},
        "batch": 32,
        "limits": {"threads": 1},
        "epochs": 4,
        **keys,
    }


def trained(values: dict[str, Any], runs: Path, *, prefix: str | None = None, probe: bool = True) -> tuple[fz.Planned, Any, list[float]]:
    """prefix: in the place of what the planner chose"""
    from dataclasses import replace

    planned = fz.plan(values, runs=runs, probe=probe)
    if prefix is not None:
        planned = replace(planned, plan=replace(planned.plan, prefix=prefix))
    losses: list[float] = []
    outcome = fz.run(planned, quiet=True, observers=[lambda event: losses.append(event.loss) if hasattr(event, "norm") else None])
    return planned, outcome, losses


def net(p: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(p)


def half() -> Half:
    torch.manual_seed(0)
    return Half()


def test_the_same_losses_and_weights_with_and_without(tmp_path: Path, cache: Path) -> None:
    planned, with_it, fast = trained(recipe(net()), tmp_path / "runs")
    heard = [event for event in read_events(tmp_path / "runs" / "kept" / "events.jsonl") if event["event"] == "Kept"]
    assert heard[-1]["done"] == heard[-1]["total"] == 150
    assert planned.plan.prefix == "head" and "computed once" in str(planned) and planned.plan.grade == "reordered"
    _, without, plain = trained(recipe(net()), tmp_path / "runs", prefix="")
    assert len(fast) == len(plain) > 10
    assert torch.allclose(torch.tensor(fast), torch.tensor(plain), rtol=1e-6)
    ours, theirs = with_it.model.state_dict(), without.model.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert with_it.result["validation"] == pytest.approx(without.result["validation"], rel=1e-5)


def test_the_pass_to_the_cut_keeps_to_the_memory_of_the_plan(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(execute, "held_memory", lambda: 2**50)
    monkeypatch.setattr(execute, "give_back_memory", lambda **how: happened.append("given back"))
    planned = fz.plan(recipe(net()), runs=tmp_path / "runs")
    fz.run(planned, quiet=True, observers=[lambda event: happened.append(type(event).__name__)])
    assert planned.plan.prefix == "head" and planned.plan.keep_memory
    assert "given back" in happened[: happened.index("StepDone")]


def test_a_body_that_draws_at_random_is_run_each_time(tmp_path: Path, cache: Path) -> None:
    planned = fz.plan(recipe(net(p=0.5)), runs=tmp_path / "runs")
    assert planned.plan.prefix == "" and "differs by" in " ".join(str(planned).replace("│", "").split())


def test_a_head_whose_output_goes_on_is_not_fed_alone(tmp_path: Path, cache: Path) -> None:
    planned = fz.plan(recipe(half()), runs=tmp_path / "runs")
    assert planned.plan.prefix == "" and "differs by" in str(planned)
    _, _, losses = trained(recipe(half()), tmp_path / "runs", probe=False)  # no trial steps: the run finds it
    _, _, plain = trained(recipe(half()), tmp_path / "runs", prefix="")
    assert losses == plain


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"epochs": 1}, "no example is taken twice"), ({"freeze": "none"}, None), ({"freeze": ["head.*"]}, None)],
    ids=["one-epoch", "all-learns", "first-learns"],
)
def test_where_it_does_not_apply_the_plan_says_why(tmp_path: Path, keys: dict[str, Any], said: str | None) -> None:
    planned = fz.plan(recipe(net(), **keys), runs=tmp_path / "runs", probe=False)
    reasons = {choice.name: choice.reason for choice in planned.plan.choices}
    assert planned.plan.prefix == "" and reasons.get("frozen part") == said


def test_a_later_run_takes_what_an_earlier_one_kept_and_a_spoiled_file_is_computed_anew(tmp_path: Path, cache: Path) -> None:
    _, _, losses = trained(recipe(net()), tmp_path / "runs")
    (file,) = cache.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    _, _, again = trained(recipe(net(), optimizer={"name": "adamw", "lr": 0.02}), tmp_path / "runs")
    assert file.stat().st_mtime_ns == written and again[0] == losses[0] and again[-1] != losses[-1]
    whole = file.read_bytes()
    for spoiled in (whole[:-100], whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:], b""):
        file.write_bytes(spoiled)
        _, _, anew = trained(recipe(net()), tmp_path / "runs")
        assert anew == losses and file.read_bytes() == whole
    other = net()
    with torch.no_grad():
        other.first.weight.mul_(2)
    trained(recipe(other), tmp_path / "runs")
    assert len(list(cache.glob("*.safetensors"))) == 2  # other weights are another key


def test_rows_of_another_model_are_noticed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_key", lambda *_: "always-the-same")
    trained(recipe(net()), tmp_path / "runs")
    (file,) = cache.glob("*")
    theirs = file.read_bytes()
    torch.manual_seed(1)
    _, _, mixed = trained(recipe(Net()), tmp_path / "runs")
    assert file.read_bytes() != theirs
    (cache / "always-the-same.safetensors").unlink()
    torch.manual_seed(1)
    _, _, alone = trained(recipe(Net()), tmp_path / "runs")
    assert mixed == alone


def test_it_is_resumed_bit_for_bit(tmp_path: Path, cache: Path) -> None:
    _, whole, _ = trained(recipe(net()), tmp_path / "whole")
    stopped = fz.plan(recipe(net(), limits={"seconds": 1e-9}, save={"every": 1}), runs=tmp_path / "runs")
    with pytest.raises(fz.NumbersError):
        fz.run(stopped, quiet=True)
    values = recipe(net())
    text = (tmp_path / "runs" / "kept" / "recipe.yaml").read_text()
    (tmp_path / "runs" / "kept" / "recipe.yaml").write_text(text.replace("1.0e-09", "1000"))
    resumed = fz.resume("kept", runs=tmp_path / "runs", model=net(), data=values["data"], quiet=True)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
