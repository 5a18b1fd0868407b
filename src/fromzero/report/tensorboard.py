"""TensorBoard: events in, an event file of scalars out, by the `tensorboard` package's own writer. Knows no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fromzero.errors import MissingExtra
from fromzero.report.events import Evaluated, Event, Finished, Saving, Started, StepDone

STEP_INTERVAL = 0.05  # seconds between two written steps; a record costs 0.1 ms, and TensorBoard shows 1,000 points a curve


class TensorBoard:
    """An observer that writes `train/…` at most 20 times a second and `validation/…` at every evaluation.

    raises: MissingExtra if the package is not installed
    """

    def __init__(self, folder: Path | str, *, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise MissingExtra(
                "the package tensorboard is not installed",
                why="the recipe asks for it under `report`",
                mend="pip install 'fromzero[report]', or take tensorboard out of `report`",
                key="report",
            ) from error
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._open: Callable[[], Any] = lambda: EventFileWriter(str(folder))
        self._writer: Any = None  # until the run speaks: the folder may be another process's
        self._closed = False
        self._clock = clock
        self._next_step = -math.inf
        self._waiting: StepDone | None = None

    def __call__(self, event: Event) -> None:
        self._writer = self._writer or self._open()
        if type(event) is StepDone:
            self._waiting = event
            if (now := self._clock()) >= self._next_step:
                self._next_step = now + STEP_INTERVAL
                self._step()
        elif isinstance(event, Evaluated):
            self._step()
            metrics = {f"validation/{name}": value for name, value in event.metrics.items()}
            self._scalars(event.step, {"validation/loss": event.loss, **metrics})
            self._writer.flush()
        elif isinstance(event, Started):
            # Every session after the first makes TensorBoard forget what earlier ones wrote from its step on.
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(self._events.Event(wall_time=time.time(), step=event.step + 1, session_log=start))
        elif isinstance(event, Saving | Finished):
            self._step()
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None and not self._closed:
            self._closed = True
            self._step()
            self._writer.close()

    def _step(self) -> None:
        step, self._waiting = self._waiting, None
        if step is not None:
            values = {"train/loss": step.loss, "train/lr": step.lr}
            self._scalars(step.step, values if step.norm is None else {**values, "train/norm": step.norm})

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = self._summaries.Summary(value=scalars)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))
