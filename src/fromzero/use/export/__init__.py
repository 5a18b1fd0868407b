"""Export: a model in, a folder that other programs open out. It is opened again and compared before it gets its name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import fromzero.use.export.gguf as gguf
import fromzero.use.export.hf as hf
import fromzero.use.export.onnx as onnx
import fromzero.use.export.peft as peft
import fromzero.use.export.program as program
import fromzero.use.export.weights as weights
from fromzero.errors import ModelError, UserError, did_you_mean
from fromzero.retired import renamed
from fromzero.use.export.card import write_card
from fromzero.use.export.compare import Compared
from fromzero.use.export.subject import Subject, open_subject

__all__ = ["FORMATS", "Exported", "Format", "export"]


@dataclass(frozen=True)
class Format:
    """What can be written.

    write:     a subject, and an empty folder that it fills → what was compared.  raises: ModelError beyond a bound
    refusal:   why there is no such file of a subject; empty where there is one
    opens:     how others open the folder, in their words
    adapters:  whether it holds adapters and not plain matrices
    numbers:   the kinds of numbers that its file may have, the usual one first
    """

    write: Callable[[Subject, Path], list[Compared]]
    refusal: Callable[[Subject], str]
    opens: str
    adapters: bool = False
    numbers: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "hf": Format(hf.write, hf.refusal, hf.OPENS),
    "peft": Format(peft.write, peft.refusal, peft.OPENS, adapters=True),
    "gguf": Format(gguf.write, gguf.refusal, gguf.OPENS, numbers=gguf.NUMBERS),
    "onnx": Format(onnx.write, onnx.refusal, onnx.OPENS),
    "torch": Format(program.write, program.refusal, program.OPENS),
    "safetensors": Format(weights.write, weights.refusal, weights.OPENS),
}


@dataclass(frozen=True)
class Exported:
    """The folder, its bytes, on what it was compared, and how each reader of it did."""

    folder: Path
    to: str
    bytes: int
    inputs: str
    compared: tuple[Compared, ...]

    def __str__(self) -> str:
        said = [f"{self.folder}: {self.bytes / 1e6:,.1f} MB, compared on {self.inputs}", *map(str, self.compared)]
        return "\n  ".join([*said, f"open it: {FORMATS[self.to].opens}"])

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder), "compared": [asdict(one) for one in self.compared]}


def export(
    source: str,
    to: str,
    output: Path,
    runs: Path,
    *,
    given: nn.Module | None = None,
    merged: bool | None = None,
    numbers: str | None = None,
) -> Exported:
    """Write a model's folder as `to` wants it.

    source:   `run:NAME`, a folder, a file or any published source
    given:    the module, where a run's was given from Python and cannot be rebuilt
    merged:   what adapters learned as plain matrices, or as adapters; None: as the format has it
    raises:   UserError for a format that is not known, or does not hold what is asked; ModelError for a model that the format has
              no place for, or where the folder computes something else
    """
    to = renamed("export --to", to)
    if to not in FORMATS:
        raise UserError(f"'{to}' is no format of export", mend=did_you_mean(to, FORMATS) or f"there is {', '.join(FORMATS)}")
    form = FORMATS[to]
    if merged is not None and merged == form.adapters:
        fits = ", ".join(name for name, other in FORMATS.items() if other.adapters != merged)
        what = "plain matrices" if merged else "adapters"
        raise UserError(f"{to} does not hold {what}", why="each format holds one of the two", mend=f"for {what}: --to {fits}")
    if numbers is not None and numbers not in form.numbers:
        mend = did_you_mean(numbers, form.numbers) or f"there is {', '.join(form.numbers)}" if form.numbers else "only gguf has a choice"
        raise UserError(f"{to} has no numbers '{numbers}'", mend=mend)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError("holds something already", why="an export fills a folder of its own", mend="name a new folder", file=str(output))
    subject = open_subject(source, runs, given=given, numbers=numbers or next(iter(form.numbers), ""))
    if reason := form.refusal(subject):
        fits = ", ".join(name for name, other in FORMATS.items() if not other.refusal(subject))
        raise ModelError(f"'{source}' cannot become {to}: {reason}", mend=f"it can become {fits}" if fits else "fz.load opens it in Python")
    return _written(subject, to, output)


def _written(subject: Subject, to: str, output: Path) -> Exported:
    """Beside its place first, and removed again where it is not the same model."""
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        compared = tuple(FORMATS[to].write(subject, beside))
        write_card(beside, subject, to, FORMATS[to].opens, compared)
        size = sum(path.stat().st_size for path in beside.rglob("*") if path.is_file())
        beside.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        os.replace(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(output, to, size, subject.compared_on, compared)
