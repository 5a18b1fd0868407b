"""Console: what is printed, how wide, and how seldom."""

import io
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from fromzero.report.console import PLAIN_INTERVAL, TERMINAL_INTERVAL, Console
from fromzero.report.events import Evaluated, Finished, Planned, Saved, Started, StepDone, Warned

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Stream(io.StringIO):
    """A stream that says what it is, and counts its flushes: rich flushes once for each drawing."""

    def __init__(self, terminal, encoding="utf-8"):
        super().__init__()
        self.terminal, self.said_encoding, self.writes = terminal, encoding, 0

    @property
    def encoding(self):
        return self.said_encoding

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.writes += 1
        text.encode(self.said_encoding)
        return super().write(text)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "25")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def watched(terminal, encoding="utf-8"):
    stream, clock = Stream(terminal, encoding), Clock()
    return stream, clock, Console(stream, clock=clock)


def begin(console, steps=3000, per_epoch=1000, run="mnist-cnn", first=0):
    console(Planned(run, steps, per_epoch, 1_199_882, 1_290, None))
    console(Started(run, f"runs/{run}", first, 0.0))


def visible(text):
    return [line for line in re.split(r"[\r\n]", CONTROL.sub("", text)) if line.strip()]


def test_a_file_gets_one_line_for_each_evaluation_and_no_control_codes():
    stream, _, console = watched(terminal=False)
    begin(console)
    console(Evaluated(1000, 1, 0.2345, 0.3456, {"accuracy": 0.9312}))
    console(Evaluated(2000, 2, 0.1345, 0.2456, {"accuracy": 0.9512}, best=True))
    console(Saved(2000, "runs/mnist-cnn/checkpoints/2000"))
    console(Finished("done", 2000, 185.0))
    console.close()
    assert stream.getvalue().splitlines() == [
        "mnist-cnn: training in runs/mnist-cnn",
        "epoch 1/3  train 0.3456  val 0.2345  accuracy 0.9312",
        "epoch 2/3  train 0.2456  val 0.1345 best  accuracy 0.9512",
        "done after 2,000 steps in 3 min 5 s",
    ]


