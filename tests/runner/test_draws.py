"""Dropout belongs to seed, epoch, example, layer and call: written out in whole numbers, near enough to chance, and the same in every way."""

import hashlib
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
from fromzero.runner import execute
from fromzero.runner.draws import Draws
from fromzero.runner.regions import make_plain

WORD, HALF = 2**64 - 1, 2**32 - 1


def mixed(z: int) -> int:
    """SplitMix64's mixing, OOPSLA 2014, figure 16"""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def falls_out(seed: int, epoch: int, sample: int, place: int, layer: str, call: int, column: int, p: float) -> bool:
    """One value's draw, in whole numbers.  place: of the token in its text, 0 where there is none"""
    golden = 0x9E3779B97F4A7C15
    base = mixed((seed * golden + epoch + 1) & WORD) & (2**63 - 1)
    key = mixed((sample * golden + base) & WORD)
    row = mixed((key + mixed(place)) & WORD) >> 32
    name = hashlib.sha256(f"{layer}#{call}".encode()).digest()
    first, second = int.from_bytes(name[:4], "little"), int.from_bytes(name[4:8], "little") | 1
    bits = ((row ^ first) * second & HALF) ^ mixed(mixed(column)) >> 32
    bits = bits * 0x2C1B3C6D & HALF
    sign = HALF ^ (HALF >> 15) if bits >> 31 else 0
    bits = (bits ^ (bits >> 15 | sign)) * 0x297A2D39 & HALF
    return (bits ^ 2**31) < round(p * 2**32)  # as a number with a sign, moved up by half the range


def drawn(layer: nn.Module, values: Tensor, *, seed: int = 3, epoch: int = 2, samples: Tensor | None = None, name: str = "0") -> Tensor:
    model = nn.Sequential(layer) if name == "0" else nn.ModuleDict({name: layer})
    draws = Draws(seed)
    draws.carry_out(model)
    draws.begin(torch.arange(len(values)) if samples is None else samples, epoch, None)
    out: Tensor = layer(values)
    make_plain(model)
    return out


def masks(count: int, width: int, p: float, **keys: Any) -> Tensor:
    """(count, width) True where a value stays"""
    return drawn(nn.Dropout(p), torch.ones(count, width), **keys) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_value_falls_out_where_the_formula_says(p: float) -> None:
    samples = torch.tensor([7, 0, 4_000_000_000])
    out = drawn(nn.Dropout(p), torch.ones(3, 5, 2), samples=samples)
    wanted = [[0.0 if falls_out(3, 2, s, 0, "0", 1, c, p) else 1 / (1 - p) for c in range(10)] for s in samples.tolist()]
    torch.testing.assert_close(out.flatten(1), torch.tensor(wanted))
    assert 0 < (out == 0).sum() < 30


def test_a_token_draws_by_its_place_in_its_own_text() -> None:
    layer = nn.Dropout(0.5)
    draws = Draws(3)
    draws.carry_out(nn.ModuleDict({"x": layer}))
    draws.begin(torch.tensor([9, 4]), 2, torch.tensor([3, 2]))
    out, pooled = layer(torch.ones(5, 4)), layer(torch.ones(2, 4))
    rows = [(9, 0), (9, 1), (9, 2), (4, 0), (4, 1)]
    assert (out == 0).tolist() == [[falls_out(3, 2, s, place, "x", 1, c, 0.5) for c in range(4)] for s, place in rows]
    assert (pooled == 0).tolist() == [[falls_out(3, 2, s, 0, "x", 2, c, 0.5) for c in range(4)] for s in (9, 4)], "its second call"


def test_whole_channels_fall_out_of_dropout2d() -> None:
    out = drawn(nn.Dropout2d(0.5), torch.ones(6, 8, 3, 3))
    assert set(out.flatten(2).sum(2).unique().tolist()) == {0.0, 18.0}
    assert torch.equal(out[:, :, 0, 0] == 0, drawn(nn.Dropout(0.5), torch.ones(6, 8)) == 0)


