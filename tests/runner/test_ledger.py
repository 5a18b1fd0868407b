"""The ledger: a row for each run that ended, corrections from those rows, and never a run that fails for its sake."""

import json
import math
import resource
import sqlite3
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fromzero as fz
from fromzero.planner.make import make
from fromzero.planner.values import Plan, Record
from fromzero.report.events import Event, Warned
from fromzero.runner import ledger
from fromzero.runner.begun import read_begun

SHORT, LONG = 0.4, 10.0  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    np.savez(found / "d.npz", x=draw.normal(size=(60, 4)).astype("float32"), y=np.arange(60) % 3)
    return found


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    """Measured, and without a record."""
    plan = fz.plan(recipe(), runs=folder / "none", beside=folder).plan
    return make(plan.recipe, replace(plan.facts, record=None))


def recipe(**keys: object) -> dict[str, object]:
    return {"task": "classify", "name": "r", "model": "mlp", "data": "d.npz", "epochs": 1, "report": (), **keys}


def trained(folder: Path, runs: Path, **keys: object) -> tuple[fz.Planned, list[Event]]:
    heard: list[Event] = []
    planned = fz.plan(recipe(**keys), runs=runs, beside=folder)
    fz.run(planned, quiet=True, observers=[heard.append])
    return planned, heard


def note(runs: Path, plan: Plan, name: str, seconds: float, *, status: str = "done", steps: int | None = None, peak: int = 10**8) -> None:
    result = {"status": status, "steps": plan.steps if steps is None else steps, "seconds": seconds, "peak_memory_bytes": peak}
    runs.mkdir(exist_ok=True)
    assert ledger.enter(runs / name, plan, result) is None


def predicting(plan: Plan, seconds: float, peak: int = 10**8) -> Plan:
    return replace(plan, predicted_seconds=seconds, predicted_peak_bytes=peak)


def test_a_run_that_ended_is_one_row_that_says_what_was_trained_and_where(folder: Path, tmp_path: Path) -> None:
    planned, heard = trained(folder, tmp_path)
    (row,) = fz.predictions(tmp_path)["rows"]
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    machine = planned.plan.facts.machine
    assert (row["run"], row["status"], row["task"], row["model"], row["grade"]) == ("r", "done", "classify", "mlp", planned.plan.grade)
    assert (row["steps_planned"], row["steps"], row["batch"]) == (planned.plan.steps, planned.plan.steps, planned.plan.batch)
    assert (row["parameters"], row["trainable_parameters"]) == (result["parameters"], result["trainable_parameters"])
    assert (row["predicted_seconds"], row["seconds"]) == (result["predicted"]["seconds"], result["seconds"])
    assert (row["predicted_peak_bytes"], row["peak_bytes"]) == (result["predicted"]["peak_memory_bytes"], result["peak_memory_bytes"])
    assert row["ended_at"] > (tmp_path / "r" / "plan.json").stat().st_mtime - 1
    for said in (machine.device_name, f"{machine.threads} threads", machine.torch, machine.system):
        assert said in row["machine"]
    assert not [event for event in heard if isinstance(event, Warned)]


def test_a_run_that_went_on_keeps_its_one_row_and_counts_the_seconds_of_all_restarts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fz.NumbersError):
        trained(folder, tmp_path, epochs=100_000, limits={"seconds": 0.2})
    (stopped,) = fz.predictions(tmp_path)["rows"]
    assert stopped["status"] == "stopped" and stopped["seconds_error"] is None and stopped["steps"] < stopped["steps_planned"]
    written = tmp_path / "r" / "recipe.yaml"
    epochs = stopped["steps"] + 2  # of one step each
    written.write_text(written.read_text().replace("100000", str(epochs)).replace("seconds: 0.2", "seconds: none"))
    fz.resume("r", runs=tmp_path, quiet=True)
    (done,) = fz.predictions(tmp_path)["rows"]
    assert done["status"] == "done" and done["steps"] == epochs == done["steps_planned"]
    assert done["seconds"] > stopped["seconds"] and done["ended_at"] > stopped["ended_at"]


