"""Split: labels and content in, row numbers for training and validation out, fixed by a seed.

Rows with the same content fall on the same side, so that nothing is examined that was learned by heart.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def hold_out(keys: Sequence[bytes], strata: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Keep a share of the rows aside.

    keys:     content of each row; equal keys stay together
    strata:   class of each row (one value for all where there are no classes); each keeps its share
    returns:  rows for training, rows for validation, both ascending
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    by_stratum: dict[Hashable, list[list[int]]] = defaultdict(list)
    for rows in groups.values():
        by_stratum[strata[rows[0]]].append(rows)
    generator = torch.Generator().manual_seed(seed)
    kept: set[int] = set()
    for stratum in sorted(by_stratum, key=str):
        members = by_stratum[stratum]
        wanted = round(share * sum(map(len, members)))
        if wanted == 0 and len(members) > 1 and share > 0:
            wanted = 1
        taken: list[int] = []
        for place in torch.randperm(len(members), generator=generator).tolist()[: len(members) - 1]:
            if len(taken) + len(members[place]) <= wanted:
                taken += members[place]
        kept.update(taken)
    return [r for r in range(len(keys)) if r not in kept], sorted(kept)


def hold_out_contents(contents: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows `hold_out` keeps aside where there are no classes, for more rows than Python objects would fit.

    contents: (M,) a digest of each row's content.  returns: (M,) True where kept aside
    """
    _, first, group, counts = np.unique(contents, return_index=True, return_inverse=True, return_counts=True)
    order, kept, taken = first.argsort(), np.zeros(len(counts), bool), 0
    wanted = round(share * len(contents)) or int(share > 0 and len(counts) > 1)
    for place in torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()[: len(counts) - 1]:
        if taken == wanted:
            break
        if taken + counts[order[place]] <= wanted:
            kept[order[place]] = True
            taken += int(counts[order[place]])
    return kept[group]


def sample(
    rows: Sequence[int], strata: Sequence[Hashable], seed: int, *, examples: int | None = None, per_class: int | None = None
) -> list[int]:
    """Some of the rows, fixed by the seed: at most `examples` in all, at most `per_class` of each stratum; ascending.

    strata: of each of `rows`
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    counts: Counter[Hashable] = Counter()
    chosen: list[int] = []
    for place in order:
        if examples is not None and len(chosen) >= examples:
            break
        if per_class is None or counts[strata[place]] < per_class:
            counts[strata[place]] += 1
            chosen.append(rows[place])
    return sorted(chosen)
