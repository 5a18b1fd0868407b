"""Findings while training: each fault that is planted is warned of once, with its mend; sound runs are left in peace."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero.report.events import Evaluated, Event, Warned
from fromzero.report.jsonlines import read_events
from fromzero.runner import loop, watch
from fromzero.runner.progress import Level, Progress


def digits(count: int = 240) -> tuple[Tensor, Tensor]:
    """Ten blurred classes in 36 values."""
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(count) % 10
    return (torch.randn(10, 36, generator=draw)[y] + 0.7 * torch.randn(count, 36, generator=draw)).sigmoid(), y


def net(*activations: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = activations or (nn.ReLU(), nn.ReLU())
    return nn.Sequential(nn.Linear(36, 32), first, nn.Linear(32, 24), second, nn.Linear(24, 10))


def recipe(model: Any, data: Any = None, **keys: Any) -> dict[str, Any]:
    return {
        "task": "classify",
        "model": model,
        "data": data or {"train": digits()},
        "batch": 16,
        "epochs": 12,
        "report": (),
        "limits": {"threads": 1},
        **keys,
    }


def warnings(tmp_path: Path, keys: dict[str, Any], hear: Any = lambda event: None) -> list[Warned]:
    said: list[Event] = []
    fz.run(fz.plan(keys, runs=tmp_path, probe=False), observers=[said.append, hear], quiet=True)
    return [event for event in said if isinstance(event, Warned)]


SOUND: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": fz.SGD(lr=0.1, momentum=0.9)},
    "one batch": {"batch": "all", "epochs": None, "steps": 150, "optimizer": fz.SGD(lr=0.5)},
    "small batches": {"batch": 4, "epochs": 6},
    "mlp with dropout": {"model": {"from": "mlp", "dropout": 0.3}},
    "regress": {"task": "regress", "model": "mlp", "loss": "mse"},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_is_not_warned_of(name: str, tmp_path: Path) -> None:
    x, y = digits()
    keys = {**recipe(net(), {"train": (x, y.float() / 10)} if name == "regress" else None), **SOUND[name]}
    assert warnings(tmp_path, keys) == []


def test_a_loss_that_jumps_is_said_once_with_its_step_and_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, steps = loop.sure_gradients, 0

    def jumping(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        (total, count), changed = honest(*given)
        return (total * (40 if steps in (50, 60) else 1), count), changed

    monkeypatch.setattr(loop, "sure_gradients", jumping)
    (said,) = warnings(tmp_path, recipe(net()))
    assert said.what.startswith("the loss jumped to") and "in step 50, of late its median was" in said.what
    assert "training examples [" in said.what and "try optimizer.lr=0.00033, schedule.warmup or clip" in said.mend


@pytest.mark.parametrize("clipped", [None, 1.0])
def test_a_gradient_that_explodes_is_said_once_with_a_norm_to_clip_at(
    clipped: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, steps = loop.gradient_norm, 0

    def exploding(job: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return honest(job) * (500 if steps in (50, 60) else 1)

    monkeypatch.setattr(loop, "gradient_norm", exploding)
    said = warnings(tmp_path, recipe(net(), clip=clipped))
    if clipped is not None:
        assert said == [], "what is clipped undoes nothing"
    else:
        assert said[0].what.startswith("the gradient's norm jumped to") and "in step 50" in said[0].what and len(said) == 1
        assert "set clip=" in said[0].mend and 0.1 < float(said[0].mend.rpartition("=")[2]) < 10


def test_a_dead_relu_is_named_and_a_leaky_one_or_one_that_lives_a_little_is_not(tmp_path: Path) -> None:
    dead, little = net(), net()
    leaky = net(nn.LeakyReLU(), nn.LeakyReLU())
    with torch.no_grad():
        for model in (dead, leaky):
            model[2].bias.fill_(-100.0)
        little[2].bias[1:].fill_(-100.0)
    (said,) = warnings(tmp_path, recipe(dead))
    assert said.what.startswith("3 gives 0 for every validation example at step 14: no gradient passes a dead ReLU")
    assert "LeakyReLU" in said.mend
    for model in (leaky, little):
        assert not [w for w in warnings(tmp_path, recipe(model)) if "dead ReLU" in w.what]
    assert not any(module._forward_hooks for module in dead.modules())


def test_layers_before_a_cut_answer_without_values_and_are_not_called_dead() -> None:
    model, progress = net(), Progress()

    class Job:
        class plan:
            compiled = False

    Job.model = model  # type: ignore[attr-defined]
    with watch.watching_relus(Job) as dead:  # type: ignore[arg-type]
        model[1](torch.empty(40, 32, device="meta"))
        model[3](torch.zeros(40, 24))
        model[3](torch.zeros(40, 24))
    assert dead() == ["3"] and progress.watched.said == []


def test_tensors_that_stand_still_are_said_once_after_three_steps(tmp_path: Path) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(36, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).detach())

    for steps in (2, 30):
        keys = recipe(Detached(), epochs=None, steps=steps)
        (said,) = warnings(tmp_path, keys)
        assert said.what == f"2 of 4 tensors that should learn have not moved after {min(steps, 3)} steps: first.weight, first.bias"
        assert "no gradient reaches them" in said.mend


def overfitted(**keys: Any) -> dict[str, Any]:
    """Labels that mean nothing, and weights enough to learn them by heart."""
    draw = torch.Generator().manual_seed(5)
    x, y = torch.randn(96, 36, generator=draw), torch.randint(0, 10, (96,), generator=draw)
    return recipe(net(), {"train": (x, y), "hold_out": 0.3}, optimizer={"lr": 1e-2}, epochs=15, **keys)


def test_learning_by_heart_is_said_once_with_the_step_that_is_kept(tmp_path: Path) -> None:
    outcome = fz.run(fz.plan(overfitted(name="best"), runs=tmp_path, probe=False), quiet=True)
    (said,) = [event for event in read_events(tmp_path / "best" / "events.jsonl") if event["event"] == "Warned"]
    kept = outcome.result["kept_step"]
    assert said["what"].startswith("the validation loss has risen 4 times in a row, from") and f"at step {kept} to" in said["what"]
    assert f"the weights of step {kept} are kept" in said["what"] and said["mend"].startswith("stop earlier (evaluate.stop_after)")
    (said,) = warnings(tmp_path, overfitted(evaluate={"keep": "last"}))
    assert "the last weights are kept" in said.what and said.mend.startswith("set evaluate.keep: best")


def test_a_run_that_is_resumed_says_what_an_unbroken_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before and after each warning; the loss is made to jump by the step's own number."""
    honest = loop.after_step

    def jumping(job: Any, progress: Any, loss: float, norm: float, index: Tensor) -> Any:
        far = 500.0 if progress.step in (45, 52) else 1.0
        return honest(job, progress, loss * far, norm * far, index)

    monkeypatch.setattr(loop, "after_step", jumping)

    def keys(name: str, seconds: float | None = None) -> dict[str, Any]:
        model = net()
        with torch.no_grad():
            model[2].bias.fill_(-100.0)  # dead, and two layers that do not move
        return overfitted(name=name) | {"model": model, "batch": 8, "epochs": 7, "optimizer": {"lr": 1e-2, "weight_decay": 0.0}}

    def heard(name: str) -> list[Any]:
        told = read_events(tmp_path / name / "events.jsonl")
        return [{k: v for k, v in e.items() if k != "at"} for e in told if e["event"] in ("StepDone", "Evaluated", "Warned")]

    fz.run(fz.plan(keys("whole"), runs=tmp_path, probe=False), quiet=True)
    whole = heard("whole")
    kinds = [next(w for w in ("jumped to", "norm jumped", "not moved", "dead") if w in e["what"]) for e in whole if e["event"] == "Warned"]
    assert sorted(kinds) == ["dead", "jumped to", "jumped to", "not moved"]
    data = (keys("whole")["data"]["train"], keys("whole")["model"])
    for stop in (1, 9, 44, 45, 51):
        name = f"cut{stop}"

        def interrupt(event: Event, stop: int = stop) -> None:
            if getattr(event, "step", 0) == stop and hasattr(event, "lr"):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(fz.Interrupted):
            fz.run(fz.plan(keys(name), runs=tmp_path, probe=False), observers=[interrupt], quiet=True)
        fz.resume(name, runs=tmp_path, model=data[1], data=data[0], quiet=True)
        assert heard(name) == whole, stop