def test_a_file_gets_at_most_one_line_of_progress_in_ten_seconds():
    stream, clock, console = watched(terminal=False)
    begin(console)
    before = stream.writes
    for step in range(1, 2501):  # 25 seconds
        clock.now += 0.01
        console(StepDone(step, 1 + (step - 1) // 1000, 64 * step, 0.5, 1e-3))
    assert stream.writes - before == int(25 / PLAIN_INTERVAL)
    assert stream.getvalue().splitlines()[-1] == "epoch 2/3  step 2,000/3,000  loss 0.5000  6,400 samples/s  10 s left"


def test_a_terminal_is_redrawn_at_most_ten_times_a_second(monkeypatch):
    _, clock, console = watched(terminal=True)
    drawn = []
    monkeypatch.setattr(console._paper, "progress", lambda parts, share: drawn.append((clock.now, share)))
    begin(console)
    for step in range(1, 3001):  # 3 seconds
        clock.now += 0.001
        console(StepDone(step, 1, 64, 0.5, 1e-3))
    assert 28 <= len(drawn) <= 30
    assert all(later - earlier >= TERMINAL_INTERVAL for (earlier, _), (later, _) in pairwise(drawn))


def test_a_step_between_two_drawings_writes_nothing():
    stream, clock, console = watched(terminal=True)
    begin(console)
    clock.now += 1
    console(StepDone(1, 1, 64, 0.5, 1e-3))
    before = stream.writes
    for step in range(2, 1000):
        console(StepDone(step, 1, 64, 0.5, 1e-3))
    assert stream.writes == before


def test_the_bar_says_epoch_step_loss_speed_and_time_left():
    stream, clock, console = watched(terminal=True)
    begin(console)
    clock.now += 10
    console(StepDone(1000, 1, 64_000, 0.4321, 1e-3))
    console.close()
    line = visible(stream.getvalue())[-1]
    for part in ("epoch 1/3", "step 1,000/3,000", "loss 0.4321", "6,400 samples/s", "20 s left"):
        assert part in line


def test_nothing_is_wider_than_80_columns_on_a_terminal_or_in_a_file():
    for terminal in (True, False):
        stream, clock, console = watched(terminal)
        begin(console, steps=12_345_678, per_epoch=10_000, run="a-run-with-a-long-name" * 6)
        for step in (11_234_567, 12_345_678):
            clock.now += 12_345.6
            console(StepDone(step, 1_123, 123_456_789, 1234.56, 1e-3))
        console(Evaluated(12_340_000, 1_234, 0.1, 0.2, {f"metric_with_a_name_{i}": 1 / 3 for i in range(9)}, best=True))
        console(Warned("the labels are out of balance " * 9, "weigh them " * 9))
        console(Finished("stopped", 12_345_678, 1e6))
        console.close()
        lines = visible(stream.getvalue())
        assert len(lines) >= 8
        assert max(map(len, lines)) <= 80
        assert any("val 0.1000 best" in line and line.endswith("...") for line in lines)


def test_a_warning_is_yellow_and_carries_its_mend():
    stream, _, console = watched(terminal=True)
    console(Warned("the loss does not fall", "raise the learning rate"))
    assert "\x1b[33mwarning: the loss does not fall; raise the learning rate\x1b[0m" in stream.getvalue()


def test_a_checkpoint_is_shown_shortly():
    stream, clock, console = watched(terminal=True)
    begin(console)
    clock.now += 1
    console(StepDone(1, 1, 64, 0.5, 1e-3))
    console(Saved(1, "checkpoints/1"))
    clock.now += 0.5
    console(StepDone(2, 1, 64, 0.5, 1e-3))
    assert "saved" in visible(stream.getvalue())[-1]
    clock.now += 2
    console(StepDone(3, 1, 64, 0.5, 1e-3))
    assert "saved" not in visible(stream.getvalue())[-1]


def test_the_time_of_an_evaluation_does_not_count_as_slow_steps():
    stream, clock, console = watched(terminal=False)
    begin(console)
    clock.now += 5
    console(StepDone(1000, 1, 64_000, 0.5, 1e-3))
    clock.now += 100
    console(Evaluated(1000, 1, 0.5, 0.5))
    clock.now += 1
    console(StepDone(1001, 2, 64_300, 0.5, 1e-3))
    assert "300 samples/s" in stream.getvalue()


def test_the_smoothed_loss_begins_anew_after_a_nan():
    stream, clock, console = watched(terminal=False)
    begin(console)
    for loss in (1.0, float("nan"), float("inf"), 0.25):
        console(StepDone(1, 1, 64, loss, 1e-3))
    clock.now += PLAIN_INTERVAL
    console(StepDone(2, 1, 64, 0.25, 1e-3))
    assert "loss 0.2500" in stream.getvalue()


def test_a_nan_in_an_evaluation_is_shown_as_it_is():
    stream, _, console = watched(terminal=False)
    console(Evaluated(7, 1, float("nan"), float("inf")))
    assert stream.getvalue() == "epoch 1  train inf  val nan\n"


def test_an_evaluation_within_an_epoch_names_its_step():
    stream, _, console = watched(terminal=False)
    begin(console)
    console(Evaluated(500, 1, 0.5, 0.5))
    assert stream.getvalue().splitlines()[-1] == "step   500/3,000  train 0.5000  val 0.5000"


def test_a_run_that_goes_on_says_from_where_and_counts_its_time_from_there():
    stream, clock, console = watched(terminal=False)
    begin(console, first=2000)
    clock.now += PLAIN_INTERVAL
    console(StepDone(2500, 3, 160_000, 0.5, 1e-3))
    clock.now += PLAIN_INTERVAL
    console(StepDone(3000, 3, 192_000, 0.5, 1e-3))
    assert stream.getvalue().splitlines() == [
        "mnist-cnn: training from step 2,000 in runs/mnist-cnn",
        "epoch 3/3  step 2,500/3,000  loss 0.5000  10 s left",
        "epoch 3/3  step 3,000/3,000  loss 0.5000  3,200 samples/s  0.0 s left",
    ]


def test_a_run_without_validation_data_does_not_show_a_validation_loss():
    stream, _, console = watched(terminal=False)
    console(Evaluated(7, 1, float("nan"), 0.5))
    assert stream.getvalue() == "epoch 1  train 0.5000\n"


def test_a_name_can_neither_drive_the_terminal_nor_style_it():
    for terminal in (True, False):
        stream, _, console = watched(terminal)
        begin(console, run="\x1b[2Jbad [red]name[/red]")
        assert "\x1b[2J" not in stream.getvalue()
        assert "[red]name[/red]" in stream.getvalue()


def test_letters_that_the_stream_cannot_write_do_not_stop_the_run():
    for terminal in (True, False):
        stream, clock, console = watched(terminal, encoding="ascii")
        begin(console, run="größe-数")
        clock.now += PLAIN_INTERVAL
        console(StepDone(1, 1, 64, 0.5, 1e-3))
        console.close()
        assert "gr??e-?" in stream.getvalue()


def test_the_cursor_comes_back_when_the_console_is_closed_twice():
    stream, clock, console = watched(terminal=True)
    begin(console)
    clock.now += 1
    console(StepDone(1, 1, 64, 0.5, 1e-3))
    assert "\x1b[?25l" in stream.getvalue()
    console.close()
    console.close()
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_standard_output_is_left_alone_while_the_bar_is_there():
    before = sys.stdout
    _, clock, console = watched(terminal=True)
    begin(console)
    clock.now += 1
    console(StepDone(1, 1, 64, 0.5, 1e-3))
    assert sys.stdout is before
    console.close()


def test_a_broken_stream_is_not_hidden():
    class Full(Stream):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        begin(Console(Full(terminal=False)))


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream, _, console = watched(terminal=True)
    begin(console)
    assert "\x1b" not in stream.getvalue()


def test_no_module_of_the_room_imports_torch_rich_or_tensorboard():
    rooms = ("console", "events", "jsonlines", "page", "summary", "tensorboard")
    code = "import sys\n" + "".join(f"import fromzero.report.{room}\n" for room in rooms)
    code += "print([name for name in ('torch', 'rich', 'tensorboard', 'numpy') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
