"""Golden plans: for the facts of a described machine the planner gives the plan that stands here, to the last figure."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

import fromzero as fz
from fromzero.planner.values import Facts

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def writer() -> Any:
    spec = importlib.util.spec_from_file_location("write_plans", HERE / "write_plans.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_shipped_recipe_has_its_golden_plan() -> None:
    assert len(NAMES) >= 10 and {path.stem for path in (HERE / "plans").glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_a_shipped_recipe_is_what_it_was(name: str) -> None:
    golden = json.loads((HERE / "plans" / f"{name}.json").read_text())
    plan = writer().planned(fz.read(RECIPES / f"{name}.yaml"), TypeAdapter(Facts).validate_python(golden["facts"]))
    assert plan == golden["plan"]
