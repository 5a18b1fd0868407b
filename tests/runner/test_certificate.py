"""The certificate: a way that computes something else is refused before training, and named; ways that are equal get their grade."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fromzero as fz
from fromzero.devices import generators
from fromzero.planner.make import make
from fromzero.planner.values import Certificate, Plan
from fromzero.runner import certificate, regions
from fromzero.runner.assemble import assemble
from fromzero.runner.step import judged

WHOLE = {"sample_seconds": 1e-6, "budget": 1.0}


class Net(nn.Module):
    """Three stages that keep more than they are given, with dropout in the middle one"""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12))
        self.second = nn.Sequential(nn.Linear(12, 48), nn.Dropout(p), nn.Tanh(), nn.Linear(48, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    @property
    def stages(self) -> tuple[str, ...]:
        return "first", "second", "head"


def net(p: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Net(p)


def planned(model: nn.Module, **keys: Any) -> fz.Planned:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(90, 6, generator=generator)
    recipe = {"task": "classify", "model": model, "data": {"train": (x, x[:, :3].argmax(1))}, "batch": 16, "epochs": 3, **keys}
    return fz.plan(recipe, probe=False)


def certified(made: fz.Planned, **changed: Any) -> Certificate:
    plan = replace(made.plan, **changed)
    return certificate.certify(assemble(plan, made.loaded, made.place), **WHOLE)


def test_the_plain_way_itself_is_equal_to_single_samples_up_to_the_order_of_additions() -> None:
    found = certified(planned(net()))
    assert found.plain == "one sample at a time" and found.samples == 16 and not found.refused
    assert 0 < found.error < found.bound < 1e-3


def test_checkpointing_changes_no_bit_with_dropout_either() -> None:
    made = planned(net(p=0.5))
    found, plain = certified(made, checkpointed=("first", "second")), certified(made)
    assert found.plain == "one sample at a time" and 0 < found.error < found.bound and not found.refused
    assert (found.error, found.tensor, found.loss_error) == (plain.error, plain.tensor, plain.loss_error)


class Noisy(Net):
    """Draws from every generator that a person's own code may draw from"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + random.random() + np.random.rand() + torch.rand(()))


def test_a_model_that_draws_outside_of_dropout_draws_the_same_each_way_and_a_plan_leaves_no_trace() -> None:
    torch.manual_seed(0)
    before = repr(generators.note())
    x = torch.rand(90, 6, generator=torch.Generator().manual_seed(0))
    recipe = {"task": "classify", "model": Noisy(), "data": {"train": (x, x[:, :3].argmax(1))}, "batch": 16, "epochs": 3}
    torch.manual_seed(0)
    measured = fz.plan(recipe).plan.facts.measured
    assert measured is not None and measured.certificate is not None and measured.certificate.error == 0.0
    assert repr(generators.note()) == before
    assert certified(planned(Noisy()), checkpointed=("first", "second")).error == 0.0


def test_checkpointing_that_loses_the_draws_of_dropout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(forward: Any, draws: Any, *given: Any, **named: Any) -> Any:
        return regions.checkpoint(forward, *given, use_reentrant=False, **named)

    monkeypatch.setattr(regions, "run_again", forgetful)
    found = certified(planned(net(p=0.5)), checkpointed=("first", "second"), micro_tokens=None)
    assert set(found.refused) == {"checkpointing"} and found.refused["checkpointing"] > 0.01 and found.error < found.bound


def test_a_loss_averaged_per_piece_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def averaged(model: nn.Module, pieces: Any, loss: Any, around: Any, *, rows: int | None = None) -> tuple[float, float]:
        """As people write gradient accumulation: the mean of each piece, divided by the number of pieces"""
        total = 0.0
        for piece in pieces:
            for part in judged(model, *piece(), loss, around, rows=rows):
                (part.total / part.counted / len(pieces)).backward()
                total += part.total.item() / part.counted.item() / len(pieces)
        return total, 1.0

    monkeypatch.setattr(certificate, "gradients", averaged)
    made = planned(net(), batch=15, loss={"name": "cross_entropy", "class_weights": [1.0, 5.0, 1.0]})
    assert set(certified(made, micro_batch=4).refused) == {"micro_batch"}


def test_a_cache_that_serves_a_neighbours_activation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(net(), freeze="body")
    assert made.plan.prefix and not certified(made).refused
    honest = certificate.some_rows
    monkeypatch.setattr(certificate, "some_rows", lambda *given: honest(*given).roll(1, 0))
    found = certified(made)
    assert set(found.refused) == {"frozen part"} and found.error < found.bound