def broken(path: Path) -> None:
    path.write_bytes(b"this is no database, and long enough to be looked at as one" * 20)


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (all_is_new)")
        connection.execute(f"PRAGMA user_version = {ledger.VERSION + 1}")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "said", "mend"),
    [
        (broken, "file is not a database", "move it away"),
        (Path.mkdir, "unable to open database file", "move it away"),
        (newer, f"its version is {ledger.VERSION + 1}, this fromzero writes {ledger.VERSION}", "use the newer fromzero"),
    ],
)
def test_a_ledger_that_cannot_be_written_is_a_warning_and_the_run_is_whole(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str, mend: str
) -> None:
    spoil(tmp_path / ledger.FILE)
    before = (tmp_path / ledger.FILE).read_bytes() if (tmp_path / ledger.FILE).is_file() else b""
    planned, heard = trained(folder, tmp_path)
    (warned,) = [event for event in heard if isinstance(event, Warned)]
    assert said in warned.what and "the run is whole" in warned.what and mend in warned.mend
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "done"
    assert planned.plan.facts.record is not None and planned.plan.facts.record.runs == 0
    with pytest.raises(fz.SourceError, match=said):
        fz.predictions(tmp_path)
    assert before == ((tmp_path / ledger.FILE).read_bytes() if before else b""), "what cannot be read is left alone"


