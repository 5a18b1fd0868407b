"""torch: a model in, a torch.export program (.pt2) out, which torch.export.load opens without fromzero. Inputs come prepared."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import fromzero.use.export.traced as traced
from fromzero.errors import ModelError
from fromzero.use.export.compare import Compared, compare
from fromzero.use.export.subject import Subject

OPENS = "torch.export.load(FOLDER/model.pt2).module()"
FILE = "model.pt2"


def refusal(subject: Subject) -> str:
    return traced.refusal(subject)


def write(subject: Subject, folder: Path) -> list[Compared]:
    made = traced.trace(subject)
    torch.export.save(program(made), folder / FILE)
    again = torch.export.load(folder / FILE).module()
    with torch.no_grad():
        return [max((compare("torch.export", said[0], again(*given)) for given, said in made.cases), key=lambda one: one.difference or 0)]


def program(made: traced.Traced) -> torch.export.ExportedProgram:
    """raises: ModelError with torch's reason, where the model is code that cannot be traced"""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")  # recurrent layers keep a list beside
            return torch.export.export(made.module, made.example, dynamic_shapes=made.moving, strict=False)
    except Exception as error:  # whatever a person's own module and torch's tracing raise
        said = f"torch.export cannot follow the model: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        raise ModelError(said, mend="what depends on values, not shapes, cannot stand in a program; fz.load opens it in Python") from error
