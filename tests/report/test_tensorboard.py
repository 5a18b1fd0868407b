"""TensorBoard: what its own reader finds in the file that we wrote."""

import struct
import sys

import pytest

from fromzero.errors import MissingExtra
from fromzero.report.events import Evaluated, Finished, Saving, Started, StepDone
from fromzero.report.tensorboard import TensorBoard


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def records(folder):
    """[(step, {tag: value})] and the steps at which sessions start, read by the format: length, check, bytes, check."""
    proto = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    scalars, starts = [], []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = proto.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("summary"):
                scalars.append((event.step, {value.tag: round(value.simple_value, 4) for value in event.summary.value}))
            if event.session_log.status == proto.SessionLog.START:
                starts.append(event.step)
    return scalars, starts


def test_steps_and_evaluations_come_back(tmp_path):
    pytest.importorskip("tensorboard")
    clock = Clock()
    observer = TensorBoard(tmp_path / "tb", clock=clock)
    observer(Started("a", "runs/a", 0, 0.0))
    observer(StepDone(1, 1, 64, 0.5, 0.1, 2.0))
    clock.now += 1
    observer(StepDone(2, 1, 64, 0.25, 0.1))
    observer(Evaluated(2, 1, 0.4, 0.3, {"accuracy": 0.9}))
    observer(Finished("done", 2, 1.0))
    observer.close()
    observer.close()
    assert records(tmp_path / "tb") == (
        [
            (1, {"train/loss": 0.5, "train/lr": 0.1, "train/norm": 2.0}),
            (2, {"train/loss": 0.25, "train/lr": 0.1}),
            (2, {"validation/loss": 0.4, "validation/accuracy": 0.9}),
        ],
        [1],
    )


def test_fast_steps_are_thinned_and_the_last_one_is_kept(tmp_path):
    pytest.importorskip("tensorboard")
    clock = Clock()
    observer = TensorBoard(tmp_path, clock=clock)
    for step in range(1, 1001):  # 1 second
        clock.now += 0.001
        observer(StepDone(step, 1, 64, 0.5, 0.1))
    observer.close()
    scalars, _ = records(tmp_path)
    assert 19 <= len(scalars) <= 22
    assert scalars[-1][0] == 1000


def test_a_run_that_goes_on_makes_tensorboard_forget_the_steps_after_its_start(tmp_path):
    pytest.importorskip("tensorboard")
    for first in (0, 5):
        observer = TensorBoard(tmp_path, clock=Clock())
        observer(Started("a", "runs/a", first, 0.0))
        observer.close()
    assert records(tmp_path)[1] == [1, 6]


def test_before_a_checkpoint_all_steps_are_in_the_file_and_a_run_that_never_speaks_leaves_none(tmp_path):
    pytest.importorskip("tensorboard")
    TensorBoard(tmp_path / "silent").close()
    assert not (tmp_path / "silent").exists()
    clock = Clock()
    observer = TensorBoard(tmp_path / "tb", clock=clock)
    observer(Started("a", "runs/a", 0, 0.0))
    for step in (1, 2):  # the second waits, for it comes too soon
        observer(StepDone(step, 1, 64, 0.5, 0.1))
    observer(Saving(2))
    assert [step for step, _ in records(tmp_path / "tb")[0]] == [1, 2]
    observer.close()


def test_a_missing_package_names_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fromzero\[report\]'"):
        TensorBoard(tmp_path)
