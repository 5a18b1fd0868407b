"""Execute: a plan in, a finished run out: folder, observers, signals, checkpoints and the result around the loop."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fromzero.data import Loaded
from fromzero.devices import give_back_memory, held_memory, keep_freed_memory, peak_memory
from fromzero.devices.generators import lent, seed_all
from fromzero.errors import FromzeroError, Interrupted, NumbersError, SourceError, UserError, out_of_memory
from fromzero.planner.values import Plan
from fromzero.report.events import Evaluated, Event, Finished, Planned, Saved, Saving, Started, StepDone, Warned
from fromzero.report.jsonlines import EVENTS, has_saved, roll_back
from fromzero.report.summary import format_bytes
from fromzero.runner import checkpoint, ledger
from fromzero.runner.around import Stop, full_disk, signals, spoken_once, teller
from fromzero.runner.assemble import Job, Place, assemble
from fromzero.runner.begun import Going, go_on_with, refuse_done, refuse_no_way_on
from fromzero.runner.folder import RESULT
from fromzero.runner.lock import holding
from fromzero.runner.loop import Best, is_over, train
from fromzero.runner.prefix import keep_prefix, still_the_same
from fromzero.runner.probe_inputs import keep_probe
from fromzero.runner.progress import Progress
from fromzero.runner.regions import make_plain
from fromzero.runner.samples import samples
from fromzero.runner.saved import write_model
from fromzero.sources.cache import FULL, free_disk, remove_unfinished, write_whole
from fromzero.tuning import frozen_digest

SAVE_SECONDS = 60.0  # save.every: auto waits at least this long between two checkpoints
GIVE_BACK_SECONDS = 5.0  # at least between two times that freed memory goes back, for the next step takes it anew
SAMPLES = "samples.json"


@dataclass(frozen=True)
class Outcome:
    """A run that ended: its result (what `train --json` prints), and the module with the weights it keeps."""

    folder: Path
    result: dict[str, Any]
    model: nn.Module


def execute(
    plan: Plan, loaded: Loaded, place: Place, folder: Path, observers: Sequence[Callable[[Event], None]], *, going: Going | None = None
) -> Outcome:
    """Train into a folder, from the start or from its newest whole checkpoint.

    going:  how a run goes on, None for one that begins; one that was broken off before its first checkpoint begins anew
    raises: Interrupted after saving on Ctrl-C or SIGTERM; NumbersError where the numbers or limits.seconds stop it; UserError for a full disk
    """
    tell = teller(observers, goes_on=plan.recipe.save.full == "go_on")
    with holding(folder), full_disk(folder), lent(plan.recipe.seed), spoken_once(tell), signals() as stop:
        torch.set_num_threads(plan.threads)
        if plan.keep_memory:
            keep_freed_memory()
        newest, damaged = (None, {}) if going is None else _newest(going)
        job = assemble(plan, loaded, place)
        seed_all(plan.recipe.seed)  # the draws of training do not depend on how the model was built
        before = frozen_digest(job.model, job.frozen)
        run = _Run(job, before, folder, tell, stop)
        if newest is not None:
            run.go_on_from(newest, other_data=bool(going is not None and going.data))
        if going is not None:
            refuse_no_way_on(going, plan, run.progress)  # nothing was touched until here
            _roll_back(folder, newest, damaged, tell)
            for warned in go_on_with(going, plan, loaded, place, run.progress):
                tell(warned)
        tell(_planned(plan, folder))
        tell(Started(folder.name, str(folder), run.progress.step, time.time()))
        if plan.prefix:
            begun = time.perf_counter()
            keep_prefix(job, before, tell, run.heed)
            run.progress.seconds += time.perf_counter() - begun
        status, error = run.train()
        if frozen_digest(job.model, job.frozen) != before or not still_the_same(job):
            raise FromzeroError("a frozen layer has changed during training", mend="please report it, with the recipe")
        run.last_words(status)
        if status == "done":  # what only further steps would need makes room for what is written
            job.optimizer.zero_grad()
            job.optimizer.state.clear()
        make_plain(job.model)  # what it is saved with is what it says by itself, and needs no code compiled for other lengths
        result = run.finish(status)
    if error is not None:
        raise error
    return Outcome(folder, result, job.model.eval())


class _Run:
    """What surrounds the loop: when to save, and what is left at the end."""

    def __init__(self, job: Job, frozen: str, folder: Path, tell: Callable[[Event], None], stop: Stop) -> None:
        self.job, self.frozen, self.folder, self.tell, self.stop = job, frozen, folder, tell, stop
        self.progress, self.best = Progress(), Best()
        self.saved_at, self.saved_step, self.unsaved = time.monotonic(), 0, False
        self.stopped_by: NumbersError | None = None
        self.torn = False  # an update may have been begun and not ended
        self.spoiled = False  # the last weights are not to be kept
        self.gave_back_at = 0.0

    def go_on_from(self, newest: Path, *, other_data: bool) -> None:
        """other_data: the data is not what it was, and a person has accepted that"""
        self.progress = checkpoint.restore(newest, self.job, self.best, frozen=self.frozen, other_data=other_data)
        self.saved_step = self.progress.step

    def heed(self) -> None:
        """Between the batches of what comes before the first step.  raises: Interrupted where a signal has come"""
        self._keep_to_the_plan()
        if self.stop.reason is not None:
            raise self._interrupted(f"before step {self.progress.step + 1}", "nothing new was to be saved")

    def _interrupted(self, when: str, saved: str) -> Interrupted:
        assert isinstance(self.stop.reason, int)
        mend = f"fromzero resume {self.folder.name} goes on from there"
        return Interrupted(f"stopped {when} of {self.job.plan.steps}, {saved}", code=128 + self.stop.reason, mend=mend)

    def train(self) -> tuple[str, FromzeroError | None]:
        recipe, plan = self.job.plan.recipe, self.job.plan
        if self.progress.step == 0:
            self.sample()
        self.heed()
        for event in self._loop():
            self.tell(event)
            if isinstance(event, StepDone):
                self._keep_to_the_plan()
            elif isinstance(event, Evaluated) and (recipe.task == "language" or self.progress.step == plan.steps):
                self.sample()
        if self.stopped_by is not None:
            return "stopped", self.stopped_by
        if is_over(plan, self.progress):
            return "done", None
        if self.stop.reason == "seconds":
            return "stopped", NumbersError(
                f"limits.seconds: {recipe.limits.seconds:g} seconds are over after step {self.progress.step} of {plan.steps}",
                mend=f"fromzero resume {self.folder.name} goes on",
            )
        return "interrupted", self._interrupted(f"after step {self.progress.step}", "saved")

    def _loop(self) -> Iterator[Event]:
        """The loop's events, until numbers or memory stop it; what cannot be written is raised, and ends the run as it stands."""
        try:
            yield from train(self.job, self.progress, self.best, self._stopping)
        except NumbersError as error:
            self.stopped_by = error
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.torn = self.spoiled = True
            said = f"memory is out after step {self.progress.step} of {self.job.plan.steps}, where nothing can begin anew"
            why = "the last checkpoint is as it was" if self.saved_step else "there was no checkpoint yet"
            mend = f"free some, then fromzero resume {self.folder.name}; or take a smaller batch or model"
            self.stopped_by = NumbersError(said, why=why, mend=mend)
        try:
            checkpoint.refuse_broken(self.job, self.progress, self.best)
        except NumbersError as error:
            self.spoiled, self.stopped_by = True, self.stopped_by or error

    def _stopping(self) -> bool:
        """Asked when a step and its evaluation are over: what is saved here is all of them, or none."""
        self._maybe_save()
        limit = self.job.plan.recipe.limits.seconds
        if self.stop.reason is None and limit is not None and self.progress.seconds > limit:
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

    def sample(self) -> None:
        began = time.perf_counter()
        for event in samples(self.job, self.progress.step):
            self.progress.sampled.append(asdict(event))
            self.tell(event)
        if self.progress.step in (0, self.job.plan.steps):  # in between the loop's own clock counts it
            self.progress.seconds += time.perf_counter() - began

    def save(self, *, last: bool = False) -> None:
        """last: nothing is trained after it, so that a full disk is no thing to go on with

        raises: UserError where it cannot be written, NumbersError where it holds what is no finite number
        """
        asked, step = self.job.plan.recipe.save, self.progress.step
        self.tell(Saving(step))
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
        """A run that was stopped is saved where it stands, so that it can go on; where its numbers are spoiled, the last checkpoint stays."""
        if status != "done" and self.progress.step and self.progress.step != self.saved_step and not self.spoiled:
            self.save(last=True)

    def finish(self, status: str) -> dict[str, Any]:
        """Write the model, the row of the ledger, and last the result: a run whose result says done is never gone on with.

        The model gets the best weights, or the last; where the last are spoiled, those of the newest checkpoint; without one none is written.
        """
        last = {name: tensor.detach() for name, tensor in self.job.model.state_dict().items()}
        kept, spoiled = self.best.weights or {}, self.spoiled
        step: int | None = self.progress.best_step if kept else self.progress.step
        if spoiled and not kept:
            step, kept = checkpoint.saved_weights(self.folder / "checkpoints") or (None, {})
        if spoiled and self.progress.kept is not None and self.progress.kept["step"] != step:
            self.progress.kept = None
        if kept or not spoiled:
            folder, older = self.folder / "model", bool(kept) and step != self.progress.step and not spoiled
            saved = replace(self.job.saved, folder=folder)
            write_model(folder, saved, {**last, **kept}, last if older else None, infinite=self.job.infinite)
            self.job.model.load_state_dict({**last, **kept})
            if not self.torn:
                keep_probe(folder, self.job)
        if self.progress.sampled:
            write_whole(self.folder / SAMPLES, json.dumps(self.progress.sampled, indent=1, ensure_ascii=False).encode())
        result = self._result(status, step)
        if (warned := ledger.enter(self.folder, self.job.plan, result)) is not None:
            self.tell(warned)
        self.tell(Finished(status, self.progress.step, self.progress.seconds, result))
        write_whole(self.folder / RESULT, json.dumps(result, indent=1).encode())
        return result

    def _result(self, status: str, step: int | None) -> dict[str, Any]:
        """step: whose weights are kept; None where none are"""
        plan, progress, kept = self.job.plan, self.progress, self.progress.kept
        seconds, text = max(progress.seconds, 1e-9), plan.facts.data.text
        validated = {"loss": kept["loss"], **kept["metrics"]} if kept is not None else {}
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
            "kept_step": step,
            "skipped_steps": progress.skipped,
            "grade": plan.grade,
        }


