"""One loss curve for each recipe, whatever way the plan takes: cut or whole, checkpointed, begun at the cut, compiled."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.planner.values import Plan
from fromzero.planner.ways import may_run_again
from fromzero.report.events import StepDone

EAGER = {"cnn": 5, "resnet18": 1, "resnet18, frozen": 2, "encoder": 6, "encoder, dropout": 6, "decoder": 7}  # ways beside the plain one
REORDERED = 2e-5  # relative, of losses after some updates in float32


def images(size: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = torch.rand(count, 1, size, size, generator=generator)
    x[torch.arange(count), 0, y] += 2
    return x, y


def recipes(tmp_path: Path, speaker: Path, chats: Path) -> dict[str, dict[str, Any]]:
    texts = tmp_path / "texts.csv"
    rows = ["the sun warms the hills", "rain falls", "seven boats wait in the harbour for the tide", "wind"] * 12
    texts.write_text("text,kind\n" + "\n".join(f"{row} {i},{'ab'[i % 2]}" for i, row in enumerate(rows)))
    common = {"batch": 8, "optimizer": {"name": "sgd", "lr": 0.02}, "seed": 1, "report": (), "evaluate": {"keep": "last"}}
    small = {"from": "encoder", "width": 16, "layers": 2, "heads": 2}
    resnet = {"from": "resnet18", "stem": "small"}
    exact = {**common, "precision": "float64"}  # BatchNorm over a few samples makes much of the last bit
    return {
        "cnn": {
            **common,
            "task": "classify",
            "model": {"from": "cnn", "channels": [8, 8], "dropout": 0.3},
            "data": {"train": images(12)},
            "epochs": 2,
        },
        "resnet18": {**exact, "task": "classify", "model": resnet, "data": {"train": images(16, 20)}, "epochs": 2},
        "resnet18, frozen": {
            **exact,
            "task": "classify",
            "model": resnet,
            "freeze": {"through": "layer3"},
            "data": {"train": images(16, 20)},
            "epochs": 2,
        },
        "encoder": {**common, "task": "classify", "model": {**small, "dropout": 0.0}, "data": {"train": str(texts)}, "epochs": 2},
        "encoder, dropout": {**common, "task": "classify", "model": {**small, "dropout": 0.2}, "data": {"train": str(texts)}, "epochs": 2},
        "decoder": {**common, "task": "chat", "model": str(speaker), "adapter": "lora", "data": str(chats), "steps": 8},
    }


def ways(plan: Plan, kinds: str) -> Iterator[tuple[str, Plan]]:
    """Every way that the model allows, against the plan with nothing chosen"""
    plain = plan.without(*plan.fast_ways)
    yield "plain", plain
    if kinds == "compiled":
        yield "compile", replace(plain, compiled=True)
        return
    if not plan.facts.may_not_be_cut:
        yield from ((f"micro-batch {size}", replace(plain, micro_batch=size)) for size in (1, 3, 7))
    live = set(plan.facts.model.coupled) - set(plan.facts.frozen.layers)
    if again := may_run_again(plan.facts) or (() if live else plan.facts.model.stages):
        yield "checkpointing", replace(plain, checkpointed=again)
    for name in plan.fast_ways:
        yield name, plan.without(*(other for other in plan.fast_ways if other != name))
    yield "as planned", plan


def losses(planned: fz.Planned) -> list[float]:
    heard: list[float] = []
    fz.run(planned, quiet=True, observers=[lambda event: heard.append(event.loss) if isinstance(event, StepDone) else None])
    return heard


@pytest.mark.parametrize("kinds", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet18, frozen", "encoder", "encoder, dropout", "decoder"])
def test_the_curve_is_the_same_whatever_the_way(name: str, kinds: str, tmp_path: Path, speaker: Path, chats: Path) -> None:
    planned = fz.plan(recipes(tmp_path, speaker, chats)[name], runs=tmp_path, probe=False)
    curves = {way: losses(replace(planned, plan=plan)) for way, plan in ways(planned.plan, kinds)}
    plain = torch.tensor(curves.pop("plain"))
    assert len(curves) == (EAGER[name] if kinds == "eager" else 1) and len(plain) >= 5, list(curves)
    for way, curve in curves.items():
        apart = float(((torch.tensor(curve) - plain).abs() / plain.abs()).max())
        assert apart <= REORDERED, (way, apart)
        if way == "checkpointing":
            assert apart == 0.0
