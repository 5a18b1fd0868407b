"""Splitting and sampling rows."""

from collections import Counter

import numpy as np
import pytest

from fromzero.data.split import hold_out, hold_out_contents, sample


def keys(count):
    return [str(i).encode() for i in range(count)]


STRATA = ["a"] * 100 + ["b"] * 50 + ["c"] * 10


def test_every_row_falls_on_one_side_and_each_class_keeps_its_share():
    train, held = hold_out(keys(160), STRATA, 0.2, 0)
    assert sorted(train + held) == list(range(160)) and train == sorted(train) and held == sorted(held)
    assert Counter(STRATA[r] for r in held) == {"a": 20, "b": 10, "c": 2}


def test_a_split_is_fixed_by_its_seed():
    assert hold_out(keys(160), STRATA, 0.2, 0) == hold_out(keys(160), STRATA, 0.2, 0)
    assert hold_out(keys(160), STRATA, 0.2, 0) != hold_out(keys(160), STRATA, 0.2, 1)


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_content_stay_together(seed):
    contents = [str(i % 40).encode() for i in range(160)]
    train, held = hold_out(contents, STRATA, 0.25, seed)
    assert not {contents[r] for r in train} & {contents[r] for r in held}
    assert 0 < len(held) <= 48


def test_content_with_two_labels_stays_together_too():
    train, held = hold_out([b"same"] * 2 + keys(8), ["a", "b"] + ["a", "b"] * 4, 0.5, 0)
    assert ({0, 1} <= set(train)) != ({0, 1} <= set(held))


def test_a_class_of_few_gives_one_and_a_class_of_one_gives_none():
    _, held = hold_out(keys(4), ["a", "b", "b", "b"], 0.1, 0)
    assert len(held) == 1 and held != [0]


def test_no_class_is_ever_held_out_whole():
    train, _ = hold_out(keys(20), ["a", "b"] * 10, 0.99, 0)
    assert {"a", "b"} == {"ab"[r % 2] for r in train}


def test_nothing_is_held_out_where_nothing_is_asked():
    assert hold_out(keys(5), [""] * 5, 0.0, 0) == ([0, 1, 2, 3, 4], [])


def test_a_sample_takes_so_many_of_each_class_fixed_by_the_seed():
    rows = list(range(1000, 1160))
    chosen = sample(rows, STRATA, 0, per_class=12)
    assert Counter(STRATA[r - 1000] for r in chosen) == {"a": 12, "b": 12, "c": 10}
    assert chosen == sorted(chosen) == sample(rows, STRATA, 0, per_class=12) != sample(rows, STRATA, 1, per_class=12)


def test_a_sample_takes_so_many_in_all():
    assert len(sample(range(160), STRATA, 0, examples=7)) == 7
    assert sample(range(5), ["a"] * 5, 0, examples=50) == [0, 1, 2, 3, 4]
    both = sample(range(160), STRATA, 0, examples=7, per_class=3)
    assert len(both) == 7 and max(Counter(STRATA[r] for r in both).values()) <= 3


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_contents_are_held_out_as_rows_of_one_class_are(share):
    generator = np.random.default_rng(0)
    for most, count in ((5, 40), (30, 40), (10**9, 300), (1, 3), (10**9, 1)):
        contents = generator.integers(0, most, count)
        for seed in range(5):
            _, theirs = hold_out([str(c).encode() for c in contents], [""] * count, share, seed)
            assert np.flatnonzero(hold_out_contents(contents, share, seed)).tolist() == theirs
