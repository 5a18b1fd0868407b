"""JSON lines: nothing is lost that was said before a kill, and every line is strict JSON."""

import json
import time

import pytest

from fromzero.errors import DataError
from fromzero.report.events import Evaluated, Finished, Planned, Sampled, Saved, Saving, Started, StepDone, Warned, as_json
from fromzero.report.jsonlines import JsonLines, read_events, roll_back

EVENTS = [
    Planned("a", 2, 1, 10, 10, None),
    Started("a", "runs/a", 0, 1.0),
    StepDone(1, 1, 64, 0.5, 1e-3, 2.0),
    Evaluated(1, 1, 0.4, 0.5, {"accuracy": 0.9}, best=True),
    Saved(1, "checkpoints/1"),
    Warned("größe", "mend"),
    Finished("done", 2, 1.5, {"validation": {"loss": 0.4}}),
]


def written(path, events):
    observer = JsonLines(path)
    for event in events:
        observer(event)
    observer.close()


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_event_comes_back_with_the_time_at_which_it_was_said(tmp_path):
    before = time.time()
    written(tmp_path / "new" / "events.jsonl", EVENTS)
    events = read_events(tmp_path / "new" / "events.jsonl")
    assert all(before <= event.pop("at") <= time.time() for event in events)
    assert events == [as_json(event) for event in EVENTS]


def test_nan_and_infinity_are_written_as_null_at_every_depth(tmp_path):
    nan, inf = float("nan"), float("inf")
    path = tmp_path / "events.jsonl"
    written(path, [StepDone(1, 1, 64, nan, 1e-3, inf), Finished("stopped", 1, 1.0, {"train": {"loss": -inf, "all": [nan, 1.0]}})])
    step, finished = map(strict, path.read_text().splitlines())
    assert (step["loss"], step["norm"], step["lr"]) == (None, None, 1e-3)
    assert finished["result"] == {"train": {"loss": None, "all": [None, 1.0]}}


@pytest.mark.parametrize("event", EVENTS[3:], ids=lambda event: type(event).__name__)
def test_what_matters_after_a_crash_is_on_the_disk_at_once(tmp_path, event):
    path = tmp_path / "events.jsonl"
    observer = JsonLines(path)
    observer(EVENTS[2])
    assert path.read_text() == ""
    observer(event)
    assert len(read_events(path)) == 2
    observer.close()


def test_closing_writes_the_steps_that_waited(tmp_path):
    written(tmp_path / "events.jsonl", EVENTS[2:3])
    assert len(read_events(tmp_path / "events.jsonl")) == 1


def test_closing_twice_is_no_error(tmp_path):
    observer = JsonLines(tmp_path / "events.jsonl")
    observer.close()
    observer.close()


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, EVENTS[:2])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(read_events(path)) == 1


def test_a_run_that_goes_on_after_a_cut_line_can_be_read_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, EVENTS[:2])
    path.write_bytes(path.read_bytes()[:-9])
    written(path, EVENTS[1:3])
    assert [event["event"] for event in read_events(path)] == ["Planned", "Started", "StepDone"]


def test_a_whole_last_line_that_only_lacks_its_end_is_kept_when_the_run_goes_on(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, EVENTS[:2])
    path.write_bytes(path.read_bytes()[:-1])
    written(path, EVENTS[2:3])
    assert [event["event"] for event in read_events(path)] == ["Planned", "Started", "StepDone"]


def test_every_broken_earlier_line_is_named_at_once(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "Started"}\n{"event": "Ste\n\n[1]\n\xff\xfe\n{"event": "Finished"}\n{"cut')
    with pytest.raises(DataError) as caught:
        read_events(path)
    assert [fault.line for fault in caught.value.faults] == [2, 4, 5]
    assert f"{path}:2: is no JSON object" in str(caught.value)


def test_a_file_full_of_other_things_gives_a_short_error(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("no\n" * 100)
    with pytest.raises(DataError, match="and 79 more lines like these") as caught:
        read_events(path)
    assert len(caught.value.faults) == 21


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(DataError, match=r"events\.jsonl: does not exist"):
        read_events(tmp_path / "events.jsonl")


def test_an_empty_file_has_no_events(tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    assert read_events(tmp_path / "events.jsonl") == []


def test_a_log_that_another_process_writes_is_not_touched_before_the_first_event(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "Started"}\n{"event": "Ste')  # the other one has not come to the end of its line
    observer = JsonLines(path)
    observer.close()
    assert path.read_bytes().endswith(b'{"event": "Ste')


def test_before_a_checkpoint_all_steps_are_on_the_disk_and_that_is_no_line_of_its_own(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("fromzero.report.jsonlines.os.fsync", synced.append)
    observer = JsonLines(tmp_path / "events.jsonl")
    observer(EVENTS[2])
    observer(Saving(1))
    assert [event["event"] for event in read_events(tmp_path / "events.jsonl")] == ["StepDone"] and len(synced) == 1
    observer.close()


def test_a_log_is_rolled_back_to_before_the_first_event_of_a_later_step(tmp_path):
    path = tmp_path / "events.jsonl"
    steps = [StepDone(step, 1, step, 0.5, 1e-3) for step in range(1, 5)]
    said = [EVENTS[1], Sampled(0, "a", "b"), *steps[:2], Evaluated(2, 1, 0.4, 0.5), Sampled(2, "a", "c"), Saved(2, "x"), *steps[2:]]
    written(path, [*said, Saved(4, "y")])
    whole = path.read_bytes()
    for step, left in ((-1, 1), (0, 2), (1, 3), (2, 7), (3, 8), (4, 10), (9, 10)):
        path.write_bytes(whole)
        for _ in range(2):
            roll_back(path, step)
            assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:left])


def test_an_end_that_left_no_result_is_taken_off_and_one_that_was_a_stop_stays(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, [EVENTS[1], EVENTS[2], Finished("interrupted", 1, 1.0), EVENTS[1], Finished("done", 1, 2.0)])
    roll_back(path, 1)
    assert [event["event"] for event in read_events(path)] == ["Started", "StepDone", "Finished", "Started"]


def test_rolling_back_takes_a_cut_line_along_when_steps_go_and_needs_no_log(tmp_path):
    path = tmp_path / "events.jsonl"
    roll_back(path, 3)
    assert not path.exists()
    written(path, [StepDone(1, 1, 1, 0.5, 1e-3), StepDone(2, 1, 2, 0.5, 1e-3)])
    path.write_bytes(path.read_bytes() + b'{"event": "StepDone", "st')
    roll_back(path, 1)
    assert [event["step"] for event in read_events(path)] == [1] and path.read_bytes().endswith(b"}\n")
