"""The random states of torch, Python and NumPy: seeded, noted, put back and lent as one."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from fromzero.devices import generators


def drawn() -> list[Any]:
    """Some of each, and of those that are drawn in pairs the first of a pair."""
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn()]


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_all_three_follow_from_one_seed(seed: int) -> None:
    with generators.lent():
        found = []
        for one in (seed, seed, (seed + 1) % 2**63):
            generators.seed_all(one)
            found.append(drawn())
    first, again, other = found
    assert first == again and not any(a == b for a, b in zip(first, other, strict=True))


def test_what_was_noted_is_put_back_in_the_middle_of_a_pair_and_after_it_stood_in_json() -> None:
    with generators.lent(3):
        drawn()
        noted = generators.note()
        wanted = drawn()
        generators.put_back(noted)
        assert drawn() == wanted
        written = json.dumps({name: noted[name] for name in ("python", "numpy")}, default=lambda array: array.tolist())
        generators.put_back({"torch": noted["torch"], **json.loads(written)})
        assert drawn() == wanted


def test_what_is_drawn_inside_does_not_show_outside_even_where_it_fails() -> None:
    with generators.lent(3):
        noted = generators.note()
        wanted = drawn()
        for begin in (None, 5, noted):
            generators.put_back(noted)
            with pytest.raises(ZeroDivisionError), generators.lent(begin):
                assert (drawn() == wanted) == (begin != 5)
                raise ZeroDivisionError
            assert drawn() == wanted


def test_one_that_was_not_noted_goes_on_as_it_is() -> None:
    with generators.lent(3):
        random.seed(1), np.random.seed(1)
        wanted = drawn()[1:]
        random.seed(1), np.random.seed(1)
        generators.put_back({"torch": torch.get_rng_state()})
        assert drawn()[1:] == wanted
