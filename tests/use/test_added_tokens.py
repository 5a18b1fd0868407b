"""Tokens added to a published model: one id each, a row each, learned, saved and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.errors import FromzeroError, ModelError
from fromzero.weights import open_pretrained
from tests.use.conftest import FRANCE, PARIS, turns

TOOL = ["<tool>", "</tool>"]


def recipe(talker: Path, place: Path, **keys: Any) -> dict[str, Any]:
    rows = [{"messages": turns(FRANCE, f"<tool>map</tool>{PARIS}")}, {"messages": turns("Who?", "<tool>who</tool>")}]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": "tools",
        "task": "chat",
        "model": str(talker),
        "data": {"train": str(place / "chats.jsonl"), "hold_out": 0, "add_tokens": TOOL},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0},
        "batch": 2,
        "steps": 12,
        **keys,
    }


@pytest.mark.parametrize("adapter", [None, {"rank": 4, "alpha": 8}], ids=["whole", "adapter"])
def test_an_added_token_is_one_id_with_a_row_that_learns_and_travels(talker: Path, tmp_path: Path, adapter: Any) -> None:
    before = open_pretrained(str(talker))
    old = len(before.tensors["model.embed_tokens.weight"])
    done = fz.train(recipe(talker, tmp_path, **({} if adapter is None else {"adapter": adapter})), runs=tmp_path / "runs", quiet=True)
    model = fz.load("run:tools", runs=tmp_path / "runs")
    rows = model.embedding.tokens.weight
    assert len(rows) == old + 2
    mean = before.tensors["model.embed_tokens.weight"].mean(0)
    assert not torch.allclose(rows[old], mean) and not torch.equal(rows[old], rows[old + 1])
    tokenizer = (done.folder / "model" / "tokenizer.json").read_text(encoding="utf-8")
    assert tk.encode(tokenizer, ["<tool>map</tool>"], special=False)[0][0] == old
    found = fz.export("run:tools", tmp_path / "out", runs=tmp_path / "runs")
    assert found.compared[0].reader == "fromzero" and all(one.difference is None or one.difference < 1e-5 for one in found.compared)


def test_the_new_rows_begin_as_the_mean_and_the_old_ones_stay(talker: Path, tmp_path: Path) -> None:
    planned = fz.plan(recipe(talker, tmp_path), probe=False)
    from fromzero.runner.assemble import build_model

    model, design = build_model(planned.plan.recipe, planned.loaded, planned.place)
    theirs = open_pretrained(str(talker)).tensors["model.embed_tokens.weight"]
    rows = model.embedding.tokens.weight  # type: ignore[union-attr]
    assert torch.equal(rows[:-2], theirs) and torch.allclose(rows[-1], theirs.mean(0), atol=1e-6)
    assert design.blueprint is not None and design.blueprint.options["config"]["vocab_size"] == len(rows)


def test_rows_that_could_not_learn_are_refused(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mean of all others"):
        fz.plan(recipe(talker, tmp_path, freeze=["embedding.*"]), probe=False)


def test_a_larger_tokenizer_is_refused_with_the_cost_of_more_rows_and_taken_when_asked_for(talker: Path, tmp_path: Path) -> None:
    larger = tk.add_tokens((talker / "tokenizer.json").read_text(encoding="utf-8"), ["<a>", "<b>", "<c>", "<d>", "<e>"])
    (tmp_path / "larger.json").write_text(larger, encoding="utf-8")
    asked = recipe(talker, tmp_path)
    asked["data"] |= {"tokenizer": str(tmp_path / "larger.json"), "add_tokens": None}
    with pytest.raises(ModelError, match=r"data.add_tokens: auto\), where 5 more rows would be 240 untrained values") as refused:
        fz.plan(asked, probe=False)
    assert refused.value.code == 2
    asked["data"]["add_tokens"] = "auto"
    assert fz.plan(asked, probe=False).plan.facts.model.parameters > 0


def test_tokens_are_not_added_where_the_data_makes_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four\n" * 400, encoding="utf-8")
    values = {"task": "language", "model": {"from": "lstm", "width": 8}, "batch": 4, "steps": 2}
    with pytest.raises(FromzeroError, match="made from the data"):
        fz.plan({**values, "data": {"train": str(tmp_path / "text.txt"), "tokenizer": "characters", "add_tokens": TOOL}}, probe=False)
