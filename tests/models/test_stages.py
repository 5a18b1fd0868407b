"""Stages: the chain is cut where one value carries everything; where there is no chain, a sentence says why and where."""

import copy
import importlib.util
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.devices import generators
from fromzero.models.cnn import CNN
from fromzero.models.mlp import MLP
from fromzero.models.rnn import RNN
from fromzero.models.stages import find_stages


class Net(nn.Module):
    """Layers by name, and a way through them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def line() -> nn.Linear:
    return nn.Linear(4, 4)


class Block(nn.Module):
    """As in ResNet: two convolutions, batch norm, a skip, and one ReLU that runs twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, _ = x.shape
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, 1).view(b, -1)
        return F.log_softmax(self.head(self.drop(x)), dim=1)


def seed_cnn(repository: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("seed_cnn", repository / "recipes" / "models" / "seed_cnn.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: nn.Module = module.SeedCNN()
    return found


def assert_chain(model: nn.Module, *expected: str) -> None:
    """The stages are these, in the order they run, and each parameter lies in exactly one."""
    stages, reason = find_stages(model)
    assert (stages, reason) == (expected, "")
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{stage}.") for stage in stages) == 1, name


def why(model: nn.Module) -> str:
    stages, reason = find_stages(model)
    assert stages == () and reason
    assert "\n" not in reason
    return reason


# ---------------------------------------------------------------------------------------- chains


def test_a_plain_sequential_is_a_chain_of_its_layers_with_parameters() -> None:
    assert_chain(
        nn.Sequential(nn.Flatten(), line(), nn.ReLU(), nn.Sequential(line(), nn.BatchNorm1d(4)), nn.Tanh(), line()), "1", "3.0", "3.1", "5"
    )


def test_the_seed_cnn_with_functional_operations_between_is_a_chain_of_its_four_layers(repository: Path) -> None:
    assert_chain(seed_cnn(repository), "conv1", "conv2", "fc1", "fc2")


def test_what_is_found_in_the_catalogue_s_mlp_and_cnn_is_what_they_say_themselves() -> None:
    for model in (MLP((3, 4), 2, hidden=(8, 8), dropout=0.1), CNN((1, 16, 16), 3, channels=(4, 4), batch_norm=True)):
        own = [name for name in model.stages if model.get_submodule(name).state_dict()]
        assert len(own) >= 3
        assert_chain(nn.Sequential(model), *(f"0.{name}" for name in own))


def test_a_residual_block_is_one_stage_and_the_batch_s_size_may_be_read_early() -> None:
    assert_chain(Residual(), "stem.0", "stem.1", "blocks.0", "blocks.1", "blocks.2", "head")


def test_a_skip_over_everything_inside_a_layer_makes_that_layer_one_stage() -> None:
    body = Net(lambda m, x: x + m.b(F.relu(m.a(x))), a=line(), b=line())
    assert_chain(nn.Sequential(body, nn.ReLU(), line()), "0", "2")


def test_layers_in_the_order_they_run_not_in_the_order_they_were_made() -> None:
    assert_chain(Net(lambda m, x: m.first(m.second(x)), first=line(), second=line()), "second", "first")


def test_branches_inside_a_layer_are_one_stage_and_its_straight_part_is_not_cut_up_with_them() -> None:
    fork = Net(lambda m, x: torch.cat([m.left(x), m.right(x)], dim=1)[:, :4], left=line(), right=line())
    inner = Net(lambda m, x: m.after(m.fork(m.before(x))), before=line(), fork=fork, after=line())
    assert_chain(nn.Sequential(inner, line()), "0.before", "0.fork", "0.after", "1")


def test_a_layer_with_parameters_of_its_own_is_one_stage_whatever_is_inside() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(4)), line()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale if x.sum() > 0 else x

    assert_chain(nn.Sequential(line(), Scaled(), line()), "0", "1", "2")


def test_a_recurrent_layer_and_a_start_made_for_the_batch_are_a_chain() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        out, _ = m.gru(x, torch.zeros(1, x.size(0), 4))
        last: Tensor = m.fc(out[:, -1])
        return last

    assert_chain(Net(run, gru=nn.GRU(4, 4, batch_first=True), fc=line()), "gru", "fc")


def test_what_was_made_early_from_the_batch_s_size_alone_may_be_read_late() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        start = torch.zeros((x.shape[0], 4)) + 1
        return m.b(m.a(x) + start)  # type: ignore[no-any-return]

    assert_chain(Net(run, a=line(), b=line()), "a", "b")


def test_batch_norm_without_parameters_is_a_stage_for_its_statistics() -> None:
    assert_chain(nn.Sequential(line(), nn.BatchNorm1d(4, affine=False), line()), "0", "1", "2")


def test_a_branch_for_an_argument_left_at_its_default_is_not_taken() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.extra = line(), line(), nn.Identity()

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            x = self.a(x) * scale
            if mask is not None:
                x = x * mask + self.a(x)
            return self.b(x)

    assert_chain(Optional(), "a", "b")


def test_a_model_s_own_stages_are_taken_and_an_attribute_of_that_name_that_is_none_is_not() -> None:
    model = RNN(vocabulary=7, outputs=2, layers=2)
    assert find_stages(model) == (("embedding", "blocks.0", "blocks.1", "head"), "")

    class Staged(nn.Module):
        def __init__(self, stages: Any) -> None:
            super().__init__()
            self.stages, self.a, self.b = stages, line(), line()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    for stages in (nn.ModuleList(), ("train", "test"), (), ([],), ["a", "b"], 3):
        assert find_stages(Staged(stages)) == (("a", "b"), "")


# -------------------------------------------------------------------------------------- no chain


def test_control_flow_on_data_is_the_reason_with_its_line() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = m.a(x)
        return m.b(x)  # type: ignore[no-any-return]

    said = why(Net(run, a=line(), b=line()))
    here = run.__code__.co_firstlineno + 1
    assert said.startswith(f"the order of its layers cannot be read off its code: line {here} in run, `if x.sum() > 0:`: symbolically")


def test_the_line_is_named_where_the_source_is_no_file() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec(compile("def run(m, x):\n    for row in x:\n        x = m.a(row)\n    return x", "<model Net>", "exec"), scope)
    assert "line 2 in run: " in why(Net(scope["run"], a=line()))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda m, x: m.b(m.a(m.a(x))), "'a' runs 2 times"),
        (lambda m, x: m.b(x + m.a(x)), "what runs after 'a' also reads 'x' past it, and no layer holds the whole"),
        (lambda m, x: x + m.b(m.a(x)), "what runs after 'a' also reads 'x' past it"),
        (lambda m, x: m.b(m.c(h := m.a(x)) + h), "what runs after 'c' also reads 'a' past it"),
        (lambda m, x: m.b(m.c(h := F.relu(m.a(x))) + h), "what runs after 'c' also reads 'relu' past it"),
        (lambda m, x: (lambda wide: m.b(m.a(x)[:, :wide]))(x.size(1)), "what runs after 'a' also reads 'size' past it"),
        (lambda m, x: m.c(m.a(x)), "the parameter 'b.weight' is used by no layer that runs"),
        (lambda m, x: m.c(m.b(F.linear(x, m.a.weight))), "the parameter 'a.weight' is used by the model's own code"),
        (lambda m, x: m.c(m.b(m.a(x))) @ m.a.weight, "the parameter 'a.weight' is used by a and by the model's own code"),
        (lambda m, x: m.c(m.b(m.a(x)) if m.training else m.b(x)), "other layers run in training than in evaluation"),
        (lambda m, x: m.c(m.b(m.a(x))) if m.training else m.c(m.a(m.b(x))), "other layers run in training than in evaluation"),
        (lambda m, x: m.nothing(x), "has no attribute 'nothing'"),
    ],
)
def test_what_is_no_chain_has_its_reason(run: Any, said: str) -> None:
    assert said in why(Net(run, a=line(), b=line(), c=line()))


