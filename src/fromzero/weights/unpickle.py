"""A torch file in, a safetensors file out, in a process of its own that may open nothing else: a script, not a module.

torch is imported and warmed before the file is touched. Then the process gives up for good what reading tensors does
not need: it can open no file and no socket any more, and its memory, time and output are bounded by the file's size.

usage: python -I unpickle.py IN OUT      exit 3, and a line on standard error, where the file is no dictionary of tensors
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

try:
    import resource
except ImportError:  # not on this platform: what is read is still nothing but tensors
    resource = None  # type: ignore[assignment]

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights
SLACK = 2**30  # bytes of memory beyond three times the file: what torch itself takes while reading


def convert(taken: Any) -> bytes:
    found = torch.load(taken, map_location="cpu", weights_only=True)
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = {str(name): t for name, t in found.items() if isinstance(t, torch.Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise ValueError("it holds no dictionary of tensors")
    found = None  # so that each tensor is given back as soon as its copy is made
    return save({name: tensors.pop(name).detach().clone(memory_format=torch.contiguous_format) for name in list(tensors)})


def give_up(size: int) -> None:
    used = Path("/proc/self/statm")  # what torch has mapped already; 64 GiB where the system does not say
    pages = int(used.read_text().split()[0]) * resource.getpagesize() if used.exists() else 2**36
    limits = {"AS": pages + 3 * size + SLACK, "CPU": 60 + size // 2**23, "FSIZE": 2 * size + 2**24, "CORE": 0, "NOFILE": 0}
    for name, most in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard),) * 2)


def main() -> None:
    for zipped in (True, False):  # once through both formats, so that no module of torch is left to be opened
        torch.save({"x": torch.nn.Parameter(torch.ones(2))}, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        buffer.seek(0)
        convert(buffer)
    with open(sys.argv[1], "rb") as taken, open(sys.argv[2], "wb") as made:
        if resource is not None:
            give_up(Path(sys.argv[1]).stat().st_size)
        try:
            made.write(convert(taken))
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(3)


if __name__ == "__main__":
    main()