def _planned(plan: Plan, folder: Path) -> Planned:
    return Planned(
        folder.name, plan.steps, plan.steps_per_epoch, plan.facts.model.parameters, plan.trainable_parameters, plan.predicted_seconds
    )


def _newest(going: Going) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, None where the run was broken off before its first; and what is wrong with newer ones.

    raises: UserError where the run has come to its end; SourceError where there are checkpoints and none is whole: never from the start,
            which only a person can ask for
    """
    if going.done_at is None:
        refuse_done(going.begun, {})  # once more, now that the folder is held: another process may have come to the end
    folder = going.begun.folder
    step, damaged = checkpoint.find(folder / "checkpoints")
    if step is None and (damaged or has_saved(folder / EVENTS)):
        raise SourceError(
            "has no whole checkpoint to go on from",
            why="; ".join(_skipped(damaged)),
            mend="fromzero train its recipe.yaml starts anew",
            file=str(folder),
        )
    return step, damaged


def _skipped(damaged: Mapping[Path, str]) -> list[str]:
    return [f"{path.name} was skipped: {wrong}" for path, wrong in damaged.items()]


def _roll_back(folder: Path, newest: Path | None, damaged: Mapping[Path, str], tell: Callable[[Event], None]) -> None:
    """The log goes back to the checkpoint, and what a killed save left is taken away."""
    kept_in = folder / "checkpoints"
    roll_back(folder / EVENTS, -1 if newest is None else checkpoint.step_of(newest))
    where = "it begins anew" if newest is None else f"training goes on from {newest.name}"
    left = [
        f"{name}, left by a run that was killed, was removed" for part in (folder, folder / "model") for name in remove_unfinished(part)
    ]
    for what in (*_skipped(damaged), *(checkpoint.tidy(kept_in, damaged) if kept_in.is_dir() else ()), *left):
        tell(Warned(what, where))