def test_a_parameter_of_the_model_itself_is_the_reason() -> None:
    model = Net(lambda m, x: m.a(x) + m.shift, a=line())
    model.shift = nn.Parameter(torch.zeros(4))
    assert why(model) == "the parameter 'shift' is used by the model's own code"


def test_shared_parameters_are_the_reason_and_both_owners_are_named() -> None:
    model = nn.Sequential(line(), line(), line())
    model[2].weight = model[0].weight
    assert why(model) == "the parameter '0.weight' is used by 0 and by 2"


def test_a_layer_shared_by_two_blocks_is_the_reason() -> None:
    shared = line()
    model = nn.Sequential(*(Net(lambda m, x: m.own(x) + m.shared(x), own=line(), shared=shared) for _ in range(2)))
    assert why(model) == "the parameter '0.shared.weight' is used by 0 and by 1"


def test_a_value_kept_on_the_side_and_read_later_is_no_chain() -> None:
    def stash(m: Net, x: Tensor) -> Tensor:
        m.kept = m.a(x)
        return m.b(m.kept)  # type: ignore[no-any-return]

    model = Net(lambda m, x: m.head(m.inner(x) + m.inner.kept), inner=Net(stash, a=line(), b=line()), head=line())
    assert "what runs after 'inner' also reads 'inner.a' past it" in why(model)


def test_a_layer_that_gives_back_its_input_beside_its_result_is_a_stage() -> None:
    both = Net(lambda m, x: (m.b(x), x), b=line())
    assert_chain(Net(lambda m, x: m.head(sum(m.both(m.a(x)))), a=line(), both=both, head=line()), "a", "both", "head")


def test_a_model_that_is_one_layer_or_has_none_is_no_chain() -> None:
    assert why(line()) == "no layer inside it has parameters"
    assert why(nn.Sequential(nn.Flatten())) == "no layer inside it has parameters"


# ------------------------------------------------------------------------------------ no traces left


def test_the_model_its_mode_and_the_random_states_stay_as_they_were_and_nothing_is_said() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        warnings.warn("from the model", stacklevel=1)
        m.calls += 1
        m.seen.add_(1)
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(0.5)
        return m.b(m.a(x)) + torch.rand(4) + random.random() + np.random.rand()  # type: ignore[no-any-return]

    model = Net(run, a=nn.Sequential(line(), nn.BatchNorm1d(4), nn.Dropout(0.5)), b=line())
    model.calls = 0  # type: ignore[assignment]
    model.register_buffer("seen", torch.zeros(()))
    model.a.eval()
    for parameter in model.a.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    with generators.lent():
        assert find_stages(model) == (("a.0", "a.1", "b"), "")
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[2]) == states[1:]
    assert model.calls == 0
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    after = model.state_dict()
    assert before.keys() == after.keys() and len(after) == 10
    assert all(torch.equal(before[name], after[name]) for name in before)
