"""Numbers that are none: a step stops before its weights, or is skipped and counted; nothing non-finite is saved, kept or exported."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero.report.events import Evaluated, Event, StepDone, Warned
from fromzero.report.jsonlines import read_events
from fromzero.runner import checkpoint, loop
from fromzero.runner.assemble import assemble
from fromzero.runner.before import Before
from fromzero.runner.execute import Outcome
from fromzero.runner.numbers import _first_layer
from fromzero.tuning import set_training

NAN = float("nan")


class Net(nn.Module):
    """With running means and dropout: what a forward pass changes by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x[:, :5])).relu()))


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    """The last input is the example's number."""
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(count, 6, generator=draw)
    x[:, 5] = torch.arange(count).float() / 100
    return x, (x[:, 0] > x[:, 1]).long()


class Marked(Net):
    """Says NaN in training where a batch holds the marked example: once an epoch."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x[:, :5])
        if self.training and bool(((x[:, 5] * 100).round() == 20).any()):
            hidden = hidden * NAN
        return self.last(self.drop(self.norm(hidden).relu()))


def recipe(model: nn.Module, **keys: Any) -> dict[str, Any]:
    x, y = data()
    keys = {"batch": 8, "epochs": 4, "optimizer": {"lr": 1e-2}, "report": (), "save": 4, "limits": {"threads": 1}, **keys}
    return {"task": "classify", "model": model, "data": {"train": (x, y), "hold_out": 0.25}, **keys}


def run(tmp_path: Path, model: nn.Module, hear: Callable[[Event], None] = lambda event: None, **keys: Any) -> Outcome:
    return fz.run(fz.plan(recipe(model, **keys), runs=tmp_path, probe=False), observers=[hear], quiet=True)


def test_a_step_that_goes_wrong_stops_with_its_examples_and_layer_and_the_running_means_stay_finite(tmp_path: Path) -> None:
    with pytest.raises(fz.NumbersError) as error:
        run(tmp_path, Marked(), name="stop")
    assert error.value.code == 3
    said = str(error.value)
    assert "the first layer that gives no finite number is norm, which is given one already" in said and "training examples [" in said
    step = int(said.removeprefix("step ").partition(":")[0])
    assert f"the weights are those of step {step - 1}" in said and "try optimizer.lr=0.001" in said
    at, weights = checkpoint.saved_weights(tmp_path / "stop" / "checkpoints")  # type: ignore[misc]
    assert at == step - 1
    assert all(tensor.isfinite().all() for tensor in weights.values()) and "norm.running_mean" in weights
    kept = fz.load("run:stop", runs=tmp_path, model=Marked())
    assert all(tensor.isfinite().all() for tensor in kept.state_dict().values())


def test_an_input_that_is_no_finite_number_is_named_by_its_example(tmp_path: Path) -> None:
    x, y = data()

    class Rows(torch.utils.data.Dataset[Any]):
        """The plan looks at the first rows; a row beyond them holds infinity."""

        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            return (x[at] / 0 if at == 50 and looked else x[at]), int(y[at])

    looked = False
    keys = recipe(nn.Sequential(nn.Linear(6, 2)), name="rows") | {"data": {"train": Rows(), "hold_out": 0}}
    planned = fz.plan(keys, runs=tmp_path, probe=False)
    looked = True
    with pytest.raises(fz.NumbersError, match=r"training examples \[50\] hold inputs that are no finite numbers"):
        fz.run(planned, quiet=True)


def heard(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What a run said of its training, times aside."""
    kinds = (StepDone.__name__, Evaluated.__name__, Warned.__name__)
    return [{k: v for k, v in e.items() if k != "at"} for e in read_events(tmp_path / name / "events.jsonl") if e["event"] in kinds]


def test_skipped_steps_are_counted_and_one_more_stops(tmp_path: Path) -> None:
    events: list[Event] = []
    whole = run(tmp_path, Marked(), events.append, name="skip", not_finite={"skip": 4})
    warned = [event for event in events if isinstance(event, Warned)]
    assert len(warned) == 4 and "was skipped, 1 of 4 that may be: the loss is nan; the first layer" in warned[0].what
    assert "training examples [" in warned[0].what and warned[0].mend == "no weight has moved"
    done = [event for event in events if isinstance(event, StepDone)]
    assert len(done) == 24 - 4 and done[-1].samples == 4 * 48 and whole.result["steps"] == 24 and whole.result["skipped_steps"] == 4
    losses = {event.step: event.loss for event in done}
    for event in (event for event in events if isinstance(event, Evaluated)):
        mine = [loss for step, loss in losses.items() if event.step - 6 < step <= event.step]
        assert len(mine) == 5 and event.train_loss == pytest.approx(sum(mine) / 5, rel=1e-9), "left out of the mean, by count"
    with pytest.raises(fz.NumbersError, match=r"3 steps were skipped before, which is all that not_finite allows"):
        run(tmp_path, Marked(), name="limit", not_finite={"skip": 3})


