"""Console: events in, lines and one progress bar on a terminal out. Never reads the run, never slows it.

On a terminal the bar is drawn at most 10 times a second. Anywhere else (a file, CI) there are plain lines without
control codes: one per evaluation, and a line of progress at most every 10 seconds. Epochs and steps are counted from 1,
samples from the beginning of the run.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from fromzero.report.events import Evaluated, Event, Finished, Kept, Planned, Sampled, Saved, Started, StepDone, Warned
from fromzero.report.summary import WIDTH, cut, format_count, format_number, format_seconds, printable

TERMINAL_INTERVAL = 0.1  # seconds between two drawings of the bar
PLAIN_INTERVAL = 10.0  # seconds between two lines of progress
_LOSS_SHARE = 0.05  # of one step in the smoothed loss
_RATE_SHARE = 0.3  # of one drawing in the smoothed samples per second
_SAVED_SECONDS = 2.0  # for which the bar says `saved`
_STATUS_STYLES = {"done": "green", "interrupted": "yellow"}


class Console:
    """An observer that prints. stream: standard error unless given; clock: seconds that only grow."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._paper: _Paper = _Terminal(stream) if stream.isatty() and os.environ.get("TERM") != "dumb" else _Lines(stream)
        self._steps = self._steps_per_epoch = self._first_step = 0
        self._loss = self._rate = math.nan
        self._samples = self._rate_samples = 0  # seen so far, and at _rate_from; -1 where not known
        self._began = self._rate_from = clock()
        self._next_draw = self._began + self._paper.interval
        self._saved_until = -math.inf

    def __call__(self, event: Event) -> None:
        if type(event) is StepDone:  # the fast path: nearly every event ends in these lines
            self._samples = event.samples
            loss = self._loss + _LOSS_SHARE * (event.loss - self._loss)
            self._loss = loss if loss - loss == 0.0 else event.loss  # begins anew after a NaN
            now = self._clock()
            if now >= self._next_draw:
                self._next_draw = now + self._paper.interval
                self._draw(event, now)
        else:
            self._rare(event)

    def close(self) -> None:
        self._paper.close()

    def _rare(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, Planned):
            self._steps, self._steps_per_epoch = event.steps, event.steps_per_epoch
        elif isinstance(event, Started):
            self._first_step, self._began = event.step, now
            self._samples = -1 if event.step else 0
            self._next_draw = now + self._paper.interval
            again = f" from step {format_count(event.step)}" if event.step else ""
            self._say(f"{event.run}: training{again} in {event.folder}")
        elif isinstance(event, Kept):
            self._keeping(event)
            self._began = now
        elif isinstance(event, Evaluated):
            self._paper.line(self._evaluation(event), "bold" if event.best else "")
        elif isinstance(event, Sampled):
            self._say(f"… {event.prompt[-60:]} → {event.text[:200]}", "dim")
        elif isinstance(event, Saved):
            self._saved_until = now + _SAVED_SECONDS
        elif isinstance(event, Warned):
            self._say(f"warning: {event.what}" + (f"; {event.mend}" if event.mend else ""), "yellow")
        elif isinstance(event, Finished):
            self._paper.close()
            self._say(
                f"{event.status} after {format_count(event.step)} steps in {format_seconds(event.seconds)}",
                _STATUS_STYLES.get(event.status, "red"),
            )
        self._rate_from, self._rate_samples = now, self._samples  # the time of an evaluation is not the speed of a step

    def _say(self, text: str, style: str = "") -> None:
        for line in textwrap.wrap(printable(text), self._paper.width(), subsequent_indent="  "):
            self._paper.line(line, style)

    def _keeping(self, event: Kept) -> None:
        left = event.seconds / max(event.done, 1) * (event.total - event.done)
        said = [f"frozen part  {self._of(event.done, event.total)} examples"]
        if event.done < event.total:
            self._paper.progress([*said, f"{format_seconds(left)} left"], event.done / event.total)
        else:
            self._say(f"{said[0]}, once, in {format_seconds(event.seconds)}")

    def _evaluation(self, event: Evaluated) -> str:
        at_end = self._steps_per_epoch and event.step % self._steps_per_epoch == 0
        parts = [self._epoch(event.epoch) if at_end or not self._steps_per_epoch else f"step {self._of(event.step, self._steps)}"]
        parts.append(f"train {format_number(event.train_loss)}")
        if event.metrics or math.isfinite(event.loss) or not math.isfinite(event.train_loss):  # else there is no validation data
            parts.append(f"val {format_number(event.loss)}" + (" best" if event.best else ""))
        parts.extend(f"{printable(name)} {format_number(value)}" for name, value in event.metrics.items())
        return _fit(parts, self._paper.width())

    def _draw(self, event: StepDone, now: float) -> None:
        if now > self._rate_from and self._rate_samples >= 0:
            rate = (event.samples - self._rate_samples) / (now - self._rate_from)
            self._rate = rate if math.isnan(self._rate) else self._rate + _RATE_SHARE * (rate - self._rate)
        self._rate_from, self._rate_samples = now, event.samples
        parts = [self._epoch(event.epoch), f"step {self._of(event.step, self._steps)}", f"loss {format_number(self._loss)}"]
        if not math.isnan(self._rate):
            digits = 1 if self._rate < 10 else 0
            parts.append("saved" if now < self._saved_until else f"{self._rate:,.{digits}f} samples/s")
        done = event.step - self._first_step
        if done > 0 and self._steps >= event.step:  # evaluations included, so that the end is not promised too early
            parts.append(f"{format_seconds((now - self._began) / done * (self._steps - event.step))} left")
        self._paper.progress(parts, event.step / self._steps if self._steps else None)

    def _epoch(self, epoch: int) -> str:
        return f"epoch {self._of(epoch, -(-self._steps // self._steps_per_epoch) if self._steps_per_epoch else 0)}"

    def _of(self, count: int, total: int) -> str:
        return f"{count:>{len(f'{total:,}')},}/{total:,}" if total else f"{count:,}"


