"""Engine: who is to run a model that goes on with text, and which one in, a Speaker out. Chooses no token and reads no text."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fromzero.use.export.gguf as gguf
from fromzero.errors import UserError, did_you_mean
from fromzero.runner.saved import SavedModel
from fromzero.sources.cache import cache_folder, locked, make_room
from fromzero.use.export import export
from fromzero.use.llama import LlamaCpp, library
from fromzero.use.quantize import open_quick
from fromzero.use.speak import Speaker, speaker_of, start_of_speech
from fromzero.weights import locate
from fromzero.weights.peft import CONFIG

ENGINES = ("fromzero", "llama.cpp")
USUAL = "q8_0"


def open_with(
    engine: str,
    source: str,
    runs: Path,
    *,
    quantize: str | None = None,
    numbers: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Speaker:
    """A model that can speak, run by fromzero or by llama.cpp: text, tokens, template, ends and the choice of each token are the same.

    quantize: int8 or int4, of fromzero's own
    numbers:  of the GGUF file that llama.cpp runs; None: USUAL, or those of the source where it is such a file already
    say:      hears in one line what is run, or what quantising costs
    raises:   UserError for another engine, or what belongs to the other one; what open_quick, export and LlamaCpp raise
    """
    if engine not in ENGINES:
        raise UserError(f"'{engine}' is no engine", mend=did_you_mean(engine, ENGINES) or f"there is {', '.join(ENGINES)}", key="engine")
    if engine == "fromzero":
        if numbers is not None:
            why = "fromzero runs the numbers that the model has"
            raise UserError(f"numbers {numbers} are of another engine", why=why, mend="--engine llama.cpp", key="numbers")
        speaker, cost = open_quick(source, runs, quantize)
        if cost is not None:
            say(str(cost))
        return speaker
    if quantize is not None:
        raise UserError(f"--quantize {quantize} is of fromzero's own engine", mend="--numbers q8_0 or q4_0", key="engine")
    version = library().__version__
    start = start_of_speech(source, runs)
    path = start.saved.folder if start.saved is not None else locate(source)[0]
    said = "as it is"
    if numbers is not None or path.suffix.lower() != ".gguf":
        kind = numbers or USUAL
        path, fresh = _written(source, runs, path, start.saved, kind)
        said = f"{kind}, {'written and compared now' if fresh else 'written before'}"
    say(f"llama.cpp (llama-cpp-python {version}) runs {path} ({path.stat().st_size / 1e6:,.1f} MB, {said})")
    return speaker_of(source, start, LlamaCpp(path, whole=numbers == "f32").eval())


def _written(source: str, runs: Path, path: Path, saved: SavedModel | None, numbers: str) -> tuple[Path, bool]:
    """The cache's GGUF file of a model as its files are now, and whether it was written just now"""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    files.append(Path(gguf.__file__))  # what a newer fromzero writes may differ
    stamps = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    if saved is None and (path / CONFIG).is_file():
        stamps.append(("its base may change unseen", 0, time.time_ns()))
    key = hashlib.sha256(repr((numbers, stamps)).encode()).hexdigest()[:32]
    made = cache_folder() / "gguf" / f"{key}.gguf"
    with locked(made.parent):
        if made.is_file():
            os.utime(made)  # what was run last stays longest
            return made, False
        with tempfile.TemporaryDirectory(dir=made.parent) as beside:
            export(source, "gguf", Path(beside) / "out", runs, numbers=numbers)
            written = Path(beside) / "out" / gguf.FILE
            make_room(made.parent, written.stat().st_size)
            os.replace(written, made)
    return made, True
