"""Arrays: an npz, pt or safetensors file, or arrays from Python in, two tensors out. A pickle is never run.

uint8 inputs with two or three dimensions beside the first are images: they become (M, C, H, W), and are divided by
255 when a batch is taken. Everything else is used as it is, in float32.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fromzero.errors import DataError, SourceError, did_you_mean
from fromzero.sources import check_zip, is_zip, read_member
from fromzero.sources.archives import MOST_RATIO, RATIO_COUNTS_FROM

INPUT_NAMES = ("x", "X", "inputs", "input", "images", "features", "data", "x_train", "train_x")
TARGET_NAMES = ("y", "Y", "targets", "target", "labels", "label", "y_train", "train_y")

_SAFE_GLOBALS = frozenset(
    ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict", "torch Size"]
    + [f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")]
)


def read_arrays(path: Path, input_name: str | None, target_name: str | None) -> tuple[Tensor, Tensor]:
    """Read two arrays from a file.

    returns:  inputs (M, …), targets (M, …)
    raises:   DataError where names or lengths do not fit, SourceError for pickles and hostile archives
    """
    arrays = _read(path)
    inputs = _pick(arrays, input_name, INPUT_NAMES, "data.input", path)
    targets = _pick(arrays, target_name, TARGET_NAMES, "data.target", path)
    return as_pair(inputs, targets, str(path))


def read_inputs(path: Path) -> Any:
    """The inputs alone of an array file, for prediction."""
    arrays = _read(path)
    return _pick(arrays, next(iter(arrays)) if len(arrays) == 1 else None, INPUT_NAMES, "data.input", path)


def _pick(arrays: Mapping[str, Any], asked: str | None, usual: tuple[str, ...], key: str, path: Path) -> Any:
    if asked is not None and asked not in arrays:
        raise DataError(
            f"has no array '{asked}'", mend=did_you_mean(asked, arrays) or f"it has {', '.join(arrays)}", file=str(path), key=key
        )
    name = asked or next((n for n in usual if n in arrays), None)
    if name is None:
        raise DataError(
            f"does not say which array is meant; it has {', '.join(arrays)}", mend=f"name one with {key}", file=str(path), key=key
        )
    return arrays[name]


def as_pair(inputs: Any, targets: Any, name: str) -> tuple[Tensor, Tensor]:
    """Arrays, lists or tensors → (inputs, targets) as tensors of one length, images brought to (M, C, H, W)."""
    x, y = _tensor(inputs, name, "inputs"), _tensor(targets, name, "targets")
    if x.ndim == 0 or y.ndim not in (1, 2) or len(x) != len(y):
        raise DataError(
            f"inputs {tuple(x.shape)} and targets {tuple(y.shape)} do not fit together",
            why="both begin with the number of examples; a target is one number or a row of them",
            file=name,
        )
    if len(x) == 0:
        raise DataError("holds 0 examples", file=name)
    if x.numel() == 0:
        raise DataError(f"its inputs have shape {tuple(x.shape)}: an example holds no number", file=name)
    if x.ndim == 1:
        x = x[:, None]  # (M, 1): one number is an example
    if x.dtype == torch.uint8 and x.ndim == 3:
        x = x[:, None]  # (M, 1, H, W)
    elif x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()  # (M, C, H, W)
    if x.dtype not in (torch.uint8, torch.float32):
        x = x.to(torch.float32)
    if x.dtype == torch.uint8 and x.ndim != 4:
        x = x.to(torch.float32)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return x, y


def _tensor(value: Any, name: str, which: str) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(_plain_array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"its {which} are no array of numbers ({str(error)[:100]})", file=name) from None
    if tensor.is_complex():
        raise DataError(f"its {which} are complex numbers", file=name)
    return tensor


def _plain_array(value: Any) -> np.ndarray[Any, Any]:
    """What torch takes: not reversed, not read-only, in this machine's byte order; copied only where it is not so."""
    array = np.asarray(value, order="C")
    return np.require(array, array.dtype.newbyteorder("="), ["W"])


def _read(path: Path) -> dict[str, Any]:
    readers = {".npz": _read_npz, ".pt": _read_torch, ".pth": _read_torch, ".safetensors": _read_safetensors}
    return readers[path.suffix.lower()](path)


def _read_npz(path: Path) -> dict[str, Any]:
    check_zip(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own
        if "pickle" in str(error).lower() or "object" in str(error).lower():
            raise SourceError(
                "holds Python objects (a pickle)",
                why="reading them can run code",
                mend="save plain arrays: np.savez(path, x=…, y=…)",
                file=str(path),
            ) from None
        raise DataError(f"is no whole npz file ({error})", mend="copy or save it again", file=str(path)) from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise DataError(f"is no whole safetensors file ({error})", mend="copy or save it again", file=str(path)) from None


def _read_torch(path: Path) -> dict[str, Any]:
    """A torch zip whose pickle names tensors and nothing else; it is read as text before it is loaded."""
    if not is_zip(path):
        raise SourceError(
            "is an old torch file or a bare pickle",
            why="reading it can run code",
            mend="save it anew with torch.save from a current torch, or as safetensors",
            file=str(path),
        )
    members = check_zip(path)
    for name in members:
        if name.endswith(".pkl"):
            _refuse_code(path, name)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(
            f"is no torch file of plain tensors ({str(error).splitlines()[0][:120]})",
            mend="save {'x': …, 'y': …} with torch.save",
            file=str(path),
        ) from None
    if not isinstance(loaded, Mapping):
        raise DataError("is no dictionary of tensors", mend="save {'x': …, 'y': …}", file=str(path))
    for key, value in loaded.items():
        if isinstance(value, Tensor) and value.nbytes > max(MOST_RATIO * path.stat().st_size, RATIO_COUNTS_FROM):
            what = f"its '{key}' of shape {tuple(value.shape)} would grow to {value.nbytes:,} bytes"
            raise SourceError(what, why="it repeats the few that the file holds", mend="save the plain tensor", file=str(path))
    return {str(key): value for key, value in loaded.items()}


def _refuse_code(path: Path, member: str) -> None:
    data = read_member(path, member)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            named = ""
            if opcode.name in ("GLOBAL", "INST"):
                named = str(argument)
            elif opcode.name == "STACK_GLOBAL":
                named = "a name put together while it is read"  # torch.save writes none, and what it is cannot be told
            if named and named not in _SAFE_GLOBALS:
                raise SourceError(
                    f"its pickle asks for {named.replace(' ', '.')}",
                    why="that would run code; it was not tried",
                    mend="save plain tensors, or safetensors",
                    file=str(path),
                )
    except (ValueError, IndexError) as error:
        raise SourceError(f"its pickle cannot be read ({str(error)[:80]})", file=str(path)) from None
