"""Translation: tensors under the names of a published file in, the same under our names out, and back, bit for bit.

A tensor map says for each name of ours which published tensors it is made from and how:
    same       one tensor, as it is
    transpose  one matrix, rows and columns exchanged
    cat        several, one below the other; `sizes` are their rows
    stack      several of one shape, along a new first dimension
Knows no model: the maps come from the families in the models room.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fromzero.errors import SourceError
from fromzero.weights.tensors import refuse_misfit

TensorMap = Mapping[str, tuple[tuple[str, ...], str, tuple[int, ...]]]  # ours → (theirs, how, sizes)


def to_ours(tensors: Mapping[str, Tensor], names: TensorMap, *, file: str, ignored: Sequence[str] = ()) -> dict[str, Tensor]:
    """Rename and join; every published tensor must be used, except those that match a glob of `ignored`.

    raises: SourceError listing what is missing, what is left over, and the nearest names
    """
    wanted = [name for theirs, _, _ in names.values() for name in theirs]
    missing = [name for name in wanted if name not in tensors]
    used = set(wanted)
    extra = [n for n in tensors if n not in used and not any(fnmatch.fnmatchcase(n, glob) for glob in ignored)]
    refuse_misfit(missing, extra, file=file)
    return {ours: _join([tensors[name] for name in theirs], how, sizes, ours, file) for ours, (theirs, how, sizes) in names.items()}


def to_theirs(tensors: Mapping[str, Tensor], names: TensorMap) -> dict[str, Tensor]:
    """The way back; tensors without an entry in the map are left out."""
    found: dict[str, Tensor] = {}
    for ours, (theirs, how, sizes) in names.items():
        found.update(zip(theirs, _part(tensors[ours], how, sizes), strict=True))
    return found


def _join(parts: Sequence[Tensor], how: str, sizes: Sequence[int], ours: str, file: str) -> Tensor:
    if how == "same":
        return parts[0]
    if how == "transpose":
        return parts[0].T.contiguous()
    if how == "stack":
        return torch.stack(list(parts))
    rows = [len(part) for part in parts]
    if rows != list(sizes):
        raise SourceError(f"the parts of {ours} have {rows} rows, expected {list(sizes)}", file=file)
    return torch.cat(list(parts))


def _part(tensor: Tensor, how: str, sizes: Sequence[int]) -> Sequence[Tensor]:
    if how == "same":
        return [tensor]
    if how == "transpose":
        return [tensor.T.contiguous()]
    if how == "stack":
        return [part.contiguous() for part in tensor.unbind(0)]
    return [part.contiguous() for part in tensor.split(list(sizes))]
