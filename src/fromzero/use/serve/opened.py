"""The name of a model in, what can be served of it out: a speaker, a predictor or an embedder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fromzero.devices import look_at_machine
from fromzero.errors import ModelError
from fromzero.models import FAMILIES
from fromzero.runner.start import build_published, find_start
from fromzero.use.quantize import Cost, open_quick
from fromzero.use.serve.predicting import Embedder, Predictor, headless
from fromzero.use.speak import Speaker


@dataclass(frozen=True)
class Opened:
    """name: what requests call it; a folder or file of this machine goes by its last part, so that no path is told"""

    name: str
    does: Speaker | Predictor | Embedder

    @property
    def task(self) -> str:
        if isinstance(self.does, Speaker):
            return "chat" if self.does.chat is not None else "generate"
        return "predict" if isinstance(self.does, Predictor) else "embed"


def open_model(source: str, runs: Path, quantize: str | None = None) -> tuple[Opened, Cost | None]:
    """quantize: as in open_quick.  raises: ModelError, SourceError for what is not there or cannot be served"""
    start = find_start(source, (Path(),), runs)
    name = Path(source).resolve().name if Path(source).exists() else source
    if start.saved is not None and start.saved.task in ("classify", "regress"):
        _refuse(quantize, source)
        return Opened(name, Predictor(start.saved, start.saved.load())), None
    family = FAMILIES.get(str(start.config.get("model_type")))
    if start.saved is None and start.published is not None and family is not None and not family.speaks:
        if family.reads != "text" or start.tokenizer is None:
            raise ModelError(f"'{source}' has no classes of its own to name", mend="train it on data of yours, and serve the run")
        _refuse(quantize, source)
        model = headless(build_published(start.published, {}, per_token=False)[0].eval(), source)
        return Opened(name, Embedder(model.to(look_at_machine().device), start.tokenizer)), None
    speaker, cost = open_quick(source, runs, quantize)
    return Opened(name, replace(speaker, name=name)), cost


def _refuse(quantize: str | None, source: str) -> None:
    if quantize is not None:
        raise ModelError(f"'{source}' does not go on with text", why="only such models are quantised", mend="leave out --quantize")