def test_nothing_falls_out_in_eval_mode_or_with_p_0_and_all_with_p_1() -> None:
    x = torch.rand(4, 6)
    assert drawn(nn.Dropout(0.5).eval(), x) is x and drawn(nn.Dropout(0.0), x) is x
    assert drawn(nn.Dropout(1.0), x).eq(0).all()


def test_the_draws_look_like_chance() -> None:
    """Shares, and correlations between any two rows, columns, layers, epochs and seeds, lie where independent draws put them"""
    count, width = 1500, 1024
    for p in (0.1, 0.5):
        found = {
            "plain": masks(count, width, p),
            "epoch": masks(count, width, p, epoch=3),
            "seed": masks(count, width, p, seed=4),
            "layer": masks(count, width, p, name="other"),
        }
        normal = {name: (mask.double() - (1 - p)) / (p * (1 - p)) ** 0.5 for name, mask in found.items()}
        x = normal["plain"]
        assert abs(float(x.mean())) * (count * width) ** 0.5 < 4
        for mean, n in ((x.mean(0), count), (x.mean(1), width)):
            assert float(mean.abs().max()) * n**0.5 < 5.5 and 0.9 < float(mean.square().mean()) * n < 1.1
        for z, n in ((x @ x.T / width**0.5, count), (x.T @ x / count**0.5, width)):
            apart = z[~torch.eye(n, dtype=torch.bool)]
            assert float(apart.abs().max()) < 6.5 and 0.98 < float(apart.square().mean()) < 1.02
        for name in ("epoch", "seed", "layer"):
            z = (x * normal[name]).sum() / (count * width) ** 0.5
            assert abs(float(z)) < 4, name


class Half(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(6, 6), drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.drop(x) + self.inner(x).tanh())


class Shared(nn.Module):
    """One dropout layer that is asked twice in each of two stages."""

    stages = ("one", "two", "head")

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.one, self.two, self.head = Half(self.drop), Half(self.drop), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


def test_a_layer_that_is_asked_twice_draws_twice() -> None:
    model, draws = Shared(), Draws(0)
    draws.carry_out(model)
    draws.begin(torch.arange(50), 0, None)
    x = torch.ones(50, 6)
    assert not torch.equal(model.drop(x), model.drop(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, 0.5, self.training))


class Turned(nn.Module):
    """Dropout over something else than samples"""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x.T).T)


