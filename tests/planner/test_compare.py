"""Two plans side by side: only what differs, in 80 columns."""

from dataclasses import asdict, replace

import numpy as np
import pytest

import fromzero as fz
from fromzero.planner.compare import Difference, differences, show_differences
from fromzero.planner.make import make
from fromzero.planner.values import Facts, Plan
from fromzero.recipe.read import from_values


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    np.savez(folder / "d.npz", x=draw.normal(size=(100, 4)).astype("float32"), y=np.arange(100) % 3)
    return fz.plan(keys(data=str(folder / "d.npz")), runs=folder).plan.facts


def keys(**more: object) -> dict[str, object]:
    return {"task": "classify", "model": "mlp", "data": "d.npz", "epochs": 3, **more}


def made(facts: Facts, **more: object) -> Plan:
    return make(from_values(keys(**more)), facts)


def rows(this: Plan, other: Plan) -> dict[tuple[str, str], tuple[object, object]]:
    return {(row.group, row.name): (row.this, row.other) for row in differences(this, other)}


def test_plans_are_the_same_whatever_the_runs_are_called_and_however_long_the_trial_steps_took(facts: Facts) -> None:
    assert facts.measured is not None
    slower = replace(facts, measured=replace(facts.measured, step_seconds=9.0, planning_bytes=10**9))
    this, other = made(facts, name="a", batch=64), made(slower, name="b")
    assert this.predicted_seconds != other.predicted_seconds
    assert differences(this, other) == ()
    assert show_differences(this, other, ("a.yaml", "b.yaml")) == "the plans are the same: a.yaml and b.yaml"


def test_only_what_differs_is_listed_the_recipe_first_and_predictions_last(facts: Facts) -> None:
    assert facts.measured is not None
    facts = replace(facts, measured=replace(facts.measured, planning_bytes=10**12))  # the peak of both, whatever this process holds
    this = made(facts, batch=32)
    other = made(replace(facts, measured=replace(facts.measured, step_seconds=9.0)), batch=32, optimizer="sgd", limits={"micro_batch": 8})
    found = rows(this, other)
    assert found[("recipe", "optimizer.name")] == ("adamw", "sgd")
    assert found[("recipe", "limits.micro_batch")] == ("auto", 8)
    assert found[("choices", "micro_batch")] == (32, 8)
    assert found[("plan", "grade")] == ("bitwise", "reordered")
    assert found[("plan", "predicted seconds")] == (this.predicted_seconds, other.predicted_seconds)
    assert not {name for _, name in found} & {"batch", "epochs", "task", "steps", "trainable parameters", "device", "name"}
    groups = [group for group, _ in found]
    assert groups == sorted(groups, key=["recipe", "facts", "choices", "plan"].index) and list(found)[-1] == ("plan", "predicted seconds")


def test_steps_parameters_and_a_refusal_are_compared(facts: Facts) -> None:
    fewer = replace(facts, data=replace(facts.data, train=40, digest="other"))
    frozen = replace(fewer, frozen=replace(facts.frozen, parameters=tuple(p for layer in facts.model.layers for p in layer.tensors)))
    found = rows(made(facts, batch=10), made(frozen, batch=10))
    assert found[("facts", "training examples")] == (facts.data.train, 40)
    assert found[("facts", "data")] == (facts.data.digest, "other")
    assert found[("plan", "steps")] == (30, 12)
    assert found[("plan", "trainable parameters")] == (facts.model.parameters, 0)
    assert found[("plan", "refused")] == (False, True)


def test_a_choice_that_only_one_plan_makes_is_shown(facts: Facts) -> None:
    this = made(facts)
    other = replace(this, choices=this.choices[1:])
    assert rows(this, other)[("choices", "device")] == ("cpu", None)
    assert "none" in show_differences(this, other, ("a", "b"))


def test_the_text_has_80_columns_whatever_stands_in_the_recipe(facts: Facts) -> None:
    this = made(facts, name="a")
    other = made(
        facts, data={"train": "d.npz", "classes": [f"a class with a long name {i}" for i in range(9)], "target": "x" * 90 + "\x1b[2J"}
    )
    text = show_differences(this, other, ("recipes/" + "long" * 12 + ".yaml", "o.yaml"))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "recipe" in text.splitlines()
    for number in range(9):
        assert f"name {number}" in " ".join(text.split())
    assert asdict(differences(this, other)[0]).keys() == {"group", "name", "this", "other"} == set(Difference.__match_args__)
