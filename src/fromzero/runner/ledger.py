"""The ledger: a run that ended in, one row of a SQLite file beside the runs out; those rows in, how far predictions were off out.

It corrects what is printed, and decides nothing. Whatever keeps it from being written is a warning, never the end of a run.
"""

from __future__ import annotations

import math
import sqlite3
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fromzero.devices import MachineFacts
from fromzero.errors import SourceError
from fromzero.planner.values import Plan, Record
from fromzero.report.events import Warned

FILE = "ledger.sqlite"
VERSION = 1  # PRAGMA user_version
PATIENCE_SECONDS = 2.0  # how long another process may hold the file
LATEST = 30  # runs that corrections are taken from: older ones were run by other code
SHORT_SECONDS = 2.0  # a run below this says more of starting than of its pace
ENOUGH = 5  # runs from which a spread is read; below that the allowance is added to what was seen

# Allowances around a prediction while too few runs have ended here to know: assumed, not measured. A long run more often loses
# time than gains it (a warm processor, other work on the machine), and holds what trial steps do not: evaluations, checkpoints.
SECONDS_ALLOWANCE = (0.85, 1.25)
BYTES_ALLOWANCE = (0.95, 1.25)

_COLUMNS = {
    "run": "TEXT PRIMARY KEY",
    "ended_at": "REAL",  # Unix seconds
    "machine": "TEXT",
    "task": "TEXT",
    "model": "TEXT",
    "parameters": "INTEGER",
    "trainable_parameters": "INTEGER",
    "batch": "INTEGER",
    "grade": "TEXT",
    "status": "TEXT",  # done | stopped | interrupted
    "steps_planned": "INTEGER",
    "steps": "INTEGER",
    "predicted_seconds": "REAL",  # as it was printed
    "measured_seconds": "REAL",  # by trial steps alone: corrections must not be measured against corrections
    "seconds": "REAL",  # over all restarts
    "predicted_peak_bytes": "INTEGER",
    "measured_peak_bytes": "INTEGER",
    "peak_bytes": "INTEGER",  # of the process that ended it
}


def enter(folder: Path, plan: Plan, result: Mapping[str, Any]) -> Warned | None:
    """Note a run that ended in the ledger beside its folder; one that went on keeps its row.  returns: why it could not be noted"""
    record, seconds, peak = plan.facts.record, plan.predicted_seconds, plan.predicted_peak_bytes
    row = {
        "run": folder.name,
        "ended_at": time.time(),
        "machine": machine_key(plan.facts.machine),
        "task": plan.recipe.task,
        "model": plan.facts.model.name,
        "parameters": plan.facts.model.parameters,
        "trainable_parameters": plan.trainable_parameters,
        "batch": plan.batch,
        "grade": plan.grade,
        "status": result["status"],
        "steps_planned": plan.steps,
        "steps": result["steps"],
        "predicted_seconds": seconds,
        "measured_seconds": seconds if seconds is None or record is None else seconds / record.seconds_ratio,
        "seconds": result["seconds"],
        "predicted_peak_bytes": peak,
        "measured_peak_bytes": peak if peak is None or record is None else round(peak / record.bytes_ratio),
        "peak_bytes": result["peak_memory_bytes"],
    }
    try:
        with _opened(folder.parent / FILE, write=True) as ledger:
            ledger.execute(f"CREATE TABLE IF NOT EXISTS runs ({', '.join(f'{name} {kind}' for name, kind in _COLUMNS.items())})")
            ledger.execute(f"PRAGMA user_version = {VERSION}")
            names = ", ".join(_COLUMNS)
            ledger.execute(f"INSERT OR REPLACE INTO runs ({names}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)})", row)
    except SourceError as error:
        return Warned(f"the run is whole, but the ledger does not hold it: {error.faults[0].what} ({FILE})", error.faults[0].mend)
    return None


