"""Memory: where it runs out in spite of the plan the step begins anew with less at once; what the limits say is kept to."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero.planner.make import make
from fromzero.report.events import StepDone, Warned
from fromzero.runner import again

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


class Wide(nn.Module):
    """What a sample keeps in memory is far more than its weights.  p: of dropout whose draws belong to no sample, beside some that do"""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(1, 64, 3, padding=1), nn.Tanh(), nn.Conv1d(64, 8, 3, padding=1))
        self.second = nn.Sequential(nn.Conv1d(8, 64, 3, padding=1), nn.AlphaDropout(p), nn.Tanh(), nn.Conv1d(64, 8, 3, padding=1))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 3))

    @property
    def stages(self) -> tuple[str, ...]:
        return "first", "second", "head"

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x[:, None])).mean(2))


def recipe(p: float = 0.0, *, width: int = 40, **keys: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.rand(100, width, generator=torch.Generator().manual_seed(0))
    return {"task": "classify", "model": Wide(p), "data": {"train": (x, x[:, :3].argmax(1))}, "batch": 30, "epochs": 2, "seed": 3, **keys}


def trained(planned: fz.Planned) -> tuple[list[float], list[str], dict[str, Any]]:
    losses: list[float] = []
    said: list[str] = []

    def hear(event: object) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
        if isinstance(event, Warned):
            said.append(event.what)

    return losses, said, fz.run(planned, observers=[hear], quiet=True).result


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_step_that_runs_out_of_memory_begins_anew_with_less_and_the_losses_stay(
    p: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, quiet, _ = trained(fz.plan(recipe(p), runs=tmp_path, probe=False))
    honest = again.gradients

    def tight(model: nn.Module, pieces: Any, *given: Any, **named: Any) -> Any:
        """Memory for 10 samples, or for any number of a stage whose results are not kept"""
        torch.rand(5)  # draws are begun anew too
        if any(len(piece()[1]) > 10 for piece in pieces) and not hasattr(model.first, "__wrapped__") and "forward" not in vars(model.first):
            raise RuntimeError(NO_MEMORY)
        return honest(model, pieces, *given, **named)

    monkeypatch.setattr(again, "gradients", tight)
    tight_losses, said, _ = trained(fz.plan(recipe(p), runs=tmp_path, probe=False))
    assert not quiet and len(said) == (1 if p else 2)
    assert ("2 stages keep only their input" if p else "pieces of 7 samples") in said[-1]
    if p == 0.0:
        assert torch.allclose(torch.tensor(plain), torch.tensor(tight_losses), rtol=1e-6)


def test_compiled_code_that_fails_in_the_run_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = fz.plan(recipe(), runs=tmp_path, probe=False)
    plain, _, _ = trained(planned)

    def fails(*_: Any, **__: Any) -> Any:
        raise NameError("name 's52' is not defined")

    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", fails))
    losses, said, _ = trained(replace(planned, plan=replace(planned.plan, compiled=True)))
    assert losses == plain and said == ["compiled code fails (NameError: name 's52' is not defined); it is not compiled from here on"]
    asked = fz.plan(recipe(limits={"compile": "always"}), runs=tmp_path)
    assert not asked.plan.compiled and "it fails: NameError: name 's52'" in " ".join(str(asked).replace("│", "").split())


def test_other_errors_and_a_single_sample_that_does_not_fit_end_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(again, "gradients", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        fz.run(fz.plan(recipe(), runs=tmp_path, probe=False), quiet=True)

    def never(*_: Any, **__: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(again, "gradients", never)
    with pytest.raises(fz.NumbersError, match="memory is out; nothing smaller is left"):
        fz.run(fz.plan(recipe(), runs=tmp_path, probe=False), quiet=True)


def limited(planned: fz.Planned, to: float) -> fz.Planned:
    recipe = planned.plan.recipe
    limits = recipe.limits.model_copy(update={"memory": to})
    return replace(planned, plan=make(recipe.model_copy(update={"limits": limits}), planned.plan.facts))


def test_half_the_memory_gives_the_same_losses(tmp_path: Path) -> None:
    free = fz.plan(recipe(width=400), runs=tmp_path, probe=False)
    short = limited(free, free.plan.predicted_peak_bytes - free.plan.memory["activations"] / 2)
    assert short.plan.micro_batch < 30 and short.plan.grade == "reordered" and not short.plan.checkpointed
    assert short.plan.predicted_peak_bytes <= short.plan.recipe.limits.memory
    assert torch.allclose(torch.tensor(trained(free)[0]), torch.tensor(trained(short)[0]), rtol=1e-6)


def test_half_the_memory_runs_stages_again_where_a_batch_may_not_be_cut_and_the_losses_are_bitwise_the_same(tmp_path: Path) -> None:
    free = fz.plan(recipe(0.5, width=400), runs=tmp_path, probe=False)
    short = limited(free, free.plan.predicted_peak_bytes - free.plan.memory["activations"] / 3)
    assert short.plan.micro_batch == 30 and short.plan.checkpointed and "checkpointing:" in str(short)
    assert trained(short)[0] == trained(free)[0]


def test_what_nothing_fits_is_refused_with_the_batch_and_the_amount_that_would() -> None:
    free = fz.plan(recipe(0.5, width=400), probe=False).plan
    tight = free.recipe.model_copy(update={"limits": free.recipe.limits.model_copy(update={"memory": free.facts.held_bytes + 2e6})})
    (error,) = [finding for finding in make(tight, free.facts).findings if finding.severity == "error"]
    assert "activations" in error.what and "may not be cut" in error.why and "raise limits.memory to" in error.mend
    batch = int(error.mend.rpartition("set batch: ")[2])
    assert 1 <= batch < 30
    fits = tight.model_copy(update={"batch": batch})
    assert not [finding for finding in make(fits, free.facts).findings if finding.severity == "error"]
    needed = error.mend.removeprefix("raise limits.memory to ").partition("MB")[0]
    enough = tight.limits.model_copy(update={"memory": float(needed) * 1e6})
    assert not [f for f in make(tight.model_copy(update={"limits": enough}), free.facts).findings if f.severity == "error"]


def test_a_batch_for_which_memory_truly_runs_out_is_cut(tmp_path: Path) -> None:
    """The address space is limited once the plan is made, as by another user of the machine."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_again import recipe
import fromzero as fz
from fromzero.report.events import Started, StepDone, Warned

def hear(event):
    if isinstance(event, Started):
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 220_000_000, -1))
    if isinstance(event, (StepDone, Warned)):
        print(type(event).__name__, getattr(event, "what", ""), flush=True)

keys = recipe(width=20000, limits={{"threads": 1}}, steps=2) | {{"epochs": None}}
planned = fz.plan(keys, runs={str(tmp_path)!r}, probe=False)
assert planned.plan.memory["activations"] > 300_000_000, planned.plan.memory
fz.run(planned, observers=[hear], quiet=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warned memory ran out: pieces of" in done.stdout and done.stdout.count("StepDone") == 2
