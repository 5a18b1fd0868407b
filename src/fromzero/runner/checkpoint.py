"""Checkpoints: a job and its progress in, a folder on the disk out that is whole or not there, and back, bit for bit.

checkpoints/latest step-N/weights.safetensors optimizer.safetensors [best.safetensors] progress.json manifest.json
Beside them, for a while: step-N.tmp-PID, not yet a checkpoint; step-N.gone-PID, no longer one; step-N.aside, damaged or about to be replaced.
What stands still is not written: the run builds it again from its source, and its digest is compared.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromzero.devices import generators
from fromzero.errors import Fault, SourceError
from fromzero.runner.assemble import Job
from fromzero.runner.loop import Best
from fromzero.runner.manifest import FORMAT, read_manifest, write_manifest, wrong_with
from fromzero.runner.numbers import refuse_not_finite
from fromzero.runner.progress import Progress
from fromzero.sources.cache import free_disk, sync_folder, write_whole
from fromzero.tuning import moving_state
from fromzero.weights import check_fit, read_tensors, write_tensors

LATEST = "latest"  # a file with the name of the newest checkpoint; it moves when all bytes of that are on the disk
WEIGHTS, OPTIMIZER, BEST, PROGRESS = "weights.safetensors", "optimizer.safetensors", "best.safetensors", "progress.json"
DRAWN = "random."  # in front of the names of torch's random states
OF_BEST = "best."  # in front of the names in best.safetensors: no name stands twice in a checkpoint, and other readers take all of it
FIXED = ("task", "model", "head", "freeze", "adapter", "optimizer.name", "precision", "seed")  # keys that say what saved tensors mean
_STEP, _LEFTOVER = re.compile(r"step-(\d+)(\.aside)?"), re.compile(r"step-\d+\.(tmp|gone)-\d+|\.latest\..*")


def refuse_broken(job: Job, progress: Progress, best: Best) -> None:
    """raises: NumbersError where weights or the optimizer's state, as a checkpoint would hold them, are no finite numbers"""
    for tensors in (moving_state(job.model, job.frozen), _flat(job.optimizer)[0], best.weights or {}):
        refuse_not_finite(tensors, job, progress.step)


def save(folder: Path, job: Job, progress: Progress, best: Best, *, keep: int, frozen: str) -> Path:
    """Write beside, sync, rename, sync; only then `latest` moves, and only then older ones are removed.

    frozen:   digest of what stands still
    returns:  the checkpoint's folder
    raises:   NumbersError for a value that is no finite number; OSError where it cannot be written. What was saved before is then as it was
    """
    refuse_broken(job, progress, best)
    files, numbers = _files(job, best)
    if 0 < free_disk(folder) < _bytes_of(files):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    target, beside = folder / f"step-{progress.step}", folder / f"step-{progress.step}.tmp-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        digests = {name: write_tensors(beside / name, tensors) for name, tensors in files.items()}
        state = json.dumps({"progress": asdict(progress), **numbers}, default=lambda array: array.tolist()).encode()
        write_whole(beside / PROGRESS, state)
        write_manifest(beside, {**digests, PROGRESS: hashlib.sha256(state).hexdigest()}, {"step": progress.step, **_origin(job, frozen)})
        if target.exists():
            _set_aside(target)
        os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(folder)
    write_whole(folder / LATEST, f"{target.name}\n".encode())
    steps = _steps(folder)
    whole = [step for step in steps if not step.suffix]
    for old in (*whole[keep:], *(step for step in steps if step.suffix)):
        _remove(old)
    return target


def bytes_needed(job: Job, best: Best) -> int:
    """What the tensors of a checkpoint take on the disk."""
    return _bytes_of(_files(job, best)[0])


