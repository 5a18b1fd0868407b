"""Checkpoints: a job and its progress in, a folder on the disk out that is whole or not there, and back, bit for bit.

checkpoints/step-N/weights.safetensors optimizer.safetensors [best.safetensors] progress.json manifest.json
What stands still is not written: the run builds it again from its source, and its digest is compared.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fromzero.errors import SourceError
from fromzero.runner.assemble import Job
from fromzero.runner.loop import Best
from fromzero.runner.progress import Progress
from fromzero.sources.cache import digest_of, write_whole
from fromzero.tuning import moving_state
from fromzero.weights import check_fit, read_tensors, write_tensors

MANIFEST = "manifest.json"


def save(folder: Path, job: Job, progress: Progress, best: Best, *, keep: int) -> Path:
    """Write beside, sync, rename; only then are older ones removed.  returns: the checkpoint's folder"""
    target = folder / f"step-{progress.step}"
    beside = folder / f"step-{progress.step}.tmp-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write_tensors(beside / "weights.safetensors", moving_state(job.model, job.frozen))
    tensors, numbers = _flat(job.optimizer)
    tensors["random.torch"] = torch.get_rng_state()
    if job.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(job.device)
    write_tensors(beside / "optimizer.safetensors", tensors)
    if best.weights is not None:
        write_tensors(beside / "best.safetensors", best.weights)
    write_whole(beside / "progress.json", json.dumps({"progress": asdict(progress), "optimizer": numbers}).encode())
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest_of(p)} for p in sorted(beside.iterdir())}
    write_whole(beside / MANIFEST, json.dumps({"step": progress.step, "files": files}, indent=1).encode())
    _sync(beside)
    if target.exists():
        shutil.rmtree(target)
    os.rename(beside, target)
    _sync(folder)
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old)
    return target


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, newest first."""
    found = [p for p in folder.glob("step-*") if p.suffix == "" and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step-")))


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


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as noted, and what was skipped and why."""
    skipped: list[str] = []
    for step in _steps(folder):
        wrong = _wrong_with(step)
        if not wrong:
            return step, skipped
        skipped.append(f"{step.name} was skipped: {wrong}")
    return None, skipped


def _wrong_with(step: Path) -> str:
    try:
        files = json.loads((step / MANIFEST).read_text())["files"]
        for name, noted in files.items():
            path = step / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != noted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {noted['bytes']} were written"
            if digest_of(path) != noted["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return ""


def saved_weights(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Step and weights of the newest whole checkpoint; None where there is none."""
    path, _ = find(folder)
    return None if path is None else (int(path.name.removeprefix("step-")), read_tensors(path / "weights.safetensors"))


def restore(step: Path, job: Job, best: Best) -> Progress:
    """Put weights, optimizer state and torch's random state back.  raises: SourceError where they do not fit"""
    weights = read_tensors(step / "weights.safetensors")
    check_fit(moving_state(job.model, job.frozen), weights, file=str(step))
    job.model.load_state_dict(weights, strict=False)
    values = json.loads((step / "progress.json").read_text())
    tensors = read_tensors(step / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("random.torch"))
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("random.cuda"), job.device)
    _unflat(job.optimizer, tensors, values["optimizer"])
    if (step / "best.safetensors").is_file():
        best.weights = read_tensors(step / "best.safetensors")
    try:
        return Progress(**values["progress"])
    except TypeError as error:
        raise SourceError(f"was written by another version ({error})", file=str(step)) from None


def _unflat(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
    state: dict[int, dict[str, Tensor | float]] = {}
    everything: dict[str, Tensor | float] = {**tensors, **numbers}
    for name, value in everything.items():
        _, place, key = name.split(".", 2)
        state.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