class Drawing(Marked):
    """Draws from every generator that a person's own code may draw from."""

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(())
        return super().forward(x)


def test_a_skipped_step_leaves_weights_running_means_draws_and_optimizer_state_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    honest = loop.sure_gradients

    def noting(job: Any, *rest: Any) -> Any:
        noting.before = state(job)  # type: ignore[attr-defined]
        return honest(job, *rest)

    def state(job: Any) -> list[Tensor]:
        moments = [value for of in job.optimizer.state.values() for value in of.values()]
        places = torch.tensor([random.getstate()[1][-1], np.random.get_state()[2]])
        return [places, torch.get_rng_state(), *(tensor.clone() for tensor in (*job.model.state_dict().values(), *moments))]

    skip = loop.skip_or_stop

    def looking(found: Any, norm: Any, job: Any, *rest: Any) -> Any:
        nonlocal compared
        said = skip(found, norm, job, *rest)
        if said is not None:
            compared += 1
            assert all(torch.equal(a, b) for a, b in zip(noting.before, state(job), strict=True))  # type: ignore[attr-defined]
        return said

    monkeypatch.setattr(loop, "sure_gradients", noting)
    monkeypatch.setattr(loop, "skip_or_stop", looking)
    run(tmp_path, Drawing(), not_finite={"skip": 9})
    assert compared == 4


def test_skipping_is_exact_under_resume_and_counts_on(tmp_path: Path) -> None:
    x, y = data()
    whole = run(tmp_path, Marked(), name="whole", not_finite={"skip": 4})
    first = next(e["what"] for e in heard("whole", tmp_path) if e["event"] == "Warned")
    at = int(first.removeprefix("step ").partition(" ")[0])
    for stop in (at, at + 5):  # the step that is skipped itself, and one behind it
        name = f"cut{stop}"
        planned = fz.plan(recipe(Marked(), name=name, not_finite={"skip": 4}), runs=tmp_path, probe=False)
        with pytest.raises(fz.Interrupted):
            fz.run(planned, observers=[lambda event, stop=stop: interrupt_at(event, stop)], quiet=True)
        resumed = fz.resume(name, runs=tmp_path, model=Marked(), data=(x, y), quiet=True)
        assert heard(name, tmp_path) == heard("whole", tmp_path)
        for key, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[key]), key
        assert resumed.result["skipped_steps"] == 4


def interrupt_at(event: Event, step: int) -> None:
    """As Ctrl-C would, in the step that is done or skipped."""
    skipped = isinstance(event, Warned) and event.what.startswith(f"step {step} was skipped")
    if skipped or (isinstance(event, StepDone) and event.step == step):
        os.kill(os.getpid(), signal.SIGINT)


def test_words_that_are_neither_stop_nor_skip_are_refused(tmp_path: Path) -> None:
    for wrong in ("sometimes", {"skip": -1}, {"leave": 2}):
        with pytest.raises(fz.RecipeError, match="not_finite"):
            fz.plan(recipe(Net(), not_finite=wrong), runs=tmp_path, probe=False)
    assert fz.plan(recipe(Net(), not_finite="stop"), runs=tmp_path, probe=False).plan.recipe.not_finite.skip == 0


def spoil(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """An update makes weights infinite, as one beyond all bounds would; loss and gradient of its step were finite."""
    honest, calls = loop.clip, 0

    def spoiling(job: Any, norm: Tensor) -> None:
        nonlocal calls
        calls += 1
        honest(job, norm)
        if calls == after:
            job.model.first.weight.data.fill_(float("inf"))

    monkeypatch.setattr(loop, "clip", spoiling)


@pytest.mark.parametrize("skip", [0, 50])
def test_weights_that_an_update_spoils_are_not_saved_and_the_last_good_ones_are_kept(
    skip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, after=10)
    keys = {"clip": 100.0, "evaluate": {"every": 100, "keep": "last"}, "not_finite": {"skip": skip}}
    with pytest.raises(fz.NumbersError, match=r"first\.weight is no finite number: 40 of its 40 values .* since step 10") as error:
        run(tmp_path, Net(), name="wild", **keys)
    assert str(error.value).startswith("step 11: ")
    assert sorted(p.name for p in (tmp_path / "wild" / "checkpoints").glob("step-*")) == ["step-4", "step-8"]
    weights = checkpoint.saved_weights(tmp_path / "wild" / "checkpoints")[1]  # type: ignore[index]
    kept = fz.load("run:wild", runs=tmp_path, model=Net()).state_dict()
    assert all(torch.equal(kept[n], tensor) for n, tensor in weights.items())
    assert json.loads((tmp_path / "wild" / "result.json").read_text())["kept_step"] == 8


def test_weights_that_the_last_update_spoils_are_not_kept_and_the_run_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, after=10)
    keys = {"clip": 100.0, "evaluate": {"keep": "last"}, "epochs": None, "steps": 10, "save": 100}
    with pytest.raises(fz.NumbersError, match=r"after step 10 first\.weight is no finite number: .*neither kept nor saved"):
        run(tmp_path, Net(), name="end", **keys)
    assert not (tmp_path / "end" / "model").exists() and not (tmp_path / "end" / "checkpoints").exists()
    assert json.loads((tmp_path / "end" / "result.json").read_text())["kept_step"] is None