def test_a_ledger_that_another_process_holds_is_waited_for_and_then_left(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ledger.PATIENCE_SECONDS == 2
    monkeypatch.setattr(ledger, "PATIENCE_SECONDS", 0.05)
    note(tmp_path, plan, "first", LONG)
    holder = sqlite3.connect(tmp_path / ledger.FILE, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    warned = ledger.enter(tmp_path / "second", plan, {"status": "done", "steps": 1, "seconds": 1.0, "peak_memory_bytes": 1})
    holder.close()
    assert warned is not None and "database is locked" in warned.what and warned.mend == "it is held by another process"


def test_nobody_else_writes_between_the_look_at_the_version_and_the_row(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that end at the same moment wait for each other; had both looked before, SQLite would refuse one without waiting."""
    note(tmp_path, plan, "first", LONG)
    other, refused = sqlite3.connect(tmp_path / ledger.FILE, timeout=0, isolation_level=None), []

    class Watched(sqlite3.Connection):
        def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
            if statement.startswith("CREATE"):
                with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                    other.execute("BEGIN IMMEDIATE")
                refused.append(statement)
            return super().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
    note(tmp_path, plan, "second", LONG)
    other.close()
    assert len(refused) == 1 and len(fz.predictions(tmp_path)["rows"]) == 2


def test_a_full_disk_is_a_warning_and_leaves_the_rows_that_are_there(plan: Plan, tmp_path: Path) -> None:
    note(tmp_path, plan, "first", LONG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        warned = ledger.enter(tmp_path / "second", plan, {"status": "done", "steps": 1, "seconds": 1.0, "peak_memory_bytes": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert warned is not None and "the ledger does not hold it" in warned.what
    assert [row["run"] for row in fz.predictions(tmp_path)["rows"]] == ["first"]


def test_without_a_ledger_the_allowances_stand_and_no_file_is_made(plan: Plan, tmp_path: Path) -> None:
    found = ledger.corrections(tmp_path, plan.facts.machine)
    assert found == Record(0, 1.0, *ledger.SECONDS_ALLOWANCE, 0, 1.0, *ledger.BYTES_ALLOWANCE)
    assert fz.predictions(tmp_path) == {"ledger": None, "rows": [], "medians": {"seconds_error": None, "peak_error": None}}
    assert not list(tmp_path.iterdir())


def test_from_five_runs_on_the_correction_is_their_median_and_the_range_their_tenths(plan: Plan, tmp_path: Path) -> None:
    ratios = [0.9, 1.0, 1.1, 1.3, 1.2, 1.15, 1.05, 0.95, 1.25, 2.0]
    for number, ratio in enumerate(ratios):
        note(tmp_path, predicting(plan, 100.0), f"r{number}", 100.0 * ratio, peak=round(10**8 * ratio))
    found = ledger.corrections(tmp_path, plan.facts.machine)
    assert (found.runs, found.bytes_runs) == (10, 10)
    assert found.seconds_ratio == pytest.approx(statistics.median(ratios)) == found.bytes_ratio
    assert 0.89 < found.seconds_low < 0.92 and 1.3 < found.seconds_high <= 2.0
    assert (found.bytes_low, found.bytes_high) == pytest.approx((found.seconds_low, found.seconds_high))


def test_five_runs_give_a_range_beyond_all_that_was_seen(plan: Plan, tmp_path: Path) -> None:
    for number, ratio in enumerate([0.8, 0.9, 1.0, 1.1, 1.3]):
        note(tmp_path, predicting(plan, 100.0), f"r{number}", 100.0 * ratio)
    found = ledger.corrections(tmp_path, plan.facts.machine)
    assert 0 < found.seconds_low < 0.8 and found.seconds_high > 1.3


def test_fewer_runs_are_widened_by_the_allowance_and_one_odd_run_does_not_carry_it_off(plan: Plan, tmp_path: Path) -> None:
    note(tmp_path, predicting(plan, 10.0), "odd", 200.0)
    found = ledger.corrections(tmp_path, plan.facts.machine)
    assert (found.runs, found.seconds_ratio) == (1, statistics.median([20.0, 1.0]))
    assert (found.seconds_low, found.seconds_high) == pytest.approx((ledger.SECONDS_ALLOWANCE[0], 20 * ledger.SECONDS_ALLOWANCE[1]))
    for name in ("a", "b"):
        note(tmp_path, predicting(plan, 10.0), name, 12.0)
    assert ledger.corrections(tmp_path, plan.facts.machine).seconds_ratio == pytest.approx(1.2)


def test_only_whole_runs_that_were_long_enough_on_the_same_machine_count(plan: Plan, tmp_path: Path) -> None:
    predicted = predicting(plan, LONG, 10**8)
    machine = plan.facts.machine
    elsewhere = replace(plan.facts, machine=replace(machine, threads=machine.threads + 1))
    note(tmp_path, predicted, "stopped", 3 * LONG, status="stopped")
    note(tmp_path, predicted, "interrupted", 3 * LONG, status="interrupted")
    note(tmp_path, replace(predicted, facts=elsewhere), "elsewhere", 3 * LONG)
    note(tmp_path, replace(predicted, predicted_seconds=None, predicted_peak_bytes=None), "not-measured", 3 * LONG)
    assert ledger.corrections(tmp_path, machine).runs == 0 == ledger.corrections(tmp_path, machine).bytes_runs
    note(tmp_path, predicting(plan, 0.1), "short", SHORT)
    note(tmp_path, replace(predicted, steps=9), "early", 3 * LONG, steps=8)
    assert ledger.corrections(tmp_path, machine).runs == 0, "their seconds do not count"
    assert ledger.corrections(tmp_path, machine).bytes_runs == 2, "their memory does"
    errors = {row["run"]: row["seconds_error"] for row in fz.predictions(tmp_path)["rows"]}
    assert {name for name, error in errors.items() if error is not None} == {"elsewhere", "short"}


def test_only_the_latest_runs_count(plan: Plan, tmp_path: Path) -> None:
    for number in range(ledger.LATEST):
        note(tmp_path, predicting(plan, LONG), f"old{number}", LONG)
    for number in range(ledger.LATEST):
        note(tmp_path, predicting(plan, LONG), f"new{number}", 2 * LONG)
    found = ledger.corrections(tmp_path, plan.facts.machine)
    assert (found.runs, found.seconds_ratio) == (ledger.LATEST, pytest.approx(2.0))


def test_corrections_are_not_measured_against_corrections(plan: Plan, tmp_path: Path) -> None:
    """A planner that is too low by half stays corrected by 2, however many corrected runs then end as predicted."""
    measured = predicting(plan, LONG)
    for number in range(12):
        record = ledger.corrections(tmp_path, plan.facts.machine)
        corrected = replace(measured, facts=plan.facts.with_record(record), predicted_seconds=LONG * record.seconds_ratio)
        note(tmp_path, corrected, f"r{number}", 2 * LONG)
    rows = fz.predictions(tmp_path)["rows"]
    assert ledger.corrections(tmp_path, plan.facts.machine).seconds_ratio == pytest.approx(2.0)
    assert rows[-1]["seconds_error"] == pytest.approx(0.0) and rows[0]["seconds_error"] == pytest.approx(-0.5)


def test_the_medians_are_of_absolute_errors_of_runs_that_were_done(plan: Plan, tmp_path: Path) -> None:
    for name, predicted, status in (("a", 5.0, "done"), ("b", 12.0, "done"), ("c", 13.0, "done"), ("d", 99.0, "stopped")):
        note(tmp_path, predicting(plan, predicted, 10**8), name, 10.0, status=status, peak=2 * 10**8)
    found = fz.predictions(tmp_path)
    assert [row["run"] for row in found["rows"]] == ["a", "b", "c", "d"]
    assert found["medians"] == {"seconds_error": pytest.approx(0.3), "peak_error": pytest.approx(0.5)}


def test_the_next_plan_prints_corrected_figures_and_chooses_the_same(folder: Path, plan: Plan, tmp_path: Path) -> None:
    for number in range(9):
        note(tmp_path, predicting(plan, LONG, 10**8), f"r{number}", 3 * LONG, peak=10**8 * (101 + number) // 100)
    found = fz.plan(recipe(), runs=tmp_path, beside=folder).plan
    assert found.facts.record is not None and found.facts.measured is not None
    bare = make(found.recipe, replace(found.facts, record=None))
    assert bare.predicted_seconds is not None and bare.predicted_peak_bytes is not None and bare.predicted_seconds_between is None
    assert found.predicted_seconds == pytest.approx(3 * bare.predicted_seconds)
    assert found.predicted_peak_bytes == pytest.approx(1.05 * bare.predicted_peak_bytes, rel=1e-6)
    low, high = found.predicted_bytes_between or (math.nan, math.nan)
    assert bare.predicted_peak_bytes < low < found.predicted_peak_bytes < high
    printed = ("predicted_seconds", "predicted_peak_bytes", "predicted_seconds_between", "predicted_bytes_between", "facts")
    assert replace(bare, **{name: getattr(found, name) for name in printed}) == found, "nothing else differs"


def test_a_run_that_goes_on_is_planned_by_what_was_noted_and_not_by_the_ledger(folder: Path, plan: Plan, tmp_path: Path) -> None:
    planned, _ = trained(folder, tmp_path)
    for number in range(9):
        note(tmp_path, predicting(plan, LONG), f"r{number}", 7 * LONG)
    begun = read_begun(tmp_path / "r")
    again = fz._replan(begun, fz._recipe_of(begun, None, None)[0], tmp_path)
    assert again.plan.facts.record == planned.plan.facts.record
    assert (again.plan.predicted_seconds, again.plan.predicted_seconds_between) == (
        planned.plan.predicted_seconds,
        planned.plan.predicted_seconds_between,
    )
    noted = json.loads((tmp_path / "r" / "plan.json").read_text())
    assert noted["predicted_seconds"] == planned.plan.predicted_seconds
