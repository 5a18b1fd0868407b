"""Execute: a plan in, a finished run out: folder, observers, signals, checkpoints and the result around the loop."""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data import Loaded
from fromzero.devices import give_back_memory, held_memory, keep_freed_memory, peak_memory
from fromzero.errors import FromzeroError, Interrupted, NumbersError, SourceError, UserError
from fromzero.planner.values import Plan
from fromzero.report.events import Evaluated, Event, Finished, Planned, Sampled, Saved, Started, StepDone, Warned
from fromzero.report.summary import format_bytes
from fromzero.runner import checkpoint, ledger
from fromzero.runner.assemble import Job, Place, assemble
from fromzero.runner.folder import RESULT
from fromzero.runner.lock import holding
from fromzero.runner.loop import Best, train
from fromzero.runner.numbers import refuse_to_save
from fromzero.runner.prefix import keep_prefix, still_the_same
from fromzero.runner.progress import Progress
from fromzero.runner.samples import samples
from fromzero.runner.saved import write_model
from fromzero.sources.cache import FULL, free_disk, write_whole
from fromzero.tuning import frozen_digest, moving_state

SAVE_SECONDS = 60.0  # save.every: auto waits at least this long between two checkpoints
GIVE_BACK_SECONDS = 5.0  # at least between two times that freed memory goes back, for the next step takes it anew
MOVED_AFTER = 3  # steps: a warm-up may begin at 0, and A beside a B of zeros gets its first gradient one step later
SAMPLES = "samples.json"


@dataclass
class Stop:
    """Why the loop should end after the step that is running: a signal's number, or `seconds`."""

    reason: int | str | None = None


@dataclass(frozen=True)
class Outcome:
    """A run that ended: its result (what `train --json` prints), and the module with the weights it keeps."""

    folder: Path
    result: dict[str, Any]
    model: nn.Module


def execute(
    plan: Plan, loaded: Loaded, place: Place, folder: Path, observers: Sequence[Callable[[Event], None]], *, resume: bool = False
) -> Outcome:
    """Train into a folder, from the start or from its newest whole checkpoint.

    raises: Interrupted after saving on Ctrl-C or SIGTERM; NumbersError where the numbers or limits.seconds stop it; UserError for a full disk
    """
    tell = _teller(observers, goes_on=plan.recipe.save.full == "go_on")
    with holding(folder), _full_disk(folder), torch.random.fork_rng(devices=[]), _spoken_once(tell), _signals() as stop:
        torch.set_num_threads(plan.threads)
        if plan.keep_memory:
            keep_freed_memory()
        torch.manual_seed(plan.recipe.seed)
        job = assemble(plan, loaded, place)
        torch.manual_seed(plan.recipe.seed)  # the draws of training do not depend on how the model was built
        progress, best, before = Progress(), Best(), frozen_digest(job.model, job.frozen)
        if resume:
            progress = _go_on(folder, job, best, before, tell)
        tell(_planned(plan, folder))
        tell(Started(folder.name, str(folder), progress.step, time.time()))
        if plan.prefix:
            begun = time.perf_counter()
            keep_prefix(job, before, tell)
            progress.seconds += time.perf_counter() - begun
        run = _Run(job, progress, best, before, folder, tell, stop)
        status, error = run.train()
        if frozen_digest(job.model, job.frozen) != before or not still_the_same(job):
            raise FromzeroError("a frozen layer has changed during training", mend="please report it, with the recipe")
        run.last_words(status)
        if status == "done":  # what only further steps would need makes room for what is written
            job.optimizer.zero_grad()
            job.optimizer.state.clear()
        result, kept = run.finish(status)
        tell(Finished(status, progress.step, progress.seconds, result))
    if error is not None:
        raise error
    job.model.load_state_dict(kept)
    return Outcome(folder, result, job.model.eval())


