"""Summaries: numbers as people write them, tables of at most 80 columns."""

import pytest

from fromzero.report.events import Evaluated, Started, StepDone, as_json
from fromzero.report.summary import (
    curve_table,
    cut,
    finite,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    history,
    predictions_table,
    runs_table,
    sparkline,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.004, "4 ms"),
        (0.8, "0.8 s"),
        (9.96, "10 s"),
        (12, "12 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7440, "2 h 4 min"),
        (86_399, "1 d 0 h"),
        (97_200, "1 d 3 h"),
        (float("nan"), "?"),
    ],
)
def test_seconds_are_written_in_two_units(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1.24e9, "1.2 GB"),
        (139.6e9, "140 GB"),
        (999_950, "1.0 MB"),
        (2e18, "2000 PB"),
    ],
)
def test_bytes_are_written_in_powers_of_a_thousand(count, text):
    assert format_bytes(count) == text


def test_counts_have_commas():
    assert format_count(1_199_882) == "1,199,882"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (12.5, "12.5000"),
        (123.44, "123.4"),
        (1e-5, "1e-05"),
        (1.234e7, "1.23e+07"),
        (-0.5, "-0.5000"),
        (float("nan"), "nan"),
        (None, "-"),
    ],
)
def test_numbers_keep_four_digits(value, text):
    assert format_number(value) == text


def test_finite_takes_numbers_only():
    assert [finite(value) for value in (1, 0.5, True, None, "1", float("inf"), 10**400)] == [1.0, 0.5, None, None, None, None, None]


def test_a_long_name_loses_its_middle():
    assert cut("imagenet-resnet50-lr0.1", 11) == "image…lr0.1"
    assert len(cut("abcdef", 1)) == 1


def test_a_sparkline_goes_from_high_to_low():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([-1.7e308, 1.7e308]) == "▁█"
    assert len(sparkline(range(10_000), 48)) == 48


def curve(metrics=("accuracy",), evaluations=3):
    steps = [as_json(StepDone(i, 1, 64, 2.5 / i, 1e-3)) for i in range(1, 301)]
    done = [as_json(Evaluated(100 * i, i, 0.5 / i, 0.6 / i, dict.fromkeys(metrics, 0.9), best=i == 2)) for i in range(1, evaluations + 1)]
    return steps + done


def test_the_curve_table_has_a_line_for_each_evaluation():
    lines = curve_table(curve()).splitlines()
    assert lines[0].startswith("loss █")
    assert lines[0].endswith("2.5000 → 0.0083")
    assert lines[1].split() == ["step", "epoch", "train", "validation", "accuracy"]
    assert lines[3].split() == ["200", "2", "0.3000", "0.2500", "0.9000", "best"]
    assert len(lines) == 5


def test_the_curve_table_fits_in_80_columns_and_names_what_it_left_out():
    table = curve_table(curve([f"a_metric_with_a_name_{i}" for i in range(4)]))
    assert max(map(len, table.splitlines())) <= 80
    assert "no room for: a_metric_with_a_name_1, a_metric_with_a_name_2,\n  a_metric_with_a_name_3" in table


def test_even_one_metric_with_an_endless_name_fits():
    assert max(map(len, curve_table(curve(["m" * 200])).splitlines())) <= 80


def test_a_curve_without_evaluations_or_numbers_says_so():
    assert curve_table([]) == "no evaluation yet"
    assert curve_table(curve(evaluations=0)).endswith("no evaluation yet")
    nothing = {"event": "Evaluated", "step": 1, "epoch": 1, "loss": None, "train_loss": None, "metrics": {"accuracy": None}}
    assert curve_table([nothing]).splitlines()[-1].split() == ["1", "1", "-", "-", "-"]


def test_steps_done_twice_count_once():
    first = [StepDone(i, 1, 64, 1.0, 1e-3) for i in range(1, 8)]
    again = [Started("a", "runs/a", 5, 0.0), *(StepDone(i, 1, 64, 0.5, 1e-3) for i in range(6, 9))]
    kept = history([as_json(event) for event in [Started("a", "runs/a", 0, 0.0), *first, *again]])
    assert [(event["step"], event["loss"]) for event in kept if event["event"] == "StepDone"] == [
        *((i, 1.0) for i in range(1, 6)),
        *((i, 0.5) for i in range(6, 9)),
    ]


def row(run, **changed):
    whole = {"run": run, "status": "done", "task": "classify", "steps": 4690, "seconds": 185.0, "created": 1.0}
    return {**whole, "validation": {"loss": 0.0512, "accuracy": 0.9812}, **changed}


def test_the_runs_table_shows_the_newest_run_last():
    lines = runs_table([row("new", created=2.0), row("old"), row("unknown", created=None)]).splitlines()
    assert lines[0].split() == ["run", "status", "task", "steps", "time", "validation"]
    assert [line.split()[0] for line in lines[1:]] == ["unknown", "old", "new"]
    assert lines[3].split("  ")[-2:] == ["accuracy 0.9812", "loss 0.0512"]


def test_the_runs_table_fits_in_80_columns():
    metrics = {"loss": 1.0, "accuracy": 0.9, "macro_f1": 0.8, "a_name_" * 9: 0.5}
    table = runs_table([row("a-long-name" * 9, steps=12_345_678, seconds=1e5, status="interrupted", task="language", validation=metrics)])
    assert max(map(len, table.splitlines())) <= 80
    assert "accuracy 0.9" in table


def test_a_run_of_which_little_is_known_is_still_listed():
    table = runs_table([{"run": "\x1b[2Jbad"}])
    assert table.splitlines()[1].split() == ["?[2Jbad", "-", "-", "-", "-", "-"]
    assert runs_table([]) == "no runs yet"


def test_predictions_stand_beside_what_came_with_the_error_between_them_in_per_cent() -> None:
    figures = {"predicted_peak_bytes": 14 * 10**8, "peak_bytes": 10**9, "peak_error": 0.4}
    rows = [
        {"run": "penguins", "status": "done", "predicted_seconds": 59 * 60 + 59, "seconds": 12.0, "seconds_error": 298.9, **figures},
        {"run": "a-run-with-a-name-that-is-far-too-long" * 2, "status": "stopped", "predicted_seconds": 250.0, "seconds": 3.0},
        {"run": "not\x1b-measured", "status": "done", "predicted_seconds": None, "seconds": 0.1, "peak_bytes": 999 * 10**6},
    ]
    text = predictions_table(rows, {"seconds_error": 0.125, "peak_error": None})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in text
    assert lines[0].split() == ["run", "predicted", "time", "error", "predicted", "peak", "error"]
    assert lines[1].split("  ")[0] == "penguins" and "+29890%" in lines[1] and lines[1].endswith("1.4 GB  1.0 GB   +40%")
    assert lines[2].split()[0].endswith("long*") and lines[2].split()[-4:] == ["-", "-", "-", "-"]
    assert lines[3].startswith("not?-measured") and "*" not in lines[3]
    assert lines[4:] == ["* stopped or interrupted: not in the medians", "median of the absolute errors: time 12.5%"]


def test_predictions_without_a_run_that_is_done_say_so() -> None:
    rows = [{"run": "r", "status": "interrupted"}]
    assert predictions_table(rows, {"seconds_error": None, "peak_error": None}).endswith(
        "median of the absolute errors: no run is done yet"
    )
