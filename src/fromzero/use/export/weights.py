"""safetensors: a run's model in, its tensors under our own names and a model.json out, which fz.load opens anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fromzero.runner.saved import read_model, write_model
from fromzero.use.export.compare import Compared, compare
from fromzero.use.export.subject import Subject

OPENS = "fz.load(FOLDER), or safetensors.torch.load_file(FOLDER/model.safetensors)"


def refusal(subject: Subject) -> str:
    if subject.start.saved is None:
        return "it is no run of fromzero, which would say how inputs and answers are prepared"
    if subject.design.blueprint is None or subject.design.blueprint.kind in ("code", "hub"):
        return "its class is code of its own, which is run from nowhere but the folder of your runs"
    return ""


def write(subject: Subject, folder: Path) -> list[Compared]:
    assert subject.start.saved is not None
    saved = replace(subject.start.saved, folder=folder, plain=True, design=replace(subject.design, adapted=None))
    write_model(folder, saved, subject.model.state_dict(), None)
    with torch.no_grad():
        return [compare("fromzero", subject.said, read_model(folder).load()(*subject.inputs))]
