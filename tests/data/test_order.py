"""Order and draws: functions of seed, epoch and sample, and of nothing else."""

import itertools
import time

import pytest
import torch

from fromzero.data import epoch_order
from fromzero.data.order import count_batches, epoch_batches, keyed_uniform
from fromzero.errors import DataError


def test_an_order_is_a_permutation_fixed_by_seed_and_epoch():
    order = epoch_order(3, 5, 1000)
    assert order.sort().values.tolist() == list(range(1000))
    torch.manual_seed(99)
    assert torch.equal(order, epoch_order(3, 5, 1000))
    assert not torch.equal(order, epoch_order(3, 6, 1000)) and not torch.equal(order, epoch_order(4, 5, 1000))
    assert not torch.equal(epoch_order(0, 1, 1000), epoch_order(1, 0, 1000))


def test_an_order_leaves_torchs_own_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    epoch_order(0, 0, 10)
    keyed_uniform(0, 0, torch.arange(5), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_an_order_is_the_same_in_every_release():
    assert epoch_order(0, 0, 8).tolist() == [0, 1, 5, 2, 4, 3, 6, 7]


def splitmix(z):
    """SplitMix64's finalizer, in Python's unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**40, 1)])
def test_draws_equal_splitmix64_written_in_plain_integers(seed, epoch):
    golden = 0x9E3779B97F4A7C15
    base = splitmix((seed * golden + epoch + 1) % 2**64) % 2**63
    theirs = [
        [
            (splitmix((splitmix((c * golden + base) % 2**64) + golden) % 2**64) >> 11) * 2.0**-53
            for c in (4 * s, 4 * s + 1, 4 * s + 2, 4 * s + 3)
        ]
        for s in (0, 5, 10**9)
    ]
    assert keyed_uniform(seed, epoch, torch.tensor([0, 5, 10**9]), 4).tolist() == theirs


def test_a_samples_draws_do_not_depend_on_its_batch():
    whole = keyed_uniform(7, 2, torch.arange(100), 4)
    alone = torch.cat([keyed_uniform(7, 2, torch.tensor([i]), 4) for i in range(100)])
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole, alone) and torch.equal(whole[shuffled], keyed_uniform(7, 2, shuffled, 4))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (12345, 0), (2**63 - 1, 10_000), (2**31, 3)])
def test_draws_are_uniform_and_neighbours_do_not_know_each_other(seed, epoch):
    drawn = keyed_uniform(seed, epoch, torch.arange(20_000), 4)  # standard error of a mean: 0.002, of a correlation: 0.007
    assert drawn.dtype == torch.float64 and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert (drawn.mean(0) - 0.5).abs().max() < 0.01 and (drawn.var(0) - 1 / 12).abs().max() < 0.003
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 0.03  # between the draws of a sample
    for column in drawn.T:
        assert torch.corrcoef(torch.stack([column[:-1], column[1:]]))[0, 1].abs() < 0.03  # between samples
    shares = torch.histc(drawn, 16, 0, 1) / drawn.numel()
    assert (shares - 1 / 16).abs().max() < 0.004


def test_epochs_and_seeds_are_not_shifted_copies_of_each_other():
    base = keyed_uniform(0, 0, torch.arange(5000), 2)
    for other in (keyed_uniform(0, 1, torch.arange(5000), 2), keyed_uniform(1, 0, torch.arange(5000), 2)):
        assert torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1].abs() < 0.05
        assert len(set(base.flatten().tolist()) & set(other.flatten().tolist())) == 0


@pytest.mark.parametrize("shape", ["even", "mixed", "few long", "ones"])
@pytest.mark.parametrize("tokens", [40, 100, 1000, 10**6])
def test_batches_of_tokens_are_of_equal_count_never_empty_and_cut_no_example(shape, tokens):
    generator = torch.Generator().manual_seed(len(shape))
    mixed = torch.randint(1, 41, (500,), generator=generator)
    lengths = {"even": mixed * 0 + 7, "mixed": mixed, "few long": torch.where(mixed > 38, 40, 1), "ones": mixed * 0 + 1}[shape]
    total, counts = int(lengths.sum()), set()
    for epoch in range(20):
        order = epoch_order(0, epoch, len(lengths))
        edges = epoch_batches(lengths, order, tokens).tolist()
        n = len(edges) - 1
        counts.add(n)
        assert edges[0] == 0 and edges[-1] == len(lengths) and all(a < b for a, b in itertools.pairwise(edges))
        begin, theirs = 0, []
        for length in lengths[order].tolist():
            theirs.append(begin * n // total)
            begin += length
        ours = [b for b in range(n) for _ in range(edges[b], edges[b + 1])]
        assert ours == theirs
        held = [int(lengths[order[a:b]].sum()) for a, b in itertools.pairwise(edges)]
        assert max(abs(h - total / n) for h in held) < 40
    assert counts == {count_batches(total, int(lengths.max()), tokens)} <= {-(-total // tokens), total // tokens}


def test_one_batch_fewer_where_one_might_be_empty_and_a_batch_smaller_than_an_example_is_refused():
    lengths = torch.tensor([400, 400, 201])
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1]):
        assert len(epoch_batches(lengths, torch.tensor(order), 500)) - 1 == 2  # three of 334 might hold none
    with pytest.raises(
        DataError, match=r"^batch\.tokens: 300 is smaller than the longest example \(400 tokens\); raise it, or set data\.max_tokens$"
    ):
        epoch_batches(lengths, torch.arange(3), 300)


def test_millions_of_examples_and_more_tokens_than_a_product_of_64_bits_holds_are_cut_at_once():
    lengths = torch.randint(900_000, 1_000_000, (4_000_000,), generator=torch.Generator().manual_seed(0))
    begun = time.perf_counter()
    edges = epoch_batches(lengths, epoch_order(0, 0, len(lengths)), 1_000_000)
    assert time.perf_counter() - begun < 5
    assert len(edges) - 1 == -(-int(lengths.sum()) // 1_000_000) or len(edges) - 1 == int(lengths.sum()) // int(lengths.max())
    assert int(edges.diff().min()) >= 1 and int(edges[-1]) == len(lengths)