class _Run:
    """What surrounds the loop: when to save, and what is left at the end."""

    def __init__(
        self, job: Job, progress: Progress, best: Best, frozen: str, folder: Path, tell: Callable[[Event], None], stop: Stop
    ) -> None:
        self.job, self.progress, self.best, self.frozen = job, progress, best, frozen
        self.folder, self.tell, self.stop = folder, tell, stop
        self.saved_at, self.saved_step, self.unsaved = time.monotonic(), progress.step, False
        self.stopped_by: NumbersError | None = None
        self.gave_back_at = 0.0
        self.last: Evaluated | None = None
        self.kept: Evaluated | None = None
        self.samples: list[Sampled] = []
        self.first = {name: _bits(p) for name, p in job.model.named_parameters() if p.requires_grad}
        self.check_at = min(progress.step + MOVED_AFTER, job.plan.steps)

    def train(self) -> tuple[str, FromzeroError | None]:
        recipe, plan = self.job.plan.recipe, self.job.plan
        resume = f"fromzero resume {self.folder.name}"
        self.sample()
        for event in self._loop():
            self.tell(event)
            if isinstance(event, StepDone):
                self._keep_to_the_plan()
                if event.step == self.check_at:
                    self._warn_of_the_unmoved()
            if isinstance(event, Evaluated):
                if recipe.task == "language" or self.progress.step == plan.steps:
                    self.sample()
                self.last = event
                self.kept = event if event.best or recipe.evaluate.keep == "last" or self.kept is None else self.kept
            self._maybe_save()
        if self.stopped_by is not None:
            return "stopped", self.stopped_by
        if self.progress.step < plan.steps and self.stop.reason is not None:
            if self.stop.reason == "seconds":
                return "stopped", NumbersError(
                    f"limits.seconds: {recipe.limits.seconds:g} seconds are over after step {self.progress.step} of {plan.steps}",
                    mend=f"{resume} goes on",
                )
            return "interrupted", Interrupted(
                f"stopped after step {self.progress.step} of {plan.steps}, saved",
                code=128 + int(self.stop.reason),
                mend=f"{resume} goes on from there",
            )
        return "done", None

    def _loop(self) -> Iterator[Event]:
        """The loop's events, until the numbers stop it; what cannot be saved is raised outside and ends the run as it stands."""
        try:
            yield from train(self.job, self.progress, self.best, self._stopping)
        except NumbersError as error:
            self.stopped_by = error

    def _stopping(self) -> bool:
        limit = self.job.plan.recipe.limits.seconds
        if limit is not None and self.progress.seconds > limit:
            self.stop.reason = "seconds"
        return self.stop.reason is not None

    def _maybe_save(self) -> None:
        every, step = self.job.plan.recipe.save.every, self.progress.step
        if step == self.saved_step:
            return
        at_epoch_end = self.progress.index == 0
        if isinstance(every, int):
            due = step % every == 0
        elif every == "epoch":
            due = at_epoch_end
        else:
            due = time.monotonic() - self.saved_at > SAVE_SECONDS
        if due:
            self.save()

    def _keep_to_the_plan(self) -> None:
        """Kept memory falls to pieces over batches of many sizes; where more is held than was foretold, what is free goes back."""
        plan, now = self.job.plan, time.monotonic()
        if plan.facts.measured is None or not plan.keep_memory or now - self.gave_back_at < GIVE_BACK_SECONDS:
            return
        if held_memory() > (plan.predicted_peak_bytes or 0):
            give_back_memory(collect=False)
            self.gave_back_at = now

    def _warn_of_the_unmoved(self) -> None:
        parameters = dict(self.job.model.named_parameters())
        still = [name for name, bits in self.first.items() if _bits(parameters[name]) == bits]
        if still:
            few = ", ".join(still[:6]) + (" …" if len(still) > 6 else "")
            what = f"{len(still)} of {len(self.first)} tensors that should learn have not moved after {MOVED_AFTER} steps: {few}"
            self.tell(Warned(what, "no gradient reaches them, or their learning rate is too small for their type"))

    def sample(self) -> None:
        began = time.perf_counter()
        for event in samples(self.job, self.progress.step):
            self.samples.append(event)
            self.tell(event)
        if self.progress.step in (0, self.job.plan.steps):  # in between the loop's own clock counts it
            self.progress.seconds += time.perf_counter() - began

    def save(self, *, last: bool = False) -> None:
        """last: nothing is trained after it, so that a full disk is no thing to go on with

        raises: UserError where it cannot be written, NumbersError where it holds what is no finite number
        """
        asked, step = self.job.plan.recipe.save, self.progress.step
        try:
            path = checkpoint.save(self.folder / "checkpoints", self.job, self.progress, self.best, keep=asked.keep, frozen=self.frozen)
        except OSError as error:
            refused = self._not_saved(error)
            if last or asked.full == "stop" or error.errno not in FULL:
                raise refused from error
            if not self.unsaved:  # said once, until one is saved again
                self.tell(Warned(refused.faults[0].what, "make room: training goes on, and what it learns from here on is not safe"))
            self.unsaved = True
            return
        finally:
            self.saved_at = time.monotonic()
        self.saved_step, self.unsaved = step, False
        self.tell(Saved(step, str(path)))

    def _not_saved(self, error: OSError) -> UserError:
        what, mend = f"step {self.progress.step} could not be saved ({error.strerror})", "mend that"
        if error.errno in FULL:
            needed, free = checkpoint.bytes_needed(self.job, self.best), free_disk(self.folder)
            what += f": a checkpoint needs {format_bytes(needed)} ({needed:,} bytes), {format_bytes(free)} ({free:,}) are free"
            mend = "let files be larger (ulimit -f)" if error.errno == errno.EFBIG else "make room, or set save.keep: 1"
        mend += f"; fromzero resume {self.folder.name} then goes on from there"
        return UserError(what, why="what was saved before is as it was", mend=mend, file=str(self.folder))

    def last_words(self, status: str) -> None:
        """A run that was stopped is saved where it stands, so that it can go on."""
        if status != "done" and self.progress.step and self.progress.step != self.saved_step:
            self.save(last=True)

    def finish(self, status: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Write the model, the result, and the row of the ledger."""
        last = {name: tensor.detach() for name, tensor in self.job.model.state_dict().items()}
        kept = last if self.best.weights is None else {**last, **self.best.weights}
        older = self.best.weights is not None and self.progress.best_step != self.progress.step
        refuse_to_save({name: kept[name] for name in moving_state(self.job.model, self.job.frozen)}, self.job.model, self.progress.step)
        write_model(self.folder / "model", replace(self.job.saved, folder=self.folder / "model"), kept, last if older else None)
        if self.samples:
            write_whole(
                self.folder / SAMPLES, json.dumps([asdict(sample) for sample in self.samples], indent=1, ensure_ascii=False).encode()
            )
        result = self._result(status)
        write_whole(self.folder / RESULT, json.dumps(result, indent=1).encode())
        if (warned := ledger.enter(self.folder, self.job.plan, result)) is not None:
            self.tell(warned)
        return result, kept

    def _result(self, status: str) -> dict[str, Any]:
        plan, progress, kept = self.job.plan, self.progress, self.kept
        seconds, text = max(progress.seconds, 1e-9), plan.facts.data.text
        validated = {"loss": kept.loss, **kept.metrics} if kept is not None and self.job.validation is not None else {}
        return {
            "run": self.folder.name,
            "status": status,
            "task": plan.recipe.task,
            "steps": progress.step,
            "epochs": round(progress.samples / len(self.job.train), 4),
            "seconds": round(progress.seconds, 3),
            "samples_per_second": round(progress.samples / seconds, 1),
            "tokens_per_second": None if text is None else round(progress.samples / seconds * text.tokens / len(self.job.train), 1),
            "parameters": plan.facts.model.parameters,
            "trainable_parameters": plan.trainable_parameters,
            "peak_memory_bytes": peak_memory(),
            "predicted": {"seconds": plan.predicted_seconds, "peak_memory_bytes": plan.predicted_peak_bytes},
            "train": {"loss": progress.train_loss if progress.loss_count == 0 else progress.loss_sum / progress.loss_count},
            "validation": validated,
            "kept_step": kept.step if kept is not None else progress.step,
            "grade": plan.grade,
        }


def _bits(tensor: Tensor) -> int:
    """A sum over the bits of all values: a tensor that moves changes it."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().reshape(-1).view(whole).sum(dtype=torch.int64))


def _planned(plan: Plan, folder: Path) -> Planned:
    return Planned(
        folder.name, plan.steps, plan.steps_per_epoch, plan.facts.model.parameters, plan.trainable_parameters, plan.predicted_seconds
    )


def _go_on(folder: Path, job: Job, best: Best, frozen: str, tell: Callable[[Event], None]) -> Progress:
    """From the newest whole checkpoint; never from the start, which only a person can ask for"""
    step, damaged = checkpoint.find(folder / "checkpoints")
    skipped = [f"{path.name} was skipped: {wrong}" for path, wrong in damaged.items()]
    if step is None:
        raise SourceError(
            "has no whole checkpoint to go on from",
            why="; ".join(skipped),
            mend="fromzero train its recipe.yaml starts anew",
            file=str(folder),
        )
    progress = checkpoint.restore(step, job, best, frozen=frozen)
    for what in (*skipped, *checkpoint.tidy(folder / "checkpoints", damaged)):
        tell(Warned(what, f"training goes on from {step.name}"))
    return progress


def _teller(observers: Sequence[Callable[[Event], None]], *, goes_on: bool) -> Callable[[Event], None]:
    """goes_on: an observer that has no room to write is left out, and the others hear of it; else that ends the run"""
    listening = list(observers)

    def tell(event: Event) -> None:
        for observer in tuple(listening):
            try:
                observer(event)
            except OSError as error:
                if not goes_on or error.errno not in FULL:
                    raise
                listening.remove(observer)
                what = f"{type(observer).__name__} writes no more: {error.strerror}"
                tell(Warned(what, "training goes on without what it would have written"))

    return tell


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """A disk that is full, whatever was being written, is one message that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"could not be written ({error.strerror}); {format_bytes(free_disk(folder))} are free",
            why="what was saved before is as it was",
            mend=f"make room; fromzero resume {folder.name} then goes on from there",
            file=str(error.filename or folder),
        ) from error


@contextmanager
def _spoken_once(tell: Callable[[Event], None]) -> Iterator[None]:
    """Python warnings become events, each once."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            tell(Warned(str(message).splitlines()[0][:300]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextmanager
def _signals() -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM asks the loop to stop after its step; a second one ends at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        stop.reason = number
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