def corrections(runs: Path, machine: MachineFacts) -> Record:
    """What the latest runs that were done on this machine say of predictions; the allowances where none can be read.

    Seconds count where all planned steps were taken and took no less than SHORT_SECONDS.
    """
    seconds: list[float] = []
    peaks: list[float] = []
    try:
        if (runs / FILE).exists():
            with _opened(runs / FILE) as ledger:
                seconds = _ratios(ledger, machine, "seconds", f"AND steps >= steps_planned AND seconds >= {SHORT_SECONDS}")
                peaks = _ratios(ledger, machine, "peak_bytes")
    except (SourceError, OSError):
        pass  # the run that is planned says so when it ends
    return Record(len(seconds), *_spread(seconds, SECONDS_ALLOWANCE), len(peaks), *_spread(peaks, BYTES_ALLOWANCE))


def read_ledger(runs: Path) -> list[dict[str, Any]] | None:
    """Every row, oldest first, with its errors; None where no run has ended yet.

    errors:  predicted / actual - 1; None of a run that was not done, and of its seconds where it ended before its last step
    raises:  SourceError for a file that is no ledger of ours
    """
    if not (runs / FILE).exists():
        return None
    with _opened(runs / FILE) as ledger:
        found = ledger.execute(f"SELECT {', '.join(_COLUMNS)} FROM runs ORDER BY ended_at, run").fetchall()
    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in found]
    return [row | {"seconds_error": _error(row, "seconds"), "peak_error": _error(row, "peak_bytes")} for row in rows]


def medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of the absolute errors; None where there are none."""
    found = {name: [abs(row[name]) for row in rows if row[name] is not None] for name in ("seconds_error", "peak_error")}
    return {name: statistics.median(errors) if errors else None for name, errors in found.items()}


def machine_key(machine: MachineFacts) -> str:
    """What must be the same for one run's time to say something of another's."""
    return f"{machine.device} {machine.device_name}, {machine.threads} threads, torch {machine.torch}, {machine.system}"


def _error(row: Mapping[str, Any], figure: str) -> float | None:
    predicted, actual = row[f"predicted_{figure}"], row[figure]
    whole = row["status"] == "done" and (figure != "seconds" or row["steps"] >= row["steps_planned"])
    return predicted / actual - 1 if whole and predicted is not None and actual else None


@contextmanager
def _opened(path: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """One transaction: all of it or nothing.  raises: SourceError for a newer version, and for all that SQLite finds wrong"""
    try:
        address = f"{path.absolute().as_uri()}?mode={'rwc' if write else 'rw'}"  # rw, for a killed writer's journal is played back
        with closing(sqlite3.connect(address, uri=True, timeout=PATIENCE_SECONDS, isolation_level=None)) as ledger:
            ledger.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            if (version := ledger.execute("PRAGMA user_version").fetchone()[0]) > VERSION:
                raise SourceError(
                    f"its version is {version}, this fromzero writes {VERSION}", mend="use the newer fromzero that wrote it", file=str(path)
                )
            yield ledger
            ledger.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        mend = "it is held by another process" if "locked" in str(error) else "move it away if it is broken; the next run begins a new one"
        raise SourceError(str(error), mend=mend, file=str(path)) from None


def _ratios(ledger: sqlite3.Connection, machine: MachineFacts, figure: str, more: str = "") -> list[float]:
    """Actual over measured by trial steps, of the latest runs; SQLite gives NULL, which is not above 0, where either is missing."""
    asked = f"""SELECT 1.0 * {figure} / measured_{figure} AS ratio FROM runs
        WHERE machine = ? AND status = 'done' AND ratio > 0 {more} ORDER BY ended_at DESC LIMIT {LATEST}"""
    return [ratio for (ratio,) in ledger.execute(asked, (machine_key(machine),))]


def _spread(ratios: Sequence[float], allowance: tuple[float, float]) -> tuple[float, float, float]:
    """The median, and the range that eight runs of ten lie in.

    Tenths are taken of logarithms, for twice and half as long are equally far off; with fewer than nine runs they reach beyond
    all that was seen, as they should. Below ENOUGH runs the uncorrected prediction has a vote like one run, so that a single odd
    run cannot carry it far off, and the whole allowance is added to what was seen.
    """
    if len(ratios) < ENOUGH:
        seen = [*ratios, 1.0]
        return statistics.median(seen), min(seen) * allowance[0], max(seen) * allowance[1]
    tenths = statistics.quantiles([math.log(ratio) for ratio in ratios], n=10)
    return statistics.median(ratios), math.exp(tenths[0]), math.exp(tenths[-1])
