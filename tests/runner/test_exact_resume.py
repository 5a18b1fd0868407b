"""A run that is broken off at any instant, any number of times, ends in the bits of an unbroken one: weights, optimizer, figures, log."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero.devices import generators
from fromzero.planner import cut
from fromzero.report.events import Evaluated, Event, Finished, Sampled, Saving, Started, StepDone, Warned
from fromzero.report.jsonlines import EVENTS, read_events
from fromzero.runner import begun as begun_room
from fromzero.runner import checkpoint, prefix

TINY = {"width": 16, "layers": 3, "heads": 2}
OFTEN = {"save": {"every": 2, "keep": 2}, "steps": 10, "limits": {"threads": 1}}  # 2.5 epochs; every save falls on an evaluation


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    """The benchmark, whose judge is used here too"""
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).resolve().parents[2] / "benchmarks" / "kill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prefix, "LEAST_SECONDS", 1e9)
    monkeypatch.setattr(cut, "LOST_SECONDS", 1e9)  # a busy machine decides nothing here


def numbers(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    y = torch.arange(count) % 3
    return torch.randn(count, *shape, generator=draw) + y.reshape(-1, *(1 for _ in shape)), y


def of_cnn(folder: Path) -> dict[str, Any]:
    model = {"from": "cnn", "channels": [4, 8], "dropout": 0.3, "batch_norm": True}
    data = {"train": numbers(80, 1, 8, 8), "augment": "light", "hold_out": 0.2}
    return {"task": "classify", "model": model, "data": data, "batch": 16, "schedule": {"name": "one_cycle"}, "evaluate": {"every": 2}}


def of_mlp(folder: Path) -> dict[str, Any]:
    model = {"from": "mlp", "hidden": [8], "dropout": 0.2}
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    return {
        "task": "classify",
        "model": model,
        "data": numbers(80, 4),
        "optimizer": sgd,
        "batch": 18,
        "clip": 1.0,
        "evaluate": {"every": 4},
    }


def of_encoder(folder: Path) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    words = (["rain", "sun", "wind", "cloud"], ["bread", "soup", "apple", "rice"])
    lines = ["text,topic"]
    for i in range(40):
        picks = torch.randint(4, (2 + i % 9,), generator=draw).tolist()
        lines.append(f"there was {' and '.join(words[i % 2][p] for p in picks)} number {i},{'food' if i % 2 else 'weather'}")
    (folder / "topics.csv").write_text("\n".join(lines) + "\n")
    data = {"train": str(folder / "topics.csv"), "hold_out": 0.2, "tokenizer": "bpe", "vocabulary": 300}
    model = {"from": "encoder", **TINY, "dropout": 0.1}
    return {"task": "classify", "model": model, "data": data, "freeze": {"through": "blocks.0"}, "batch": 8, "evaluate": {"every": 2}}


def of_decoder(folder: Path) -> dict[str, Any]:
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    data = {"train": str(folder / "corpus.txt"), "tokenizer": "characters", "max_tokens": 16, "hold_out": 0.2}
    base = {"name": "base", "task": "language", "model": {"from": "decoder", **TINY, "context": 16}, "data": data, "batch": 20}
    if not (folder / "bases").exists():
        fz.run(fz.plan(base | {"steps": 2, "limits": {"threads": 1}}, runs=folder / "bases", probe=False), quiet=True)
    adapter = {"name": "lora", "rank": 2, "alpha": 4, "targets": "all-linear"}
    changed = {"model": str(folder / "bases" / "base"), "adapter": adapter, "optimizer": {"lr": 1e-2}}
    return base | changed | {"evaluate": {"every": 4, "samples": 1}}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"cnn": of_cnn, "mlp": of_mlp, "encoder": of_encoder, "decoder": of_decoder}


def planned(case: str, folder: Path, **keys: Any) -> fz.Planned:
    found = fz.plan({**CASES[case](folder), **OFTEN, "name": "r", "report": (), **keys}, runs=folder, probe=False)
    assert bool(found.plan.prefix) == (case == "encoder")
    return found


def run(made: fz.Planned, runs: Path, *observers: Callable[[Event], None]) -> fz.Outcome:
    """One plan for all runs that are compared: the next one would find other memory in use."""
    return fz.run(replace(made, place=replace(made.place, runs=runs)), observers=observers, quiet=True)


def go_on(case: str, folder: Path, runs: Path, *observers: Callable[[Event], None]) -> fz.Outcome:
    given = CASES[case](folder)["data"]
    given = given["train"] if isinstance(given, dict) else given
    return fz.resume("r", runs=runs, data=None if isinstance(given, str) else given, observers=observers, quiet=True)


def rows(runs: Path) -> int:
    with sqlite3.connect(runs / "ledger.sqlite") as ledger:
        return int(ledger.execute("SELECT count(*) FROM runs").fetchone()[0])


@pytest.mark.parametrize("one_in", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_whenever_it_is_killed_it_goes_on_to_the_bits_of_the_unbroken_run(
    case: str, one_in: int, kill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the folder at an instant is what a kill leaves: at every event of a run, and between a checkpoint's rename and the word of it."""
    whole, instants = tmp_path / "whole" / "r", list[Path]()

    def copy(event: Event | None = None) -> None:
        if whole.exists() and (event is None or isinstance(event, (StepDone, Evaluated, Sampled, Saving, Finished))):
            instants.append(tmp_path / f"{len(instants):02}-{type(event).__name__}-{getattr(event, 'step', '')}")
            shutil.copytree(whole, instants[-1] / "r", ignore=shutil.ignore_patterns("lock"))

    rename = os.rename

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        copy()

    monkeypatch.setattr(checkpoint.os, "rename", renamed)
    run(planned(case, tmp_path), whole.parent, copy)
    monkeypatch.undo()
    monkeypatch.setattr(prefix, "LEAST_SECONDS", 1e9)
    monkeypatch.setattr(cut, "LOST_SECONDS", 1e9)
    assert len(instants) >= 10 + 5 + 2 + 5  # steps, saves, evaluations, renames
    for runs in (*instants[:-1:one_in], instants[-1]):  # always the end, too
        go_on(case, tmp_path, runs)
        assert kill.differences(runs / "r", whole) == [], runs.name
        assert rows(runs) == 1


