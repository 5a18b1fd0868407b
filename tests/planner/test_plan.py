"""Plans are values: pure in recipe and facts, through JSON and back, and readable in 80 columns."""

import json
from dataclasses import replace

import torch
from torch import nn

import fromzero as fz
from fromzero.planner.make import make
from fromzero.planner.show import show
from fromzero.planner.values import Record


def planned(**keys: object) -> fz.Planned:
    x, y = torch.randn(100, 4), torch.arange(100) % 3
    recipe = {"task": "classify", "model": nn.Sequential(nn.Linear(4, 3)), "data": {"train": (x, y)}, **keys}
    return fz.plan(recipe)


def test_a_plan_goes_through_json_and_comes_back_the_same() -> None:
    plan = planned().plan
    values = json.loads(json.dumps(plan.as_json()))
    assert fz.Plan.from_json(values, plan.recipe) == plan


def test_making_a_plan_is_pure_and_works_for_a_machine_that_is_not_here() -> None:
    plan = planned(batch="all").plan
    assert make(plan.recipe, plan.facts) == plan
    elsewhere = replace(plan.facts, machine=replace(plan.facts.machine, device="cuda", threads=64, memory_bytes=10**12, keeps_memory=False))
    there = make(plan.recipe, elsewhere)
    assert (there.device, there.threads, there.keep_memory, there.batch) == ("cuda", 64, False, plan.batch)


def test_the_geometry_of_a_run_is_counted_in_steps() -> None:
    plan = planned(batch=32, epochs=3).plan
    assert (plan.facts.data.train, plan.steps_per_epoch, plan.steps) == (91, 3, 9)
    assert planned(batch="all", epochs=5).plan.steps == 5
    assert planned(batch=1000, epochs=2).plan.batch == 91
    assert planned(steps=7).plan.steps == 7


def test_a_plan_reads_in_80_columns_with_a_reason_for_each_choice() -> None:
    found = planned()
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert all(choice.reason for choice in found.plan.choices) and len(found.plan.choices) == 5
    for word in ("read:", "model:", "loss:", "update:", "batch:", "device:", "length:", "equality: bitwise", "predicted:"):
        assert word in text


def test_the_last_line_says_between_what_the_prediction_lies() -> None:
    found = planned(steps=10).plan
    assert found.facts.measured is not None
    seen = replace(found.facts.measured, step_seconds=25.0, evaluate_seconds=0.0, sample_seconds=0.0, planning_bytes=14 * 10**10)

    def last(record: Record | None) -> str:
        text = show(make(found.recipe, replace(found.facts, measured=seen, record=record)))
        assert max(map(len, text.splitlines())) <= 80
        return " ".join(text.split("predicted: ")[1].split("memory: ")[0].split())

    assert last(None) == "4 min 10 s, peak memory 140 GB"
    assert last(Record(9, 1.0, 0.88, 1.2, 9, 1.0, 0.93, 1.07)) == "4 min 10 s (3 min 40 s to 5 min 0 s), peak memory 140 GB (130 to 150 GB)"
    assert last(Record(9, 0.1, 0.01, 2.0, 9, 1.0, 1.0, 1.0)) == "25 s (2.5 s to 8 min 20 s), peak memory 140 GB"
    assert last(Record(9, 0.1, 0.08, 0.12, 9, 0.5, 0.5, 1.0)) == "25 s (20 to 30 s), peak memory 70.0 GB (70.0 to 140 GB)"
