"""A file of torch.save in, its tensors out, by way of safetensors. The pickle in it is never opened in this process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fromzero.errors import SourceError
from fromzero.sources import cache_folder, check_zip, digest_of, is_zip
from fromzero.weights.tensors import Tensors, open_safetensors

_KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "HOME", "TMPDIR", "TEMP")  # of the environment; no token goes along
_BOUNDED = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # threads would take address space, which is bounded


def open_torch(path: Path) -> Tensors:
    """Read once by a child that can do nothing else (unpickle.py), and then from the cache, by the file's digest.

    raises: SourceError naming the file and what it asked for, where it is more than a dictionary of tensors
    """
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise SourceError(f"is not read with torch {torch.__version__} (CVE-2026-24747)", mend="pip install 'torch>=2.10'", file=str(path))
    try:
        size = path.stat().st_size
        if is_zip(path):
            check_zip(path, 2 * size + 2**20)
        made = cache_folder() / "tensors" / f"{digest_of(path)}.safetensors"
        if not made.is_file():
            made.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=made.parent) as folder:
                written = Path(folder) / made.name
                _convert(path, written, 120 + size // 2**23)
                open_safetensors(written)  # looked at like any other file before it is kept
                os.replace(written, made)
    except OSError as error:
        raise SourceError(f"cannot be converted ({error})", mend="free some space, or set XDG_CACHE_HOME", file=str(path)) from None
    found = open_safetensors(made)
    return Tensors(str(path), found.shapes, found.__getitem__)


def _convert(path: Path, made: Path, seconds: int) -> None:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _BOUNDED
    command = [sys.executable, "-I", str(Path(__file__).with_name("unpickle.py")), str(path.resolve()), str(made)]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"the reader ended with {done.returncode}"]
    except subprocess.TimeoutExpired:
        raise SourceError(f"could not be read within {seconds} s", mend="take the model as safetensors", file=str(path)) from None
    if done.returncode == 0:
        return
    asked = re.search(r"GLOBAL ([\w.]+)", "\n".join(said))
    what = f"its pickle asks for {asked[1]}" if asked else "is no torch file of plain tensors"
    why = "that would run code; it was not tried" if asked else said[-1][:200]
    raise SourceError(what, why=why, mend="take the model as safetensors, or save its state_dict alone", file=str(path))
