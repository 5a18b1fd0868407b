"""A model begun where its frozen part ends trains as the whole one does: images, texts, conversations, a person's own module."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fromzero as fz
from fromzero.planner import cut
from fromzero.report.events import StepDone, Warned
from fromzero.runner import prefix
from fromzero.runner.cut import begin_at, reads_at, run
from fromzero.sources import cache as cache_room

TINY = {"width": 16, "layers": 3, "heads": 2}
ONE_THREAD = {"threads": 1}  # two would wait for each other at every small product


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prefix, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(cut, "LOST_SECONDS", 1e9)  # a busy machine decides nothing here
    return tmp_path / "cache" / "fromzero" / "kept"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    words = (["rain", "sun", "wind", "cloud"], ["bread", "soup", "apple", "rice"])
    lines = ["text,topic"]
    for i in range(60):
        picks = torch.randint(4, (2 + i % 9,), generator=draw).tolist()
        lines.append(f"there was {' and '.join(words[i % 2][p] for p in picks)} number {i},{'food' if i % 2 else 'weather'}")
    path = tmp_path / "topics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


class Convolutions(nn.Sequential):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.Flatten(),
            nn.Dropout(p),
            nn.Linear(12 * 16, 20),
            nn.BatchNorm1d(20),
            nn.Linear(20, 3),
        )


class Draws(nn.Module):
    """Draws at random between two layers, in its own code"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x.flatten(1)), 0.5, self.training)
        return self.third(self.second(x).relu())


class Skips(Draws):
    """Claims to be a chain, and is none: what runs last also reads what ran first"""

    stages = ("first", "second", "third")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.third(x + self.second(x))


def seeded(kind: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = kind(*arguments)
    return made


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 8, 8, generator=draw), torch.arange(count) % 3


def of_images(model: object, freeze: object, **keys: Any) -> dict[str, Any]:
    base = {"name": "cut", "task": "classify", "model": model, "data": images(), "freeze": freeze}
    return {**base, "optimizer": {"lr": 1e-3}, "batch": 16, "epochs": 3, "limits": ONE_THREAD, **keys}


def of_text(table: Path, freeze: object, **keys: Any) -> dict[str, Any]:
    model = {"from": "encoder", **TINY, "dropout": 0.1}
    data = {"train": str(table), "hold_out": 0.2, "tokenizer": "bpe", "vocabulary": 300}
    base = {"name": "cut", "task": "classify", "model": model, "data": data, "freeze": freeze}
    return {**base, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "batch": 8, "epochs": 3, "limits": ONE_THREAD, **keys}


def of_chats(speaker: Path, chats: Path, **keys: Any) -> dict[str, Any]:
    adapter = {"name": "lora", "rank": 4, "alpha": 8, "targets": "all-linear", "layers": "last-1"}
    base = {"name": "cut", "task": "chat", "model": str(speaker), "adapter": adapter, "data": {"train": str(chats), "hold_out": 0.2}}
    return {**base, "optimizer": {"lr": 1e-2}, "batch": 8, "epochs": 3, "evaluate": {"samples": 1}, "limits": ONE_THREAD, **keys}


def train(values: dict[str, Any], runs: Path, *, live: bool = False, **plan: Any) -> tuple[fz.Planned, Any, list[float], list[str]]:
    """live: the whole model in each step, whatever was planned.  returns: plan, outcome, loss of each step, warnings"""
    planned = fz.plan(values, runs=runs, **plan)
    if live:
        planned = replace(planned, plan=replace(planned.plan, prefix="", kept_in=""))
    events: list[object] = []
    outcome = fz.run(planned, quiet=True, observers=[events.append])
    said = [event.what for event in events if isinstance(event, Warned)]
    return planned, outcome, [event.loss for event in events if isinstance(event, StepDone)], said


def assert_same(values: dict[str, Any], runs: Path, begin: str) -> fz.Planned:
    """Begun at the cut and whole: the same losses, weights and measurements."""
    planned, begun, losses, said = train(values, runs)
    assert planned.plan.prefix == begin and planned.plan.grade in ("reordered", "precision") and not said, (planned.plan.prefix, said)
    _, whole, plain, _ = train(values, runs, live=True)
    assert len(losses) == len(plain) >= 9
    assert torch.allclose(torch.tensor(losses), torch.tensor(plain), rtol=1e-6, atol=1e-6)
    ours, theirs = begun.model.state_dict(), whole.model.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in ours)
    assert begun.result["validation"] == pytest.approx(whole.result["validation"], rel=1e-5)
    return planned


# ------------------------------------------------------------------------------------ the same training


