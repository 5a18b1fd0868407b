"""peft: a run with adapters in, the folder that PEFT opens beside the base out: the run's own two files."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from fromzero.models.foreign import opened_by_transformers
from fromzero.runner.start import build_published
from fromzero.use.export.compare import Compared, absent, compare
from fromzero.use.export.subject import Subject
from fromzero.weights import open_pretrained
from fromzero.weights.peft import CONFIG, TENSORS

OPENS = "peft: PeftModel.from_pretrained(BASE, FOLDER)"
_FILES = (CONFIG, TENSORS, "tokenizer.json", "tokenizer_config.json")


def refusal(subject: Subject) -> str:
    saved = subject.start.saved
    if saved is None or saved.design.adapted is None:
        return "it was not trained with adapters"
    if not (saved.folder / CONFIG).is_file():
        return "its adapters learned beside weights that have no name others know"
    if (saved.folder / "rest.safetensors").is_file():
        return "PEFT's files have no place for all that it learned (rest.safetensors)"
    return ""


def write(subject: Subject, folder: Path) -> list[Compared]:
    assert subject.start.saved is not None
    for name in _FILES:
        if (path := subject.start.saved.folder / name).is_file():
            shutil.copyfile(path, folder / name)
    again = build_published(open_pretrained(str(folder)), {}, per_token=subject.reads == "language")[0].eval()
    with torch.no_grad():
        found = [compare("fromzero, base and adapter summed,", subject.said, again(*subject.inputs))]
    base = Path(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"] or "")
    if find_spec("peft") is None or find_spec("transformers") is None or not (base / "config.json").is_file():
        return [*found, absent("peft", "or its base is no folder here that transformers opens")]
    theirs = opened_by_transformers(folder, "CausalLM" if subject.reads == "language" else "SequenceClassification", base=base)
    return [*found, compare("peft", subject.said, theirs.scores(subject.documents))]
