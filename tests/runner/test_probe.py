"""Trial steps are steps as the run has them, cost a share of the run, and time the way to a cut as the pass goes it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fromzero as fz
from fromzero.data import TextExamples, epoch_order
from fromzero.runner import prefix, probe

TINY = {"from": "encoder", "width": 16, "layers": 1, "heads": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    table = tmp_path / "words.csv"
    lines = [f"{' '.join(['rain' if i % 2 else 'bread'] * (1 + i % 13))} number {i},{i % 2}" for i in range(96)]
    table.write_text("\n".join(["text,topic", *lines]) + "\n")
    data = {"train": str(table), "input": "text", "target": "topic", "hold_out": 0.25, "tokenizer": "bpe", "vocabulary": 300}
    return {"task": "classify", "model": TINY, "data": data, "batch": 8, "steps": 12, "certificate": "off", "limits": {"threads": 1}}


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The examples of each trial step"""
    honest, seen = probe._share, list[Tensor]()

    def share(job: Any, index: Tensor) -> float:
        seen.append(index)
        return honest(job, index)

    monkeypatch.setattr(probe, "_share", share)
    return seen


def test_the_first_trial_steps_take_one_batch_and_the_others_those_of_an_epoch(
    recipe: dict[str, Any], stepped: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MOST_STEPS", probe.LEAST_STEPS + 9)
    monkeypatch.setattr(probe, "ENOUGH_SECONDS", math.inf)
    monkeypatch.setattr(probe, "MOST_SECONDS", 1e9)
    planned = fz.plan(recipe, runs=tmp_path)
    first, others = stepped[: probe.LEAST_STEPS], stepped[probe.LEAST_STEPS :]
    assert all(torch.equal(index, first[0]) for index in first) and len(others) == 9
    epoch = epoch_order(0, 0, 72).split(8)
    assert [index.tolist() for index in others] == [epoch[(probe.LEAST_STEPS + step) % 9].tolist() for step in range(9)]
    measured = planned.plan.facts.measured
    assert measured is not None and len(measured.losses) == probe.LEAST_STEPS


def test_trial_steps_cost_a_share_of_the_run_that_is_asked_for(
    recipe: dict[str, Any], stepped: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ENOUGH_SECONDS", math.inf)
    monkeypatch.setattr(probe, "MOST_SECONDS", 0.0)
    fz.plan(recipe, runs=tmp_path)
    assert len(stepped) == probe.LEAST_STEPS, "a twentieth of twelve steps is less than one: the least are taken"


def test_the_certificate_does_not_depend_on_how_many_trial_steps_there_was_time_for(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ENOUGH_SECONDS", math.inf)
    monkeypatch.setattr(probe, "MOST_SECONDS", 1e9)
    found = []
    for most in (probe.LEAST_STEPS, probe.LEAST_STEPS + 13):
        monkeypatch.setattr(probe, "MOST_STEPS", most)
        certificate = fz.plan({**recipe, "certificate": "on"}, runs=tmp_path).plan.facts.measured.certificate  # type: ignore[union-attr]
        assert certificate is not None and certificate.error > 0
        found.append((certificate.error, certificate.tensor, certificate.loss_error))
    assert found[0] == found[1]


def test_a_later_trial_step_whose_loss_is_no_number_leaves_no_certificate_out(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = probe._steps

    def steps(*given: Any) -> probe.Trial:
        trial = honest(*given)
        trial.losses.append(math.nan)
        return trial

    monkeypatch.setattr(probe, "_steps", steps)
    measured = fz.plan({**recipe, "certificate": "on"}, runs=tmp_path).plan.facts.measured
    assert measured is not None and measured.certificate is not None


def test_a_step_of_another_size_counts_as_one_of_mean_size() -> None:
    lengths = torch.tensor([10, 10, 10, 10, 30, 30, 30, 30])
    train = TextExamples(torch.zeros(160, dtype=torch.int32), lengths.cumsum(0) - lengths, lengths, torch.zeros(8, dtype=torch.int64))
    job: Any = SimpleNamespace(train=train, plan=SimpleNamespace(steps_per_epoch=4))
    assert probe._share(job, torch.tensor([0, 1])) == 2.0 and probe._share(job, torch.tensor([4, 5])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("count", [3000, 40])
def test_texts_whose_way_to_the_cut_is_timed_stand_side_by_side_in_the_pass(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "PASS_TOKENS", 256)
    lengths = torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(1))
    train = TextExamples(torch.zeros(int(lengths.sum())), lengths.cumsum(0) - lengths, lengths, torch.zeros(count))
    job: Any = SimpleNamespace(train=train, judge=SimpleNamespace(batch=256))
    index = prefix.side_by_side(job, 4)
    taken, ordered = lengths[index], lengths[: int((lengths.cumsum(0) <= prefix.BLOCK_TOKENS).sum())].sort().values
    assert torch.equal(taken, taken.sort().values) and len(set(index.tolist())) == len(index)
    if count == 40:
        assert len(index) >= 8 and int(taken.sum()) <= 4 * 256
        return
    assert 4 * 256 * 0.7 < int(taken.sum()) <= 4 * 256
    assert int(taken[0]) < ordered.float().quantile(0.35) and int(taken[-1]) > ordered.float().quantile(0.65), "from all over"