def test_a_resnet_frozen_through_its_third_layer(tmp_path: Path, cache: Path) -> None:
    planned = assert_same(of_images({"from": "resnet18", "stem": "small"}, {"through": "layer3"}), tmp_path, "layer4.0")
    assert planned.plan.facts.model.reads["layer4.0"].shape == (256, 2, 2)
    (said,) = [choice.reason for choice in planned.plan.choices if choice.name == "frozen part"]
    assert said.startswith("what layer4.0 reads is computed once, 164 kB in memory; a step takes ")
    certificate = planned.plan.facts.measured.certificate  # type: ignore[union-attr]
    assert certificate is not None and certificate.error <= certificate.bound and not certificate.refused


def test_a_vision_transformer_frozen_through_a_block(tmp_path: Path, cache: Path) -> None:
    model = {"from": "vit-tiny", "patch": 4, "width": 24, "depth": 2, "dropout": 0.1}
    assert_same(of_images(model, {"through": "blocks.0"}), tmp_path, "blocks.1")


def test_an_encoder_frozen_through_a_block_keeps_a_row_for_each_token(table: Path, tmp_path: Path, cache: Path) -> None:
    planned = assert_same(of_text(table, {"through": "blocks.1"}), tmp_path, "blocks.2")
    assert planned.plan.facts.model.reads["blocks.2"].per_token


def test_an_encoder_whose_dropout_is_at_work_before_the_head_begins_at_that_dropout(table: Path, tmp_path: Path, cache: Path) -> None:
    planned = assert_same(of_text(table, {"through": "blocks.2"}), tmp_path, "dropout")
    assert not planned.plan.facts.model.reads["dropout"].per_token


def test_a_decoder_with_adapters_on_its_last_block(speaker: Path, chats: Path, tmp_path: Path, cache: Path) -> None:
    planned = assert_same(of_chats(speaker, chats), tmp_path, "blocks.1")
    assert planned.plan.lowrank == "merged"


def test_pieces_of_a_batch_of_text_take_their_own_documents(speaker: Path, chats: Path, tmp_path: Path, cache: Path) -> None:
    assert_same(of_chats(speaker, chats, limits={"micro_batch": 3, **ONE_THREAD}), tmp_path, "blocks.1")