def test_what_is_far_above_depends_on_spread_and_beginning() -> None:
    def far(values: list[float], last: float) -> bool:
        level = Level()
        for value in values:
            assert not watch._far_above(level, value, watch.LOSS_TIMES, watch.LOSS_BEGIN)
        return watch._far_above(level, last, watch.LOSS_TIMES, watch.LOSS_BEGIN)

    begin = [2.3, 2.2] * 16
    assert not far([2.0] * 31, 500.0), "nothing is known yet"
    assert far(begin, 5.0) and not far(begin, 4.0)
    assert not far([*begin, *[1e-3] * 32], 0.9), "noise of small losses"
    assert far([*begin, *[1e-3] * 32], 1.2)
    assert not far([*begin, *[0.5, 0.5, 0.5, 2.0] * 8], 5.0), "the losses spread as much"
    assert far([-3.0] * 32, 0.5) and not far([-3.0] * 32, -1.0)


def test_a_run_that_is_killed_while_it_evaluates_evaluates_again(tmp_path: Path) -> None:
    """What is saved holds a step and its evaluation, or neither."""

    def crash(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 28:
            raise KeyError("as if killed")

    keys = recipe(net(), name="killed", save="epoch", epochs=3)
    with pytest.raises(KeyError):
        fz.run(fz.plan(keys, runs=tmp_path, probe=False), observers=[crash], quiet=True)
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == ["step-14"]
    fz.resume("killed", runs=tmp_path, model=net(), data=digits(), quiet=True)
    measured = [event["step"] for event in read_events(tmp_path / "killed" / "events.jsonl") if event["event"] == "Evaluated"]
    assert measured == [14, 28, 42], "said once each: the log goes back to the checkpoint too"