def table() -> tuple[Tensor, Tensor]:
    x = torch.rand(90, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


@pytest.mark.parametrize("model", [Functional, Turned, lambda: nn.Sequential(nn.AlphaDropout(0.5), nn.Linear(6, 3))])
def test_draws_that_belong_to_no_sample_are_seen_and_such_a_batch_is_not_cut(model: Any) -> None:
    recipe = {"task": "classify", "model": model(), "data": {"train": table()}, "batch": 16, "limits": {"micro_batch": 4}}
    planned = fz.plan(recipe, probe=False)
    assert planned.plan.facts.model.random
    with pytest.raises(fz.PlanRefused, match="draws random numbers that belong to no sample, outside of dropout layers"):
        fz.run(planned)


@pytest.mark.parametrize("name", ["a shared layer", "rnn", "gru, a token", "encoder", "mlp", "vit", "dropout2d"])
def test_what_falls_out_is_the_same_whatever_the_pieces(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = tmp_path / "texts.csv"
    texts.write_text(
        "text,kind\n" + "\n".join(f"{'the sun warms hills and harbour '[: 5 * (i % 6) + 5]} number {i},{'xy'[i % 2]}" for i in range(40))
    )
    said = tmp_path / "said.txt"
    said.write_text("\n\n".join(f"to be or not to be, that is {i}" for i in range(60)))
    images = torch.rand(40, 1, 8, 8), torch.arange(40) % 3
    recipe: dict[str, dict[str, Any]] = {
        "a shared layer": {"model": Shared(), "data": {"train": (table()[0], table()[1])}},
        "rnn": {
            "model": {"from": "gru", "width": 8, "layers": 2, "dropout": 0.3},
            "data": {"train": str(texts), "input": "text", "target": "kind"},
        },
        "gru, a token": {
            "task": "language",
            "model": {"from": "gru", "width": 8, "layers": 2, "dropout": 0.3},
            "data": {"train": str(said), "tokenizer": "characters", "max_tokens": 16},
        },
        "encoder": {
            "model": {"from": "encoder", "width": 16, "layers": 2, "heads": 2, "dropout": 0.3},
            "data": {"train": str(texts), "input": "text", "target": "kind"},
        },
        "mlp": {"model": {"from": "mlp", "hidden": [16], "dropout": 0.3}, "data": {"train": table()}},
        "vit": {"model": {"from": "vit-tiny", "patch": 4, "width": 24, "depth": 2, "dropout": 0.3}, "data": {"train": images}},
        "dropout2d": {
            "model": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(144, 3)),
            "data": {"train": images},
        },
    }
    keys = {"task": "classify", "precision": "float64", "batch": 12, "steps": 6, "report": (), "optimizer": {"name": "sgd", "lr": 0.1}}
    weights = []
    for micro in ("auto", 5, 1):
        planned = fz.plan({**keys, **recipe[name], "limits": {"micro_batch": micro}}, runs=tmp_path, probe=False)
        assert planned.plan.facts.model.draws and not planned.plan.facts.model.random
        weights.append(torch.cat([p.flatten() for p in fz.run(planned, quiet=True).model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-9, atol=1e-11)


def test_a_shared_layer_draws_the_same_when_its_stages_run_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    keys = {"task": "classify", "data": {"train": table()}, "batch": 16, "steps": 6, "report": ()}
    planned = fz.plan({**keys, "model": Shared()}, runs=tmp_path, probe=False)
    plain = fz.run(planned, quiet=True).model.state_dict()
    again = replace(planned, plan=replace(planned.plan, checkpointed=("one", "two")))
    found = fz.run(again, quiet=True).model.state_dict()
    assert len(plain) == 6 and all(torch.equal(found[key], value) for key, value in plain.items())


class Noisy(nn.Module):
    """Multiplies with what it draws outside of dropout layers, so that its gradient shows each draw"""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() * (1 + random.random() + np.random.rand() + torch.rand(()))


def test_a_stage_that_runs_again_draws_the_same_from_every_generator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    keys = {"task": "classify", "data": {"train": table()}, "batch": 16, "steps": 4, "report": ()}
    model = nn.Sequential(Noisy(), Noisy(), nn.Linear(6, 3))
    planned = fz.plan({**keys, "model": model}, runs=tmp_path, probe=False)
    assert planned.plan.facts.model.random
    plain = fz.run(planned, quiet=True).model.state_dict()
    again = replace(planned, plan=replace(planned.plan, checkpointed=("0", "1")))
    found = fz.run(again, quiet=True).model.state_dict()
    assert len(plain) == 6 and all(torch.equal(found[key], value) for key, value in plain.items())


def test_the_module_that_comes_back_from_a_run_is_plain_again(tmp_path: Path) -> None:
    keys = {"task": "classify", "data": {"train": table()}, "batch": 16, "steps": 2, "report": ()}
    outcome = fz.train(model=Shared(), runs=tmp_path, quiet=True, **{k: v for k, v in keys.items() if k != "task"})
    assert "forward" not in vars(outcome.model.drop)


def test_what_is_kept_beside_a_model_is_said_by_its_plain_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code met lengths there for which it was not made, and a run that had ended well failed."""
    seen: list[bool] = []
    monkeypatch.setattr(execute, "keep_probe", lambda folder, job: seen.append("forward" in vars(job.model.drop)))
    keys = {"data": {"train": table()}, "batch": 16, "steps": 2, "report": ()}
    fz.train(model=Shared(), runs=tmp_path, quiet=True, **keys)
    assert seen == [False]