def test_raw_text_with_its_lower_half_frozen(tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    data = {"train": str(corpus), "tokenizer": "characters", "max_tokens": 32}
    keys = {"name": "cut", "task": "language", "model": {"from": "decoder", **TINY, "context": 32, "tied": False}, "data": data}
    assert_same({**keys, "freeze": {"through": "blocks.1"}, "batch": 8, "epochs": 3, "limits": ONE_THREAD}, tmp_path, "blocks.2")


@pytest.mark.parametrize(("through", "begin"), [("4", "6"), ("1", "4"), ("7", "8")], ids=["dropout-next", "pooled", "batch-norm-next"])
def test_a_person_s_own_module_begins_at_the_first_layer_that_is_not_at_rest(tmp_path: Path, cache: Path, through: str, begin: str) -> None:
    assert_same(of_images(seeded(Convolutions), {"through": through}), tmp_path, begin)


# ---------------------------------------------------------------------------------- where it is not cut


def test_what_draws_at_random_is_not_cut_behind(tmp_path: Path, cache: Path) -> None:
    values = of_images(seeded(Draws), {"through": "second"})
    planned = fz.plan(values, runs=tmp_path)
    assert planned.plan.prefix == "" and "differs by" in str(planned)
    _, _, losses, said = train(values, tmp_path, probe=False)  # no trial steps: the run finds it
    _, _, plain, _ = train(values, tmp_path, live=True)
    assert any("the frozen part is run each time: the frozen part draws at random" in what for what in said) and losses == plain


def test_a_model_that_only_claims_to_be_a_chain_is_run_whole(tmp_path: Path, cache: Path) -> None:
    values = of_images(seeded(Skips), {"through": "second"})
    planned = fz.plan(values, runs=tmp_path)
    assert planned.plan.prefix == "third" or "differs by" in str(planned)  # what third reads is all that follows
    values = of_images(seeded(Skips), {"through": "first"})
    planned = fz.plan(values, runs=tmp_path)
    assert planned.plan.prefix == "" and "it cannot begin at 'second'" in " ".join(str(planned).split())
    _, _, losses, said = train(values, tmp_path, probe=False)
    _, _, plain, _ = train(values, tmp_path, live=True)
    assert any("cannot begin at 'second'" in what for what in said) and losses == plain


@pytest.mark.parametrize(
    ("freeze", "begin"),
    [(["0.*"], "1"), (["0.*", "4.*"], "1"), (["4.*"], ""), ("none", "")],
    ids=["batch-norm-next", "batch-norm-between", "first-learns", "all-learns"],
)
def test_a_batch_norm_that_is_not_frozen_ends_what_is_kept(tmp_path: Path, freeze: object, begin: str) -> None:
    assert fz.plan(of_images(seeded(Convolutions), freeze), runs=tmp_path, probe=False).plan.prefix == begin


def test_embeddings_that_learn_or_adapters_in_every_block_leave_nothing_to_keep(speaker: Path, chats: Path, tmp_path: Path) -> None:
    whole = {"rank": 2, "targets": "all-linear"}
    for adapter in (whole, {**whole, "layers": "last-1", "train": ["embedding.tokens.weight"]}):
        planned = fz.plan(of_chats(speaker, chats, adapter=adapter), runs=tmp_path, probe=False)
        assert planned.plan.prefix == "" and "frozen part" not in str(planned)


def test_what_fits_nowhere_is_not_kept_and_what_does_not_fit_into_memory_is_kept_in_a_file(tmp_path: Path, cache: Path) -> None:
    values = of_images(seeded(Convolutions), {"through": "4"})
    planned = fz.plan(values, runs=tmp_path, probe=False)
    assert planned.plan.kept_in == "memory" and "in memory" in str(planned)
    from fromzero.planner.make import make

    def with_room(host: int, disk: int) -> Any:
        facts = planned.plan.facts
        return make(planned.plan.recipe, replace(facts, machine=replace(facts.machine, host_bytes=host, disk_bytes=disk)))

    needs = 4 * 40 * 12 * 16
    assert with_room(4 * needs, 0).kept_in == "memory"
    assert with_room(4 * needs - 4, needs).kept_in == "file"
    refused = with_room(4 * needs - 4, needs - 1)
    assert refused.prefix == refused.kept_in == ""
    assert any("what 6 reads of all examples is" in choice.reason for choice in refused.choices)


def test_inputs_that_change_from_epoch_to_epoch_are_not_kept(tmp_path: Path) -> None:
    x, y = images()
    for data, said in (
        ({"train": (x, y), "augment": "light"}, "data.augment changes the inputs every epoch"),
        ({"train": [(a, int(b)) for a, b in zip(x, y, strict=True)]}, "a dataset of your own may give something else each time"),
    ):
        planned = fz.plan(of_images(seeded(Convolutions), {"through": "4"}, data=data), runs=tmp_path, probe=False)
        assert planned.plan.prefix == "" and [c.reason for c in planned.plan.choices if c.name == "frozen part"] == [said]


def test_a_part_whose_end_is_not_known_is_run_each_time_and_the_plan_says_why(tmp_path: Path) -> None:
    class Branches(Draws):
        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x.flatten(1)))) if x.sum() > 0 else self.third(self.first(x.flatten(1)))

    planned = fz.plan(of_images(seeded(Branches), {"through": "first"}), runs=tmp_path, probe=False)
    (reason,) = [choice.reason for choice in planned.plan.choices if choice.name == "frozen part"]
    assert planned.plan.prefix == "" and reason.startswith("where it ends is not known: the order of its layers cannot be read")


def test_trial_steps_that_are_slower_from_the_cut_decide_against_it(tmp_path: Path) -> None:
    planned = fz.plan(of_images(seeded(Convolutions), {"through": "4"}), runs=tmp_path)
    from fromzero.planner.make import make

    facts = planned.plan.facts
    assert facts.measured is not None and planned.plan.prefix == "6"
    slow = replace(facts.measured, step_seconds=1.0, kept_step_seconds=2.0)
    refused = make(planned.plan.recipe, facts.with_measured(slow))
    assert refused.prefix == "" and any("the run would take" in choice.reason for choice in refused.choices)


# ------------------------------------------------------------------------------------- the file, resume


def in_a_file(planned: fz.Planned) -> fz.Planned:
    return replace(planned, plan=replace(planned.plan, kept_in="file"))


def test_rows_read_from_a_file_train_as_rows_in_memory(speaker: Path, chats: Path, tmp_path: Path, cache: Path) -> None:
    planned, _, losses, _ = train(of_chats(speaker, chats), tmp_path)
    (file,) = cache.glob("*")
    file.unlink()
    outcome = fz.run(in_a_file(planned), quiet=True)
    (file,) = cache.glob("*")
    events = (outcome.folder / "events.jsonl").read_text()
    again = [fz_loss(line) for line in events.splitlines() if '"StepDone"' in line]
    assert again == losses
    train(of_chats(speaker, chats, optimizer={"lr": 1e-3}), tmp_path)
    assert list(cache.glob("*")) == [file]  # another learning rate takes the same file
    train(of_chats(speaker, chats, data={"train": str(chats), "hold_out": 0.3}), tmp_path)
    assert len(list(cache.glob("*"))) == 2


def fz_loss(line: str) -> float:
    import json

    return float(json.loads(line)["loss"])