@pytest.mark.parametrize("case", CASES)
def test_stopped_after_every_single_step_it_ends_in_the_bits_of_the_unbroken_run(case: str, kill: ModuleType, tmp_path: Path) -> None:
    """Ten stops in one run: twice within an epoch, at its exact end, and again and again."""
    made = planned(case, tmp_path, save={"every": 1, "keep": 2})
    whole = run(made, tmp_path / "a")
    heard: list[Event] = []

    def stop(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepDone):
            os.kill(os.getpid(), signal.SIGINT)

    stops = 0
    for step in range(1, 11):
        try:
            outcome = run(made, tmp_path / "b", stop) if step == 1 else go_on(case, tmp_path, tmp_path / "b", stop)
        except fz.Interrupted as error:
            assert f"stopped after step {step} of 10, saved" in str(error) and error.code == 130
            stops += 1
    assert stops == 9 and kill.differences(tmp_path / "b" / "r", tmp_path / "a" / "r") == []
    assert all(torch.equal(tensor, outcome.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
    assert [event.step for event in heard if isinstance(event, StepDone)] == list(range(1, 11))
    assert rows(tmp_path / "b") == 1


class Draws(nn.Module):
    """Noise from every generator that a person's own code may draw from, in training and in evaluation"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        noise = random.gauss(0, 0.1) + float(np.random.randn()) * 0.1  # of a pair of which the second is drawn at the next call
        return self.layer(x + noise + torch.randn(x.shape) * 0.1)


NOISY_LOSS = """
import random, numpy, torch
def noisy(outputs, targets):
    loss = torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")
    return loss * (1 + random.random() * numpy.random.rand()), torch.tensor(len(targets))
"""


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_what_own_code_draws_from_torch_python_and_numpy_goes_on_where_it_stood(stop_at: int, kill: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(NOISY_LOSS)
    data = numbers(80, 4)
    keys = {"name": "r", "task": "classify", "model": Draws(), "loss": f"{tmp_path}/loss.py:noisy", "data": data, "batch": 18, "report": ()}
    made = fz.plan({**keys, **OFTEN, "evaluate": {"every": 3}}, runs=tmp_path, probe=False)
    heard: dict[str, dict[int, float]] = {"a": {}, "b": {}}

    def observer(side: str, stop_at: int = 0) -> Callable[[Event], None]:
        def draw(event: Event) -> None:
            if isinstance(event, StepDone):
                heard[side][event.step] = random.random() + np.random.rand()
                if event.step == stop_at:
                    raise KeyboardInterrupt

        return draw

    outside = generators.note()
    run(made, tmp_path / "a", observer("a"))
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "b", observer("b", stop_at))
    fz.resume("r", runs=tmp_path / "b", model=Draws(), data=data, observers=[observer("b")], quiet=True)
    assert kill.differences(tmp_path / "b" / "r", tmp_path / "a" / "r") == []
    ends = [json.loads((tmp_path / side / "r" / "checkpoints" / "step-10" / "progress.json").read_text())["random"] for side in "ab"]
    assert ends[0] == ends[1] and set(ends[0]) == {"python", "numpy"}
    assert heard["a"] == heard["b"] and len(heard["a"]) == 10, "observers draw too"
    assert repr(generators.note()) == repr(outside), "nothing of it shows outside of a run"


def test_a_run_that_stops_for_want_of_gain_does_so_at_the_same_step_when_it_was_broken_off_there(kill: ModuleType, tmp_path: Path) -> None:
    keys = {"evaluate": {"every": 2, "stop_after": 2}, "steps": 400, "optimizer": {"name": "sgd", "lr": 30.0}}
    made = planned("mlp", tmp_path, **keys)
    run(made, tmp_path / "a")
    last = kill.steps_of(tmp_path / "a" / "r")[-1]["step"]
    assert 4 < last < 200

    def stop(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step >= last - 2:
            raise KeyboardInterrupt  # after the evaluation and before its checkpoint

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            if (tmp_path / "b").exists():
                go_on("mlp", tmp_path, tmp_path / "b", stop)
            else:
                run(made, tmp_path / "b", stop)
    go_on("mlp", tmp_path, tmp_path / "b")
    assert kill.differences(tmp_path / "b" / "r", tmp_path / "a" / "r") == []


def test_seconds_are_counted_over_restarts_and_the_unmoved_are_warned_of_once(tmp_path: Path) -> None:
    heard: list[Event] = []
    seconds = list[float]()

    def stop(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepDone) and event.step in (2, 6):
            os.kill(os.getpid(), signal.SIGTERM)

    keys = {"optimizer": {"name": "sgd", "lr": 1e-30}}
    for attempt in range(3):
        try:
            outcome = go_on("mlp", tmp_path, tmp_path, stop) if attempt else run(planned("mlp", tmp_path, **keys), tmp_path, stop)
            seconds.append(outcome.result["seconds"])
        except fz.Interrupted as error:
            assert error.code == 143
            ends = [e for e in read_events(tmp_path / "r" / EVENTS) if e["event"] == "Finished"]
            seconds.append(ends[-1]["seconds"])
    assert len(seconds) == 3 and seconds[0] < seconds[1] < seconds[2]
    said = [event.what for event in heard if isinstance(event, Warned)]
    assert [what.partition(" tensors")[0] for what in said] == ["4 of 4"], "compared with the first weights, at step 3 alone"


SEEN: list[int] = []  # a run trains a copy of the module that it was given


class Remembers(nn.Module):
    """Notes which examples it is trained on: their number is their first value"""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls, self.stop_at = nn.Linear(4, 3), 0, stop_at

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            SEEN.extend(x[:, 0].int().tolist())
            self.calls += 1
            if self.calls == self.stop_at:
                os.kill(os.getpid(), signal.SIGINT)
        return self.layer(x / 100)


@pytest.mark.parametrize("stop_at", [4, 5, 6])  # pieces of the second step
def test_a_stop_between_the_pieces_of_a_batch_waits_for_its_step_and_other_pieces_keep_the_order(tmp_path: Path, stop_at: int) -> None:
    x, y = torch.rand(40, 4), torch.arange(40) % 3
    x[:, 0] = torch.arange(40)

    def recipe(model: nn.Module, micro_batch: int) -> dict[str, Any]:
        limits = {"threads": 1, "micro_batch": micro_batch}
        data = {"train": (x, y), "hold_out": 0.1}
        return {"name": "r", "task": "classify", "model": model, "data": data, "batch": 12, "epochs": 3, "limits": limits, "report": ()}

    def forget_planning(event: Event) -> None:
        if isinstance(event, Started):
            del SEEN[24:]

    def order(runs: Path, stop_at: int | None) -> list[int]:
        made = fz.plan(recipe(Remembers(stop_at), 5), runs=runs, probe=False)
        assert (made.plan.micro_batch, made.plan.steps, made.plan.facts.data.train) == (5, 12, 37)
        SEEN.clear()
        try:
            fz.run(made, quiet=True)
        except fz.Interrupted as error:
            assert "stopped after step 2 of 12, saved" in str(error)
            assert len(SEEN) == 24, "the whole second batch"
            written = runs / "r" / "recipe.yaml"
            written.write_text(written.read_text().replace("micro_batch: 5", "micro_batch: 3"))
            fz.resume("r", runs=runs, model=Remembers(), data=(x, y), observers=[forget_planning], quiet=True)
        return list(SEEN)

    whole, broken = order(tmp_path / "a", None), order(tmp_path / "b", stop_at)
    assert len(whole) == 3 * 37 and whole == broken


def test_a_run_killed_before_its_first_checkpoint_begins_anew_and_says_each_step_once(kill: ModuleType, tmp_path: Path) -> None:
    made = planned("mlp", tmp_path, save={"every": 10})
    run(made, tmp_path / "a")

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "b", stop)
    assert not (tmp_path / "b" / "r" / "checkpoints").exists() and len(kill.steps_of(tmp_path / "b" / "r")) == 7
    go_on("mlp", tmp_path, tmp_path / "b")
    assert kill.differences(tmp_path / "b" / "r", tmp_path / "a" / "r") == []


def test_weights_of_the_last_step_left_by_a_stop_do_not_stay_beside_the_kept_ones(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(fz.Interrupted):
        run(planned("cnn", tmp_path), tmp_path, stop)
    assert (tmp_path / "r" / "model" / "final.safetensors").exists()
    outcome = go_on("cnn", tmp_path, tmp_path)
    older = outcome.result["kept_step"] < 10
    assert (tmp_path / "r" / "model" / "final.safetensors").exists() == older


def test_a_signal_ends_the_pass_through_the_frozen_part_after_the_batch_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, reads_at = 0, prefix.reads_at

    def counted(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # three for what is compared before; then the training texts, and the validation texts
            os.kill(os.getpid(), signal.SIGINT)
        return reads_at(*given)

    monkeypatch.setattr(prefix, "reads_at", counted)
    with pytest.raises(
        fz.Interrupted, match="stopped before step 1 of 10, nothing new was to be saved; fromzero resume r goes on"
    ) as caught:
        run(planned("encoder", tmp_path), tmp_path)
    assert calls == 4 and caught.value.code == 130


def test_a_folder_is_a_run_only_when_all_that_resume_needs_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = begun_room.write_whole
    for left in range(3):
        count = 0

        def write(path: Path, data: bytes, left: int = left) -> None:
            nonlocal count
            count += 1
            if count > left:
                raise KeyboardInterrupt
            whole(path, data)

        monkeypatch.setattr(begun_room, "write_whole", write)
        made = planned("mlp", tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / str(left))
        with pytest.raises(fz.SourceError, match="there is no run 'r'"):
            go_on("mlp", tmp_path, tmp_path / str(left))


def test_a_run_goes_on_with_the_threads_and_the_room_that_it_was_planned_for(tmp_path: Path) -> None:
    made = planned("mlp", tmp_path).plan
    noted, facts = made.as_json()["facts"], replace(made.facts, machine=replace(made.facts.machine, threads=2))
    noted["machine"]["threads"] = 2
    larger = replace(facts, machine=replace(facts.machine, threads=64, memory_bytes=1, host_bytes=1, disk_bytes=1))
    smaller = replace(facts, machine=replace(facts.machine, threads=1))
    assert larger.with_noted(noted).machine == facts.machine
    assert smaller.with_noted(noted).machine.threads == 1, "more than there are would wait for each other"


def test_the_judge_of_this_file_sees_a_changed_value_a_missing_line_and_a_second_end(kill: ModuleType, tmp_path: Path) -> None:
    run(planned("mlp", tmp_path), tmp_path / "a")
    for number, spoil in enumerate((_flip, _drop, _end_twice, _other_result)):
        broken = tmp_path / str(number) / "r"
        shutil.copytree(tmp_path / "a" / "r", broken)
        assert kill.differences(broken, tmp_path / "a" / "r") == []
        spoil(broken)
        assert len(kill.differences(broken, tmp_path / "a" / "r")) == 1, spoil.__name__


def _flip(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _drop(folder: Path) -> None:
    lines = (folder / EVENTS).read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(lines) if '"StepDone"' in line)
    (folder / EVENTS).write_text("".join(lines[:gone] + lines[gone + 1 :]))


def _end_twice(folder: Path) -> None:
    lines = (folder / EVENTS).read_text().splitlines(keepends=True)
    (folder / EVENTS).write_text("".join([*lines, lines[-1]]))


def _other_result(folder: Path) -> None:
    path = folder / "result.json"
    path.write_text(path.read_text().replace('"kept_step": ', '"kept_step": 1'))


@pytest.mark.slow
def test_the_benchmark_kills_and_finds_the_same_bits(kill: ModuleType, tmp_path: Path, asset: Callable[[str], Path]) -> None:
    asset("mnist-5k")
    command = [sys.executable, kill.__file__, "none", "--only", "cnn", "--kills", "4", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("survived")[1].split()[0]) == 4
