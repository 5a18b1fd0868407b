"""Memory runs out: foreseen when planning; else one message that says what fits, and the last checkpoint is as it was."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero import cli
from fromzero.report.events import Event
from fromzero.runner import again, checkpoint

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


class Wide(nn.Module):
    """What a sample keeps in memory is far more than its weights.  p: of draws that belong to no sample, so that a batch may not be cut"""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv1d(1, 32, 3, padding=1), nn.Tanh(), nn.Conv1d(32, 4, 3, padding=1), nn.AlphaDropout(p))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None]).mean(2))


def recipe(p: float = 0.0, *, width: int = 40, **keys: Any) -> dict[str, Any]:
    x = torch.rand(60, width, generator=torch.Generator().manual_seed(0))
    data = {"train": (x, x[:, :3].argmax(1)), "hold_out": 0.5}
    limits = {"threads": 1, **keys.pop("limits", {})}
    return {"task": "classify", "model": Wide(p), "data": data, "batch": 4, "epochs": 2, "report": (), "limits": limits, **keys}


def test_what_cannot_fit_is_refused_when_planning_with_what_would(tmp_path: Path) -> None:
    held = fz.plan(recipe(0.5, width=4000), probe=False).plan.facts.held_bytes
    planned = fz.plan(recipe(0.5, width=4000, batch=30, limits={"memory": held + 2e6}), runs=tmp_path, probe=False)
    with pytest.raises(fz.PlanRefused, match=r"a batch of 30 needs about .*, the limit is .*; it may not be cut: .*raise limits.memory to"):
        fz.run(planned, quiet=True)
    assert not list(tmp_path.iterdir())


def test_where_nothing_smaller_is_left_the_message_says_what_to_halve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(again, "gradients", never)
    with pytest.raises(fz.NumbersError, match=r"a batch of 4 may not be cut: .*dropout.*; free some, or take batch: 2") as error:
        fz.run(fz.plan(recipe(0.5), runs=tmp_path, probe=False), quiet=True)
    assert error.value.code == 3
    with pytest.raises(fz.NumbersError, match=r"one sample at a time\); free some, or take a smaller model"):
        fz.run(fz.plan(recipe(), runs=tmp_path, probe=False), quiet=True)
    model = {"from": "decoder", "width": 16, "layers": 1, "heads": 2}
    data = {"train": ["seven boats wait in the harbour for the tide"] * 8, "tokenizer": "characters", "max_tokens": 20, "hold_out": 0}
    keys = {"task": "language", "model": model, "data": data, "batch": 1, "report": (), "limits": {"threads": 1}}
    with pytest.raises(fz.NumbersError, match=r"one sample at a time, of \d+ tokens\); free some, or take data.max_tokens: \d+, or"):
        fz.run(fz.plan(keys, runs=tmp_path, probe=False), quiet=True)


def test_an_update_that_runs_out_is_not_saved_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = torch.optim.AdamW.step, 0

    def half(self: Any, closure: Any = None) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError(NO_MEMORY)
        return honest(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    keys = {"name": "half", "save": 2, "evaluate": {"keep": "last"}}
    with pytest.raises(
        fz.NumbersError, match=r"memory is out after step 5 of 16, .*last checkpoint is as it was; free some, then fromzero resume"
    ):
        fz.run(fz.plan(recipe(**keys), runs=tmp_path, probe=False), quiet=True)
    step, weights = checkpoint.saved_weights(tmp_path / "half" / "checkpoints")  # type: ignore[misc]
    kept = fz.load("run:half", runs=tmp_path, model=Wide()).state_dict()
    assert step == 4 and all(torch.equal(kept[name], tensor) for name, tensor in weights.items())
    resumed = fz.resume("half", runs=tmp_path, model=Wide(), data=recipe()["data"]["train"], quiet=True)
    whole = fz.run(fz.plan(recipe(**keys) | {"name": "whole"}, runs=tmp_path, probe=False), quiet=True)
    assert all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in resumed.model.state_dict().items())


def test_an_evaluation_for_which_memory_truly_runs_out_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    """The address space is limited once a checkpoint is there, as by another user of the machine."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_memory import recipe
import fromzero as fz
from fromzero.report.events import Saved

def hear(event):
    if isinstance(event, Saved):
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 30_000_000, -1))

planned = fz.plan(recipe(width=40000, name="tight", save=2), runs={str(tmp_path)!r}, probe=False)
try:
    fz.run(planned, observers=[hear], quiet=True)
except fz.FromzeroError as error:
    print(error.code, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.startswith("3 memory is out after step 8 of 16"), done.stdout
    step, skipped = checkpoint.find(tmp_path / "tight" / "checkpoints")
    assert step is not None and step.name == "step-6" and not skipped
    data = recipe(width=40000)["data"]["train"]
    assert fz.resume("tight", runs=tmp_path, model=Wide(), data=data, quiet=True).result["status"] == "done"


@pytest.mark.parametrize("error", [RuntimeError(NO_MEMORY), MemoryError(), OSError(12, "Cannot allocate memory")])
def test_the_shell_says_it_in_one_line_wherever_it_happens(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Event:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli._answer(work, False, False, str)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said == "this machine's memory is full; set limits.memory or a smaller batch\n"


def test_another_error_of_the_shell_is_still_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Event:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(SystemExit) as ended:
        cli._answer(work, False, False, str)
    assert ended.value.code == 1 and "this is a bug in fromzero" in capsys.readouterr().err
