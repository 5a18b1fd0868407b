"""Order and draws: (seed, epoch, sample) in, a permutation or random numbers out; an order and lengths in, batches out.

Nothing else enters. Dims: M examples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fromzero.errors import DataError

LOOKED_EPOCHS, LOOKED_EXAMPLES = 64, 2_000_000  # of which the largest batch is found
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the examples in an epoch: (count,) int64, a permutation fixed by seed and epoch."""
    generator = torch.Generator().manual_seed(_mixed_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def count_batches(total: int, longest: int, tokens: int) -> int:
    """How many batches of about `tokens` tokens an epoch has, in whatever order.

    It is ceil(total / tokens), or fewer where a batch would then be smaller than the longest example: a batch of
    total / n tokens or more may begin inside an example and still holds the beginning of the next, so none is empty.
    total, longest: tokens of all examples, and of the longest.  raises: DataError where that is longer than a batch
    """
    if longest > tokens:
        what = f"{tokens} is smaller than the longest example ({longest} tokens)"
        raise DataError(what, mend="raise it, or set data.max_tokens", key="batch.tokens")
    return min(-(-total // tokens), total // longest)


def epoch_batches(lengths: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Cut an epoch's order into n = count_batches batches of about equal token count; no example is cut, no batch empty.

    An example whose first token is the epoch's s-th belongs to batch floor(s · n / total).
    lengths, order:  (M,) int64
    returns:         (n + 1,) int64 edges: batch b is order[edges[b]:edges[b + 1]]
    """
    ends = lengths[order].cumsum(0)
    total = int(ends[-1])
    n = count_batches(total, int(lengths.max()), tokens)
    whole, rest = divmod(total, n)
    batch = torch.arange(n + 1)
    begins = batch * whole + -(-batch * rest // n)  # ceil(batch · total / n), where batch · total may not fit 64 bits
    return torch.searchsorted(ends - lengths[order], begins)


def largest_batch(lengths: Tensor, seed: int, epochs: float, batch: int, tokens: int | None) -> Tensor:
    """The examples of the batch that has the most tokens in these epochs, or the first of many.  lengths: (M,)  returns: (B,) int64

    batch, tokens:  examples of a batch, or about how many tokens it has
    """
    most, found = 0, torch.arange(0)
    for epoch in range(max(1, min(math.ceil(min(epochs, LOOKED_EPOCHS)), LOOKED_EXAMPLES // len(lengths)))):
        order = epoch_order(seed, epoch, len(lengths))
        edges = torch.arange(0, len(order), batch) if tokens is None else epoch_batches(lengths, order, tokens)[:-1]
        for part in order.tensor_split(edges[1:]):
            if (held := int(lengths[part].sum())) > most:
                most, found = held, part
    return found


def keyed_uniform(seed: int, epoch: int, samples: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1) that belong to a sample, whatever batch it stands in.

    samples:  (B,) int64 example indices
    returns:  (B, draws) float64
    source:   SplitMix64 as a counter-based generator: Steele, Lea, Flood, "Fast splittable pseudorandom
              number generators", OOPSLA 2014, figure 16
    """
    words = keyed_words(seed, epoch, samples.to(torch.int64)[:, None] * draws + torch.arange(draws))
    return _shift(mix(words + _GOLDEN), 11).to(torch.float64) * 2.0**-53


def keyed_words(seed: int, epoch: int, counters: Tensor) -> Tensor:
    """64 bits that belong to each counter, int64 as these are, in its shape."""
    return mix(counters * _GOLDEN + _mixed_seed(seed, epoch))


def mix(z: Tensor) -> Tensor:
    """Let every bit of an int64 change every other; 0 stays 0."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed_seed(seed: int, epoch: int) -> int:
    word = 2**64 - 1  # the same mixing as mix, on one Python number
    z = ((seed & (2**63 - 1)) * (_GOLDEN & word) + epoch + 1) & word
    z = ((z ^ z >> 30) * (_MIX_1 & word)) & word
    z = ((z ^ z >> 27) * (_MIX_2 & word)) & word
    return (z ^ z >> 31) & (2**63 - 1)
