"""Names and layouts of published tensors become ours and go back, bit for bit."""

import pytest
import torch

from fromzero.errors import SourceError
from fromzero.weights import to_ours, to_theirs
from fromzero.weights.tensors import Tensors

THEIRS = {
    "q": torch.randn(4, 3),
    "k": torch.randn(2, 3),
    "m": torch.randn(3, 5),
    "n": torch.randn(3),
    "e0": torch.randn(2, 2),
    "e1": torch.randn(2, 2),
}
NAMES = {
    "qk": (("q", "k"), "cat", (4, 2)),
    "turned": (("m",), "transpose", ()),
    "norm": (("n",), "same", ()),
    "experts": (("e0", "e1"), "stack", ()),
}


def test_there_and_back_is_the_same_in_every_bit():
    ours = to_ours(THEIRS, NAMES, file="f")
    assert {name: tuple(t.shape) for name, t in ours.items()} == {"qk": (6, 3), "turned": (5, 3), "norm": (3,), "experts": (2, 2, 2)}
    again = to_theirs(ours, NAMES)
    assert again.keys() == THEIRS.keys() and all(torch.equal(again[name], t) and again[name].is_contiguous() for name, t in THEIRS.items())


def test_every_tensor_is_read_once_and_one_that_is_ignored_never():
    read = []
    found = Tensors(
        "f", {name: tuple(t.shape) for name, t in THEIRS.items()} | {"buffer": (1,)}, lambda name: read.append(name) or THEIRS[name]
    )
    to_ours(found, NAMES, file="f", ignored=["buf*"])
    assert sorted(read) == sorted(THEIRS)


def test_missing_and_left_over_names_are_listed_with_the_nearest():
    with pytest.raises(SourceError) as caught:
        to_ours({**{k: v for k, v in THEIRS.items() if k != "e1"}, "e1x": THEIRS["e1"]}, NAMES, file="f")
    assert str(caught.value) == "f: its tensors do not fit the model: missing e1; extra e1x; near: e1 ~ e1x"


def test_parts_of_another_size_are_refused():
    with pytest.raises(SourceError, match=r"f: the parts of qk have \[4, 2\] rows, expected \[2, 4\]"):
        to_ours(THEIRS, NAMES | {"qk": (("q", "k"), "cat", (2, 4))}, file="f")