def test_a_checkpoint_of_spoiled_weights_is_refused_and_the_older_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, after=8)
    with pytest.raises(fz.NumbersError, match=r"after step 8 first\.weight is no finite number"):
        run(tmp_path, Net(), name="save", clip=100.0, evaluate={"keep": "last"})
    assert [p.name for p in (tmp_path / "save" / "checkpoints").glob("step-*")] == ["step-4"]


@pytest.mark.parametrize("steps", [24, 6])
def test_an_optimizer_whose_state_is_no_number_ends_the_run_with_a_result_and_the_last_good_weights(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = loop.clip

    def spoiling(job: Any, norm: Tensor) -> None:
        honest(job, norm)
        for state in job.optimizer.state.values():  # from the second step on; what it updates stands still, and every loss is finite
            if state["step"] == 5:
                state["exp_avg_sq"].fill_(float("inf"))

    monkeypatch.setattr(loop, "clip", spoiling)
    with pytest.raises(fz.NumbersError, match=r"after step \d state\.0\.exp_avg_sq is no finite number"):
        run(tmp_path, Net(), name="state", clip=100.0, evaluate={"keep": "last"}, epochs=None, steps=steps)
    result = json.loads((tmp_path / "state" / "result.json").read_text())
    assert result["status"] == "stopped" and result["steps"] == min(steps, 8) and result["kept_step"] == 4
    weights = checkpoint.saved_weights(tmp_path / "state" / "checkpoints")[1]  # type: ignore[index]
    kept = fz.load("run:state", runs=tmp_path, model=Net()).state_dict()
    assert all(torch.equal(kept[n], tensor) for n, tensor in weights.items())


def test_the_best_weights_are_kept_where_the_last_ones_are_spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, after=15)
    with pytest.raises(fz.NumbersError):
        run(tmp_path, Net(), name="best", clip=100.0, save=100)
    kept = fz.load("run:best", runs=tmp_path, model=Net()).state_dict()
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert json.loads((tmp_path / "best" / "result.json").read_text())["kept_step"] in (6, 12)
    assert not (tmp_path / "best" / "model" / "final.safetensors").exists()


def test_weights_that_are_spoiled_while_the_loss_is_finite_are_never_the_best(tmp_path: Path) -> None:
    class Hidden(Net):
        """A parameter that the loss does not see becomes infinite."""

        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.spare.data.fill_(float("inf"))
            return super().forward(x)

    with pytest.raises(fz.NumbersError, match=r"after step 6 spare is no finite number: 3 of its 3 values"):
        run(tmp_path, Hidden(), name="hidden", save=100)
    assert not (tmp_path / "hidden" / "model").exists()


def test_a_mask_of_infinities_is_no_fault(tmp_path: Path) -> None:
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), -float("inf")).triu(1))

    outcome = run(tmp_path, Masked(), name="mask")
    assert torch.equal(fz.load("run:mask", runs=tmp_path, model=Masked()).mask, outcome.model.mask)


def test_a_sound_model_is_called_sound(tmp_path: Path) -> None:
    planned = fz.plan(recipe(Net()), runs=tmp_path, probe=False)
    job = assemble(planned.plan, planned.loaded, planned.place)
    set_training(job.model, job.frozen)
    assert _first_layer(job, torch.arange(8), 0, Before(job)) == "every layer gives finite numbers, the loss does not"
    assert not any(module._forward_hooks for module in job.model.modules()), "no hook is left behind"


def test_a_gradient_is_blamed_on_the_last_layer_that_has_a_wrong_one(tmp_path: Path) -> None:
    class Root(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.drop(self.norm(self.first(x[:, :5])))
            if self.training:
                hidden = hidden + (hidden * 0).abs().sqrt()  # its value is 0, its slope infinite
            return self.last(hidden)

    with pytest.raises(fz.NumbersError, match=r"the gradient's norm is nan; the first is that of norm\.weight"):
        run(tmp_path, Root())