class _Paper(Protocol):
    """Where lines and progress go. interval: seconds between two calls of `progress`."""

    interval: float

    def width(self) -> int: ...

    def line(self, text: str, style: str) -> None: ...

    def progress(self, parts: Sequence[str], share: float | None) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """Plain lines, flushed one by one so that a follower of the file sees them."""

    def __init__(self, stream: TextIO) -> None:
        self.interval = PLAIN_INTERVAL
        self._stream = stream

    def width(self) -> int:
        return WIDTH

    def line(self, text: str, style: str) -> None:
        self._stream.write(_writable(text, self._stream) + "\n")
        self._stream.flush()

    def progress(self, parts: Sequence[str], share: float | None) -> None:
        self.line(_fit(parts, WIDTH), "")

    def close(self) -> None:
        pass


class _Terminal:
    """One rich progress bar, drawn only when asked: a thread that redraws would take turns with the training."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self.interval = TERMINAL_INTERVAL
        self._stream = stream
        self._text = Text
        self._console = RichConsole(file=stream, force_terminal=True, highlight=False)
        self._bar = BarColumn()
        self._progress = Progress(
            self._bar,
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # standard output belongs to --json
            redirect_stderr=stream is sys.stderr,  # a library's warning goes above the bar, not through it
        )
        self._task = self._progress.add_task("", total=None)
        self._drawing = False

    def width(self) -> int:
        return min(WIDTH, self._console.width)

    def line(self, text: str, style: str) -> None:
        self._console.print(self._text(_writable(text, self._stream), style=style))

    def progress(self, parts: Sequence[str], share: float | None) -> None:
        if not self._drawing:
            self._progress.start()
            self._drawing = True
        text = _fit(parts, self.width() - 5)
        self._bar.bar_width = max(4, min(20, self.width() - 1 - len(text)))
        self._progress.update(self._task, total=None if share is None else 1.0, completed=share or 0.0, description=text, refresh=True)

    def close(self) -> None:
        if self._drawing:
            self._drawing = False
            self._progress.stop()


def _fit(parts: Sequence[str], width: int) -> str:
    """As many parts as fit, the first ones first; `...` stands for what is missing."""
    text = "  ".join(parts)
    count = len(parts)
    while len(text) > width and count > 1:
        count -= 1
        text = "  ".join([*parts[:count], "..."])
    return cut(text, width)


def _writable(text: str, stream: TextIO) -> str:
    """What the stream's encoding cannot say becomes `?`: a run must not die of a letter in its log."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