def _bytes_of(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


def _files(job: Job, best: Best) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """The tensors of each file; what the optimizer and the random states hold beside tensors"""
    tensors, numbers = _flat(job.optimizer)
    drawn = generators.note(job.device)
    tensors |= {f"{DRAWN}{name}": drawn.pop(name) for name in ("torch", "cuda") if name in drawn}
    files = {WEIGHTS: moving_state(job.model, job.frozen), OPTIMIZER: tensors}
    if best.weights is not None:
        files[BEST] = {OF_BEST + name: tensor for name, tensor in best.weights.items()}
    return files, {"optimizer": numbers, "random": drawn}


def _origin(job: Job, frozen: str) -> dict[str, Any]:
    """What a checkpoint belongs to; of the recipe what differs from the defaults, so that a later version's new keys are no difference"""
    recipe = json.loads(job.plan.recipe.model_dump_json(by_alias=True, exclude_defaults=True))
    recipe["optimizer"] = {**recipe.get("optimizer", {}), "name": job.plan.recipe.optimizer.name}
    return {"recipe": recipe, "data": job.plan.facts.data.digest, "frozen": frozen}


def step_of(checkpoint: Path) -> int:
    """After how many steps it was written."""
    return int(checkpoint.stem.removeprefix("step-"))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, newest first; of a step those set aside last."""
    found = [(path, name) for path in folder.glob("step-*") if (name := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for path, name in sorted(found, key=lambda one: (-int(one[1][1]), one[1][2] or ""))]


def _set_aside(step: Path) -> None:
    aside = step.with_name(f"{step.name}.aside")
    if aside.exists():
        _remove(aside)
    os.rename(step, aside)


def _remove(step: Path) -> None:
    """Under another name first: half of a checkpoint is never taken for one"""
    leaving = step.with_name(f"{step.stem}.gone-{os.getpid()}")
    os.rename(step, leaving)
    shutil.rmtree(leaving)


def _flat(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for place, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"state.{place}.{key}"] = value
            elif value is not None:
                numbers[f"state.{place}.{key}"] = value
    return tensors, numbers


def find(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose every byte is as noted, and what was skipped and why.

    raises: SourceError where the newest is of a format that is not known yet: older ones would lose what it holds
    """
    skipped: dict[Path, str] = {}
    steps = _steps(folder)
    if (named := _latest(folder)) and named not in {step.stem for step in steps}:
        skipped[folder / named] = f"{LATEST} names it, and it is not there"
    for step in steps:
        wrong = wrong_with(step)
        if wrong:
            skipped[step] = wrong
            continue
        if (number := read_manifest(step)["format"]) > FORMAT:
            what = f"was written by a newer fromzero (format {number}; this one reads up to {FORMAT})"
            raise SourceError(what, mend="go on with that version, or remove it to go on from an older one", file=str(step))
        return step, skipped
    return None, skipped


def _latest(folder: Path) -> str:
    """What the pointer says; nothing where it is not there or spoiled, for it only helps to notice what is missing"""
    try:
        said = (folder / LATEST).read_text().strip()
    except (OSError, ValueError):
        return ""
    return said if _STEP.fullmatch(said) else ""


def tidy(folder: Path, damaged: Iterable[Path]) -> list[str]:
    """Take away what a killed save left, and set damaged checkpoints aside until the next save.  returns: what was done"""
    done = []
    for left in sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
        done.append(f"{left.name}, left by a save that did not end, was removed")
    for step in damaged:
        if step.is_dir() and not step.suffix:
            _set_aside(step)
            done.append(f"{step.name} was set aside as {step.name}.aside; the next save removes it")
    return done


def saved_weights(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Step and weights of the newest whole checkpoint; None where there is none."""
    path, _ = find(folder)
    return None if path is None else (step_of(path), read_tensors(path / WEIGHTS))


def restore(step: Path, job: Job, best: Best, *, frozen: str, other_data: bool = False) -> Progress:
    """Put weights, optimizer state and the random states back.

    other_data: that the data is not what it was is known and accepted

    raises: SourceError listing all by which it belongs to another run, model or data, or does not fit
    """
    manifest, weights = read_manifest(step), read_tensors(step / WEIGHTS)
    faults = [fault for fault in _of_another_run(step, manifest, job, frozen) if not (other_data and fault.key == "data")]
    try:
        check_fit(moving_state(job.model, job.frozen), weights, file=str(step))
    except SourceError as error:
        faults += error.faults
    if faults:
        raise SourceError(faults)
    job.model.load_state_dict(weights, strict=False)
    values = json.loads((step / PROGRESS).read_text())
    tensors = read_tensors(step / OPTIMIZER)
    drawn = {name.removeprefix(DRAWN): tensors.pop(name) for name in list(tensors) if name.startswith(DRAWN)}
    generators.put_back({**drawn, **values.get("random", {})}, job.device)  # fromzero 0.1.0 noted torch's alone
    _unflat(job.optimizer, tensors, values["optimizer"])
    if BEST in manifest["files"]:
        prefix = OF_BEST if manifest["format"] > 1 else ""
        best.weights = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(step / BEST).items()}
    try:
        return Progress(**values["progress"])
    except TypeError as error:
        raise SourceError(f"was written by another version ({error})", file=str(step)) from None


def _of_another_run(step: Path, manifest: Mapping[str, Any], job: Job, frozen: str) -> Iterator[Fault]:
    """What its manifest says otherwise than the job; one of format 1 says nothing"""
    if manifest["format"] == 1:
        return
    now, file = _origin(job, frozen), str(step)
    recipes = [dict(_keys(origin["recipe"])) for origin in (manifest, now)]
    for key in sorted(key for key in recipes[0].keys() | recipes[1].keys() if f"{key}.".startswith(tuple(f"{fixed}." for fixed in FIXED))):
        then, asked = (recipe.get(key, "left out") for recipe in recipes)
        if then != asked and not str(then).startswith("<given"):  # what came from Python is known by its tensors alone
            why = "the saved tensors would mean something else"
            yield Fault(f"was {then} when this was saved, and is {asked}", why, "put it back, or train anew", file, key=key)
    if manifest["data"] != now["data"]:
        what = f"was saved with other data, whose digest was {manifest['data'][:16]}…; it is {now['data'][:16]}…"
        yield Fault(what, "it stands at a place in the order of that data", "put the old data back, or train anew", file, key="data")
    if manifest["frozen"] != frozen:
        source, was = job.plan.recipe.model.source, manifest["frozen"][:16]
        what = f"what stands still in {source} is no longer what it was: its SHA-256 is {frozen[:16]}…, was {was}…"
        yield Fault(what, "what learned belongs to the weights beside which it learned", "put the old weights back", file, key="model")


def _keys(values: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values"""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", value


def _unflat(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
    state: dict[int, dict[str, Tensor | float]] = {}
    everything: dict[str, Tensor | float] = {**tensors, **numbers}
    for name, value in everything.items():
        _, place, key = name.split(".", 2)
        state.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
