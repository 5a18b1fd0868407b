"""Export: a model in, a folder that other libraries open out. It is opened again and compared before it gets its name.

What adapters learned stands in plain matrices there, so that whoever opens the folder needs neither adapters nor fromzero.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.errors import ModelError, UserError, did_you_mean
from fromzero.models import Decoder
from fromzero.models.foreign import scores_by_transformers
from fromzero.runner.saved import Design
from fromzero.runner.start import Start, build_published, find_start, published_of
from fromzero.weights import open_pretrained, to_theirs, write_folder
from fromzero.weights.tensors import first_not_finite

FORMATS = ("transformers",)
DIFFERENCE = 1e-4  # of what the two say, relative to the largest; float32 in another order of operations stays below
COMPARED = (40, 24)  # tokens of two documents that both read


@dataclass(frozen=True)
class Exported:
    """The folder, its bytes, and how far from the model it computes: opened by us, and by transformers where that is installed."""

    folder: Path
    bytes: int
    difference: float
    difference_transformers: float | None

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}


def export(source: str, to: str, output: Path, runs: Path) -> Exported:
    """Write a language model's folder as `to` wants it.

    source:  `run:NAME`, a folder, a file or any published source
    raises:  UserError for a format that is not known or a folder that holds something; ModelError for a model that the format
             has no place for, or where the folder computes something else
    """
    if to not in FORMATS:
        raise UserError(f"'{to}' is no format of export", mend=did_you_mean(to, FORMATS) or f"there is {', '.join(FORMATS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError("holds something already", mend="name a new folder", file=str(output))
    start = find_start(source, (Path(),), runs)
    model, design = _whole(start, source)
    tensors = _published(model, design, source)
    config = start.saved.config if start.saved is not None else design.family.written(**design.blueprint.options)  # type: ignore[union-attr]
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        write_folder(beside, config, tensors, tokenizer=start.tokenizer, **start.accompanying)
        size = sum(path.stat().st_size for path in beside.iterdir())
        ours, theirs = _compared(model, beside)
        beside.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        os.replace(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(output, size, ours, theirs)


def _whole(start: Start, source: str) -> tuple[nn.Module, Design]:
    """The model with plain matrices only, in eval mode."""
    if start.saved is not None:
        return start.saved.load(merge=start.saved.design.adapted is not None), start.saved.design
    model, design = build_published(published_of(start, source), {})
    return model.eval(), design


def _published(model: nn.Module, design: Design, source: str) -> dict[str, Tensor]:
    """The tensors under their published names.  raises: ModelError where one has none, or is no finite number"""
    if design.family is None or not isinstance(model, Decoder):
        what = "is no language model of a family that transformers knows"
        raise ModelError(f"'{source}' {what}", why="its folder would be one that nothing opens", mend="fz.load opens it in Python")
    names, state = design.names(), model.state_dict()
    if wrong := first_not_finite(state):
        raise ModelError(f"'{source}': {wrong}", why="whoever opened the folder would get NaN for every text", mend="export another run")
    if left := [name for name in state if name not in names]:
        raise ModelError(f"'{source}' has tensors that its family has no place for: {', '.join(left[:3])}")
    return to_theirs(state, {ours: theirs for ours, theirs in names.items() if ours in state})


@torch.no_grad()
def _compared(model: nn.Module, folder: Path) -> tuple[float, float | None]:
    """The largest difference of what model and folder say, by our reading and by transformers'.  raises: ModelError above the bound"""
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(model.config.vocabulary, (length,), generator=generator) for length in COMPARED]
    offsets = torch.tensor([0, *COMPARED]).cumsum(0)
    wanted = model(torch.cat(parts), offsets)
    again = build_published(open_pretrained(str(folder)), {})[0].eval()
    found = {"fromzero": _difference(wanted, again(torch.cat(parts), offsets))}
    del again
    if find_spec("transformers") is not None:
        found["transformers"] = _difference(wanted, scores_by_transformers(folder, parts, per_token=model.outputs is None))
    if wrong := [f"{reader} by {far:.1e}" for reader, far in found.items() if not far <= DIFFERENCE]:
        raise ModelError(
            f"the folder computes something else than the model: {', '.join(wrong)}", why=f"{DIFFERENCE:.0e} is allowed; it was not kept"
        )
    return found["fromzero"], found.get("transformers")


def _difference(wanted: Tensor, found: Tensor) -> float:
    return ((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
