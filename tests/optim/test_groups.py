"""Parameter groups: who gets which multiplier."""

import pytest
import torch
from torch.nn import Parameter

from fromzero.errors import RecipeError
from fromzero.optim import parameter_groups

NAMES = ["conv1.weight", "conv1.bias", "body.conv2.weight", "body.conv2.bias", "body.norm.weight", "head.weight"]


def scales(lr_scale, names=NAMES, lr=1.0):
    """{multiplier: names} in the order of the groups."""
    parameters = {name: Parameter(torch.zeros(1)) for name in names}
    groups = parameter_groups(parameters.items(), lr, lr_scale)
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {g["lr"]: [n for n in names if any(parameters[n] is p for p in g["params"])] for g in groups}


def test_without_multipliers_there_is_one_group():
    assert scales({}, lr=0.01) == {0.01: NAMES}


def test_groups_come_in_the_order_in_which_parameters_need_them():
    found = scales({"head*": 10.0, "body*": 0.5})
    assert list(found.items()) == [(1.0, NAMES[:2]), (0.5, NAMES[2:5]), (10.0, NAMES[5:])]


def test_equal_multipliers_share_a_group():
    assert scales({"conv1*": 0.5, "head*": 0.5, "body.norm*": 1.0}) == {0.5: [*NAMES[:2], NAMES[5]], 1.0: NAMES[2:5]}


@pytest.mark.parametrize("glob", ["conv*", "conv1", "conv[1]", "conv?", "conv1.*"])
def test_a_glob_matches_names_and_the_modules_around_them(glob):
    assert scales({glob: 0.1})[0.1] == NAMES[:2]


def test_a_module_inside_another_is_named_from_the_top():
    assert scales({"body.conv2": 0.1})[0.1] == NAMES[2:4]
    assert scales({"*.bias": 0.1})[0.1] == [NAMES[1], NAMES[3]]


def test_a_name_is_not_matched_by_its_beginning_alone():
    assert scales({"layer.1": 0.1}, names=["layer.1.weight", "layer.10.weight"]) == {
        0.1: ["layer.1.weight"],
        1.0: ["layer.10.weight"],
    }


def test_the_first_glob_that_matches_decides():
    assert scales({"body.norm": 3.0, "body": 2.0, "*": 0.0}) == {
        0.0: [*NAMES[:2], NAMES[5]],
        2.0: NAMES[2:4],
        3.0: [NAMES[4]],
    }
    assert scales({"body": 2.0, "body.norm": 3.0})[2.0] == NAMES[2:5]


def test_lr_and_base_lr_are_the_product():
    groups = parameter_groups([("w", Parameter(torch.zeros(1))), ("b", Parameter(torch.zeros(1)))], 0.2, {"b": 0.0})
    assert [(g["lr"], g["base_lr"]) for g in groups] == [(0.2, 0.2), (0.0, 0.0)]


def test_globs_that_match_nothing_are_all_named_with_the_nearest():
    with pytest.raises(RecipeError) as caught:
        scales({"cnov1": 0.1, "head": 2.0, "hed.weight": 0.1, "zzz": 1.0})
    assert [fault.key for fault in caught.value.faults] == ["optimizer.lr_scale"] * 3
    first, second, third = str(caught.value).splitlines()
    assert "'cnov1' matches no parameter that trains" in first
    assert "nearest are conv1" in first
    assert "nearest are head.weight" in second
    assert "there are conv1.weight, conv1.bias" in third