def test_a_model_whose_samples_change_each_other_is_found_and_never_cut() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head((x - x.mean(0)) / (x.std(0) + 1e-3) if len(x) > 1 else x)

    torch.manual_seed(0)
    recipe = {"task": "classify", "model": Mixing(), "data": {"train": (torch.rand(60, 6), torch.arange(60) % 3)}, "batch": 12}
    plan = fz.plan(recipe).plan
    assert plan.facts.may_not_be_cut == "its samples were seen to change each other's gradients"
    assert any(finding.code == "samples-mix" for finding in plan.findings) and plan.grade == "bitwise"
    small = plan.recipe.model_copy(update={"limits": plan.recipe.limits.model_copy(update={"micro_batch": 3})})
    assert [finding.code for finding in make(small, plan.facts).findings if finding.severity == "error"] == ["batch-not-cut"]


def test_attention_that_forgets_an_offset_is_refused_and_the_run_goes_on_without(
    speaker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fromzero.models.layers.attention import Attend

    honest = Attend._group

    def forgetful(self: Any, q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
        return honest(self, q, k.roll(1, 0), v, group)

    recipe = {
        "task": "chat",
        "model": str(speaker),
        "adapter": "lora",
        "data": str(chats),
        "batch": 4,
        "steps": 3,
        "evaluate": {"samples": 0},
    }
    monkeypatch.setattr(Attend, "_group", forgetful)
    made = fz.plan(recipe, runs=tmp_path)
    assert made.plan.attention == "plain" and made.plan.lowrank == "merged"
    said = [finding for finding in made.plan.findings if finding.code == "refused"]
    assert [finding.severity for finding in said] == ["warning"] and "attention" in said[0].what
    assert fz.run(made, quiet=True).result["status"] == "done"


def test_certificate_off_checks_nothing_and_says_so() -> None:
    x = torch.rand(40, 4)
    recipe = {"task": "classify", "model": nn.Linear(4, 3), "data": {"train": (x, torch.arange(40) % 3)}, "certificate": "off"}
    made = fz.plan(recipe)
    assert made.plan.facts.measured is not None and made.plan.facts.measured.certificate is None
    assert "not checked: certificate: off" in " ".join(str(made).replace("│", "").split())


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="the fault is torch 2.13.0's")
class Convolutions(nn.Module):
    """The network of the digits tutorial, without its dropout; torch 2.13.0 compiles it to code whose gradients are zero"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.mark.slow
def test_compiling_the_digits_network_is_refused_by_name_where_its_gradients_are_zero(tmp_path: Path) -> None:
    recipe = {"task": "classify", "data": {"train": "mnist-5k", "limit": 640}, "batch": 64, "steps": 3, "limits": {"compile": "always"}}
    made = fz.plan({**recipe, "model": Convolutions()}, runs=tmp_path)
    refused = made.plan.facts.measured.certificate.refused  # type: ignore[union-attr]
    assert set(refused) == {"compile"} and refused["compile"] > 0.5 and not made.plan.compiled
    text = " ".join(str(made).replace("│", "").split())
    assert "compile: off (on was refused: gradients" in text and "torch 2.13.0" in text
    outcome = fz.run(made, quiet=True)
    assert outcome.result["status"] == "done" and outcome.result["grade"] == "bitwise"


def test_a_difference_that_is_no_number_counts_as_one() -> None:
    one, other = (1.0, {"w": torch.tensor([1.0])}), (1.0, {"w": torch.tensor([float("nan")])})
    assert certificate._farthest(one, other)[1] == "w"
    assert certificate._farthest(one, one) == (0.0, "", 0.0)
    assert certificate._farthest(one, (1.0, {}))[:2] == (1.0, "w")


def test_plans_can_do_without_each_of_their_fast_ways() -> None:
    made = planned(net()).plan
    fast = replace(
        made, compiled=True, prefix="head", attention="documents", lowrank="merged", checkpointed=("a",), score_rows=5, micro_batch=2
    )
    assert isinstance(fast, Plan) and len(fast.fast_ways) == 7
    for name in fast.fast_ways:
        assert set(fast.without(name).fast_ways) == set(fast.fast_ways) - {name}
    assert fast.without(*fast.fast_ways).fast_ways == ()
