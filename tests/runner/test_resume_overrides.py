"""A run that goes on may change what the table says and nothing else; the steps already taken stay what they were."""

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fromzero as fz
from fromzero.optim import follows_length, lr_factor
from fromzero.recipe.changes import MAY_CHANGE, STAYS, rule
from fromzero.recipe.read import known_keys
from fromzero.report.jsonlines import read_events

SAME = ("steps", "epochs", "train", "validation", "kept_step")
Stop = Callable[..., fz.Planned]


def trained(recipe: dict[str, Any], runs: Path) -> Any:
    return fz.run(fz.plan(recipe, runs=runs, probe=False), quiet=True)


def equal(one: Any, other: Any) -> None:
    """Weights bit for bit, and what was measured of them."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {key: one.result[key] for key in SAME} == {key: other.result[key] for key in SAME}


def warnings(folder: Path) -> list[str]:
    return [event["what"] for event in read_events(folder / "events.jsonl") if event["event"] == "Warned"]


def rates(folder: Path) -> list[float]:
    return [event["lr"] for event in read_events(folder / "events.jsonl") if event["event"] == "StepDone"]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plan_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "plan.json").read_text()))


# ------------------------------------------------------------------------------------------- the table


def leaves() -> list[str]:
    keys = [".".join(path) for path in known_keys()]
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def test_every_key_of_a_recipe_may_change_or_stays_and_not_both() -> None:
    ruled = [rule(key) for key in leaves()]
    assert len(ruled) > 80 and all(reason for _, reason in ruled)
    assert not MAY_CHANGE.keys() & STAYS.keys()
    known = {".".join(path) for path in known_keys()}
    assert MAY_CHANGE.keys() <= known and STAYS.keys() <= known
    allowed = {key for key in leaves() if rule(key)[0]}
    assert allowed == set(MAY_CHANGE), "a section may not change as a whole"


def test_the_page_shows_both_tables_as_the_code_has_them(repository: Path) -> None:
    page = (repository / "docs" / "resume.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `([a-z_.]+)` \| (.*) \|$", page, re.MULTILINE)) == MAY_CHANGE | STAYS


def test_all_that_may_not_change_is_refused_at_once_by_name_with_the_reason_and_nothing_is_written(
    noise: dict[str, Any], tmp_path: Path, stopped_at: Stop
) -> None:
    stopped_at(noise, tmp_path, 2)
    before = everything(tmp_path / "r")
    asked = ["optimizer.lr=0.5", "batch=8", "model.hidden=[8]", "seed=3", "data.hold_out=0.5", "epochs=9", "schedule=cosine"]
    with pytest.raises(fz.RecipeError) as caught:
        fz.resume("r", *asked, runs=tmp_path, quiet=True)
    faults = {fault.key: fault for fault in caught.value.faults}
    assert set(faults) == {"optimizer.lr", "batch", "model.hidden", "seed", "data.hold_out", "schedule.name"}
    lr = str(faults["optimizer.lr"])
    assert lr.startswith("command line optimizer.lr: cannot become 0.5 in a run that was begun with 0.05; the steps already taken")
    assert "[8] in a run that was begun with [4]" in str(faults["model.hidden"])
    assert caught.value.faults[-1].mend == "for a run that begins with these weights: model: run:r in a new recipe"
    assert everything(tmp_path / "r") == before


def test_another_optimizer_is_one_fault_and_not_one_for_each_of_its_options(
    noise: dict[str, Any], tmp_path: Path, stopped_at: Stop
) -> None:
    stopped_at(noise, tmp_path, 2)
    with pytest.raises(fz.RecipeError, match=r"optimizer.name: cannot become sgd in a run that was begun with adamw") as caught:
        fz.resume("r", "optimizer={name: sgd, lr: 0.05}", "adapter=lora", runs=tmp_path, quiet=True)
    assert {fault.key for fault in caught.value.faults} == {"adapter.name", "optimizer.name"}
    assert len(caught.value.faults) == 2


def test_a_recipe_that_was_edited_in_the_folder_is_held_to_the_same_table(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    stopped_at(noise, tmp_path, 2)
    written = tmp_path / "r" / "recipe.yaml"
    text = written.read_text()
    line = next(number for number, said in enumerate(text.splitlines(), 1) if "batch" in said)
    written.write_text(text.replace("batch: 16", "batch: 4"))
    with pytest.raises(fz.RecipeError, match=rf"recipe.yaml:{line} batch: cannot become 4 in a run that was begun with 16"):
        fz.resume("r", runs=tmp_path, quiet=True)
    written.write_text(text.replace("epochs: 3", "epochs: 4"))
    assert fz.resume("r", runs=tmp_path, quiet=True).result["steps"] == 12
    assert plan_of(tmp_path / "r")["changes"][0].endswith("step 2: epochs: 3 → 4")


def test_a_model_given_from_python_is_refused_where_the_run_has_one_of_another_source(
    noise: dict[str, Any], tmp_path: Path, stopped_at: Stop
) -> None:
    stopped_at(noise, tmp_path, 2)
    with pytest.raises(fz.RecipeError, match=r"model.from: cannot become <given from Python: Linear> in a run that was begun with mlp"):
        fz.resume("r", runs=tmp_path, model=nn.Linear(2, 3), quiet=True)


@pytest.mark.parametrize(
    "asked", ["save.every=1", "save.keep=5", "limits.seconds=600", "limits.memory=1GB", "report=[page]", "evaluate.samples=0"]
)
def test_what_changes_no_number_leaves_the_bits_as_they_were(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop, asked: str) -> None:
    whole = trained({**noise, "name": "whole"}, tmp_path)
    stopped_at(noise, tmp_path, 5)
    equal(fz.resume("r", asked, runs=tmp_path, quiet=True), whole)
    key = asked.partition("=")[0]
    assert any(f"goes on with another recipe from step 5: {key}: " in said for said in warnings(tmp_path / "r"))


def test_a_smaller_micro_batch_changes_the_order_of_additions_alone(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    whole = trained({**noise, "name": "whole"}, tmp_path)
    stopped_at(noise, tmp_path, 5)
    cut = fz.resume("r", "limits.micro_batch=4", "limits.threads=2", runs=tmp_path, quiet=True)
    noted = plan_of(tmp_path / "r")
    assert noted["micro_batch"] == 4 and noted["recipe"]["limits"] == {"threads": 2, "micro_batch": 4}
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(cut.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6), name


# --------------------------------------------------------------------------------------------- longer


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("schedule", ["constant", {"name": "step", "every": 5}, {"name": "constant", "warmup": 3}])
def test_a_done_run_made_longer_ends_in_the_bits_of_an_unbroken_longer_one(
    noise: dict[str, Any], tmp_path: Path, keep: str, schedule: Any
) -> None:
    noise |= {"evaluate": {"keep": keep}, "schedule": schedule}
    whole = trained({**noise, "name": "whole", "epochs": 6}, tmp_path)
    assert trained(noise, tmp_path).result["steps"] == 9
    longer = fz.resume("r", "epochs=6", runs=tmp_path, quiet=True)
    equal(longer, whole)
    assert rates(tmp_path / "r") == rates(tmp_path / "whole")
    assert fz.read(tmp_path / "r" / "recipe.yaml").epochs == 6
    noted = plan_of(tmp_path / "r")
    assert noted["steps"] == 18 and noted["recipe"]["epochs"] == 6 and noted["begun"]["epochs"] == 3
    assert len(noted["changes"]) == 1 and noted["changes"][0].endswith(", step 9: epochs: 3 → 6")
    assert warnings(tmp_path / "r") == ["goes on with another recipe from step 9: epochs: 3 → 6"]


@pytest.mark.parametrize("at", [2, 3, 6, 8])
def test_a_stopped_run_made_longer_or_shorter_ends_in_the_bits_of_one_of_that_length(
    noise: dict[str, Any], tmp_path: Path, stopped_at: Stop, at: int
) -> None:
    for name, epochs in (("shorter", 3), ("longer", 7)):
        whole = trained({**noise, "name": f"whole-{name}", "epochs": epochs}, tmp_path)
        stopped_at({**noise, "name": name, "epochs": 5}, tmp_path, at)
        equal(fz.resume(name, f"epochs={epochs}", runs=tmp_path, quiet=True), whole)


@pytest.mark.parametrize("at", [3, 12, 13, 15])
def test_what_was_measured_before_a_stop_is_still_said_at_the_end(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop, at: int) -> None:
    """Also where the stop comes at the step of an evaluation, or after the best one."""
    noise["epochs"] = 6
    whole = trained({**noise, "name": "whole"}, tmp_path)
    assert whole.result["kept_step"] < 13, "the best comes before some of the stops, or this shows nothing"
    stopped_at(noise, tmp_path, at)
    equal(fz.resume("r", runs=tmp_path, quiet=True), whole)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle", {"name": "step", "every": 0.5}, {"name": "constant", "warmup": 0.5}])
def test_a_schedule_that_follows_the_length_goes_on_at_the_rates_of_the_new_length_and_says_so(
    noise: dict[str, Any], tmp_path: Path, schedule: Any
) -> None:
    noise["schedule"] = schedule
    trained(noise, tmp_path)
    options = {"name": schedule} if isinstance(schedule, str) else schedule
    before = rates(tmp_path / "r")
    checkpoint = everything(tmp_path / "r" / "checkpoints" / "step-9")
    fz.resume("r", "epochs=5", "save.keep=9", runs=tmp_path, quiet=True)
    after = rates(tmp_path / "r")
    assert after[:9] == before and everything(tmp_path / "r" / "checkpoints" / "step-9") == checkpoint
    assert after[9:] == [0.05 * lr_factor(total=15, step=step, **options) for step in range(9, 15)]
    (said,) = (what for what in warnings(tmp_path / "r") if what.startswith("schedule"))
    assert f"runs over 15 steps now, not 9: step 10 is taken at a rate of {after[9]:.3g}, not " in said
    assert "the 9 steps before it keep theirs" in said
    assert follows_length(**options)


@pytest.mark.parametrize("schedule", [{"name": "constant"}, {"name": "constant", "warmup": 4.0}, {"name": "step", "every": 3.0}])
def test_a_schedule_that_does_not_follow_the_length_has_the_same_rates_at_any(schedule: dict[str, Any]) -> None:
    assert not follows_length(**schedule)
    assert len({tuple(lr_factor(step=step, total=total, **schedule) for step in range(9)) for total in (9, 10, 1000)}) == 1


def test_a_done_run_without_a_checkpoint_of_its_end_is_refused_and_told_how_to_go_on(noise: dict[str, Any], tmp_path: Path) -> None:
    trained({**noise, "save": 4, "steps": 9, "epochs": None}, tmp_path)
    before = everything(tmp_path / "r")
    with pytest.raises(fz.SourceError, match=r"has no checkpoint of its end, step 9; the newest is of step 8.*save.every: epoch.*run:r"):
        fz.resume("r", "steps=20", runs=tmp_path, quiet=True)
    assert everything(tmp_path / "r") == before


def test_a_length_that_is_reached_already_is_refused(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    stopped_at(noise, tmp_path, 6)
    with pytest.raises(fz.UserError, match="r steps: would have 6 steps, and has taken 6; ask for more"):
        fz.resume("r", "epochs=2", runs=tmp_path, quiet=True)
    trained({**noise, "name": "done"}, tmp_path)
    with pytest.raises(fz.UserError, match="would have 9 steps, and has taken 9"):
        fz.resume("done", "save.keep=4", runs=tmp_path, quiet=True)
    with pytest.raises(fz.UserError, match=r"run 'done' is done after 9 steps; to train on.*make it longer: epochs="):
        fz.resume("done", runs=tmp_path, quiet=True)


def test_a_run_that_stopped_early_goes_on_when_stop_after_is_taken_back(noise: dict[str, Any], tmp_path: Path) -> None:
    noise |= {"epochs": 8, "evaluate": {"stop_after": 2}}
    whole = trained({**noise, "name": "whole", "evaluate": {}}, tmp_path)
    early = trained(noise, tmp_path)
    assert early.result["steps"] < 24
    with pytest.raises(fz.UserError, match=r"evaluate.stop_after: 2 evaluations were without a gain, and it stops after 2"):
        fz.resume("r", "epochs=20", runs=tmp_path, quiet=True)
    equal(fz.resume("r", "evaluate.stop_after=none", runs=tmp_path, quiet=True), whole)


def test_a_done_run_that_was_made_longer_and_stopped_is_no_longer_done(noise: dict[str, Any], tmp_path: Path) -> None:
    whole = trained({**noise, "name": "whole", "epochs": 6}, tmp_path)
    trained(noise, tmp_path)
    with pytest.raises(fz.NumbersError):
        fz.resume("r", "epochs=6", "limits.seconds=1e-9", runs=tmp_path, quiet=True)
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "stopped"
    equal(fz.resume("r", "limits.seconds=none", runs=tmp_path, quiet=True), whole)
    assert [said.partition("step ")[2] for said in plan_of(tmp_path / "r")["changes"]] == [
        "9: epochs: 3 → 6",
        "9: limits.seconds: none → 1e-09",
        "10: limits.seconds: 1e-09 → none",
    ]


def test_a_done_run_that_was_made_longer_and_killed_goes_on_to_its_new_end(
    noise: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained({**noise, "name": "whole", "epochs": 6}, tmp_path)
    trained(noise, tmp_path)

    def killed(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fromzero.runner.loop.set_learning_rate", killed)
        fz.resume("r", "epochs=6", runs=tmp_path, quiet=True)
    equal(fz.resume("r", runs=tmp_path, quiet=True), whole)


@pytest.mark.parametrize("length", [{}, {"epochs": 8, "evaluate": {"stop_after": 2}}])
def test_a_run_killed_between_its_last_checkpoint_and_its_result_only_ends(
    noise: dict[str, Any], tmp_path: Path, length: dict[str, Any]
) -> None:
    whole = trained(noise | length, tmp_path)
    (tmp_path / "r" / "result.json").unlink()
    taken = len(rates(tmp_path / "r"))
    equal(fz.resume("r", runs=tmp_path, quiet=True), whole)
    assert len(rates(tmp_path / "r")) == taken


# --------------------------------------------------------------------------- code, model, versions

NET = "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n        super().__init__(nn.Linear(2, {width}), nn.{act}(), nn.Linear({width}, 3))\n"


def test_a_model_whose_shapes_have_changed_is_refused_with_both_shapes(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    (tmp_path / "net.py").write_text(NET.format(width=4, act="ReLU"))
    stopped_at({**noise, "model": f"{tmp_path}/net.py:Net"}, tmp_path, 2)
    (tmp_path / "net.py").write_text(NET.format(width=6, act="ReLU"))
    before = everything(tmp_path / "r")
    with pytest.raises(fz.SourceError, match=r"do not fit the model: 0.weight is \(4, 2\), not \(6, 2\); 0.bias is \(4,\), not \(6,\)"):
        fz.resume("r", runs=tmp_path, quiet=True)
    assert everything(tmp_path / "r") == before


def test_a_model_whose_code_has_changed_and_a_version_that_has_are_said(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    (tmp_path / "net.py").write_text(NET.format(width=4, act="ReLU"))
    stopped_at({**noise, "model": f"{tmp_path}/net.py:Net"}, tmp_path, 2)
    (tmp_path / "net.py").write_text(NET.format(width=4, act="Tanh"))
    environment = tmp_path / "r" / "environment.txt"
    environment.write_text(re.sub(r"^torch==.*$", "torch==1.0.0", environment.read_text(), flags=re.MULTILINE))
    fz.resume("r", runs=tmp_path, quiet=True)
    (said,) = warnings(tmp_path / "r")
    assert said == f"not as it was when the run began: {tmp_path}/net.py has changed; torch: 1.0.0 → {version('torch')}"
    assert len(plan_of(tmp_path / "r")["changes"]) == 2
