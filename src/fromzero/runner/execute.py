"""Execute: a plan in, a finished run out: folder, observers, signals, checkpoints and the result around the loop."""

from __future__ import annotations

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
from fromzero.errors import FromzeroError, Interrupted, NumbersError, SourceError
from fromzero.planner.values import Plan
from fromzero.report.events import Evaluated, Event, Finished, Planned, Sampled, Saved, Started, StepDone, Warned
from fromzero.runner import checkpoint, ledger
from fromzero.runner.assemble import Job, Place, assemble
from fromzero.runner.folder import RESULT
from fromzero.runner.lock import holding
from fromzero.runner.loop import Best, train
from fromzero.runner.prefix import keep_prefix, still_the_same
from fromzero.runner.probe_inputs import keep_probe
from fromzero.runner.progress import Progress
from fromzero.runner.samples import samples
from fromzero.runner.saved import write_model
from fromzero.sources.cache import write_whole
from fromzero.tuning import frozen_digest

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

    raises: Interrupted after saving on Ctrl-C or SIGTERM; NumbersError where the numbers or limits.seconds stop it
    """

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    with holding(folder), torch.random.fork_rng(devices=[]), _spoken_once(tell), _signals() as stop:
        torch.set_num_threads(plan.threads)
        if plan.keep_memory:
            keep_freed_memory()
        torch.manual_seed(plan.recipe.seed)
        job = assemble(plan, loaded, place)
        torch.manual_seed(plan.recipe.seed)  # the draws of training do not depend on how the model was built
        progress, best = Progress(), Best()
        if resume:
            progress = _go_on(folder, job, best, tell)
        tell(_planned(plan, folder))
        tell(Started(folder.name, str(folder), progress.step, time.time()))
        before = frozen_digest(job.model, job.frozen)
        if plan.prefix:
            begun = time.perf_counter()
            keep_prefix(job, before, tell)
            progress.seconds += time.perf_counter() - begun
        run = _Run(job, progress, best, folder, tell, stop)
        status, error = run.train()
        if frozen_digest(job.model, job.frozen) != before or not still_the_same(job):
            raise FromzeroError("a frozen layer has changed during training", mend="please report it, with the recipe")
        run.last_words(status)
        if status == "done":  # what only further steps would need makes room for what is written
            job.optimizer.zero_grad()
            job.optimizer.state.clear()
        result, kept = run.finish(status)
        job.model.load_state_dict(kept)
        keep_probe(folder / "model", job)
        tell(Finished(status, progress.step, progress.seconds, result))
    if error is not None:
        raise error
    return Outcome(folder, result, job.model.eval())


class _Run:
    """What surrounds the loop: when to save, and what is left at the end."""

    def __init__(self, job: Job, progress: Progress, best: Best, folder: Path, tell: Callable[[Event], None], stop: Stop) -> None:
        self.job, self.progress, self.best, self.folder, self.tell, self.stop = job, progress, best, folder, tell, stop
        self.saved_at, self.saved_step = time.monotonic(), progress.step
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
        try:
            for event in train(self.job, self.progress, self.best, self._stopping):
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
        except NumbersError as error:
            return "stopped", error
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

    def save(self) -> None:
        path = checkpoint.save(self.folder / "checkpoints", self.job, self.progress, self.best, keep=self.job.plan.recipe.save.keep)
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        self.tell(Saved(self.progress.step, str(path)))

    def last_words(self, status: str) -> None:
        """A run that was stopped is saved where it stands, so that it can go on."""
        if status != "done" and self.progress.step and self.progress.step != self.saved_step:
            self.save()

    def finish(self, status: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Write the model, the result, and the row of the ledger."""
        last = {name: tensor.detach() for name, tensor in self.job.model.state_dict().items()}
        kept = last if self.best.weights is None else {**last, **self.best.weights}
        older = self.best.weights is not None and self.progress.best_step != self.progress.step
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


def _go_on(folder: Path, job: Job, best: Best, tell: Callable[[Event], None]) -> Progress:
    step, skipped = checkpoint.find(folder / "checkpoints")
    for what in skipped:
        tell(Warned(what))
    if step is None:
        raise SourceError(
            "has no whole checkpoint to go on from",
            why="; ".join(skipped),
            mend="fromzero train its recipe.yaml starts anew",
            file=str(folder),
        )
    return checkpoint.restore(step, job, best)


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