def test_a_file_that_was_spoiled_is_written_anew(speaker: Path, chats: Path, tmp_path: Path, cache: Path) -> None:
    planned, _, losses, _ = train(of_chats(speaker, chats), tmp_path)
    (file,) = cache.glob("*")
    whole = file.read_bytes()
    for spoiled in (whole[:-100], whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:], b"", b"x" * 500):
        file.write_bytes(spoiled)
        heard: list[object] = []
        outcome = fz.run(in_a_file(planned), quiet=True, observers=[heard.append])
        assert [event.loss for event in heard if isinstance(event, StepDone)] == losses and outcome.result["status"] == "done"
        assert any("computed anew" in event.what for event in heard if isinstance(event, Warned))
        assert file.read_bytes() == whole


@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_full_disk_is_said_and_does_not_stop_the_run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    values = of_images(seeded(Convolutions), {"through": "4"})
    planned = fz.plan(values, runs=tmp_path)
    _, _, plain, _ = train(values, tmp_path, live=True)

    def full(path: Path, shapes: object, dtype: object, blocks: Iterable[Tensor]) -> None:
        next(iter(blocks))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix, "write_blocks", full)
    heard: list[object] = []
    fz.run(replace(planned, plan=replace(planned.plan, kept_in=place)), quiet=True, observers=[heard.append])
    (said,) = [event.what for event in heard if isinstance(event, Warned)]
    assert "No space left" in said and ("for this run alone" in said if place == "memory" else "run each time" in said)
    losses = [event.loss for event in heard if isinstance(event, StepDone)]
    assert torch.allclose(torch.tensor(losses), torch.tensor(plain), rtol=1e-6)


def test_the_oldest_files_make_room_and_what_is_larger_than_all_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 500}))
    assert cache_room.room(tmp_path) == cache_room.room(tmp_path / "not" / "there") + 150 == 400
    cache_room.make_room(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    with pytest.raises(OSError, match="No space left"):
        cache_room.make_room(tmp_path, 301)
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["chats", "images"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(kind: str, speaker: Path, chats: Path, tmp_path: Path, cache: Path) -> None:
    if kind == "chats":
        values = of_chats(speaker, chats, save={"every": 1, "keep": 30})
    else:
        values = of_images(seeded(Convolutions), {"through": "4"}, save={"every": 1, "keep": 30})
    _, whole, _, _ = train(values, tmp_path / "a")

    class Killed(BaseException):
        pass

    def kill(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise Killed

    planned = fz.plan(values, runs=tmp_path / "b")
    assert planned.plan.prefix
    with pytest.raises(Killed):
        fz.run(planned, observers=[kill], quiet=True)
    for file in cache.glob("*"):
        file.unlink()  # computed again, from the first example on
    given = {} if kind == "chats" else {"model": seeded(Convolutions), "data": images()}
    resumed = fz.resume("cut", runs=tmp_path / "b", quiet=True, **given)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------------------------------- the cut itself


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :3], x[:, 3:]


class Reused(nn.Module):
    """One activation used before and after, a scale computed beside the chain, and layers that give two tensors"""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.first, self.second, self.head = nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.pair = nn.GRU(6, 6, batch_first=True)
        self.beside, self.halves = nn.Identity(), Halves()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.beside(torch.ones(len(x), 6))
        y = torch.cat(self.halves(self.act(self.first(x))), dim=1)
        y = self.act(self.second(y))
        y = self.pair(y[:, None])[0][:, 0]
        return self.head(self.act(y) * scale)


class Idle(Reused):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def test_what_stands_beside_the_chain_is_computed_and_a_layer_that_runs_again_runs(tmp_path: Path) -> None:
    model, x = seeded(Reused).eval(), torch.rand(5, 4)
    kept = reads_at(model, "second", (x,))
    assert torch.equal(kept, model.first(x).relu())
    tail = begin_at(model, "second", (x[:2],))
    assert torch.equal(tail(kept, torch.zeros(5, 4)), model(x))
    assert torch.equal(begin_at(model, "act", (x[:2],))(model.first(x), torch.zeros(5, 4)), model(x))
    assert "forward" not in vars(model.first) and torch.equal(run(model, (x,)), model(x))  # as it was
    assert {id(p) for p in tail.parameters()} == {id(p) for p in model.parameters()}


def test_a_layer_that_gives_more_than_one_tensor_forbids_what_comes_after_it() -> None:
    model, x = seeded(Reused).eval(), torch.rand(5, 4)
    with pytest.raises(fz.ModelError, match="'pair' gives a tuple, not one tensor with a row for each example"):
        begin_at(model, "head", (x,))
    with pytest.raises(fz.ModelError, match="'beside' does not run"):
        reads_at(seeded(Idle), "beside", (x,))
