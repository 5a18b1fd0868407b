"""An exported folder computes what the model computes, for us and for transformers, or is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fromzero as fz
from fromzero.errors import ModelError, UserError
from fromzero.use import export as exporting
from tests.use.conftest import BLUE, FRANCE, PARIS, SKY, turns


@pytest.fixture(scope="module")
def adapted(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with one of adapters beside the talker"""
    place = tmp_path_factory.mktemp("adapted")
    rows = [{"messages": turns(FRANCE, PARIS)}, {"messages": turns(SKY, BLUE)}]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "learned",
        "task": "chat",
        "model": str(talker),
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(place / "chats.jsonl"), "hold_out": 0},
        "optimizer": {"name": "adamw", "lr": 0.05},
        "batch": 2,
        "steps": 4,
    }
    fz.train(recipe, runs=place / "runs", quiet=True)
    return place / "runs"


def test_what_adapters_learned_stands_in_plain_matrices_that_transformers_loads(adapted: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = fz.export("run:learned", tmp_path / "out", runs=adapted)
    assert found.difference < 1e-5 and found.difference_transformers is not None and found.difference_transformers < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(found.folder).eval()
    ours = fz.load("run:learned", runs=adapted)
    ids = torch.arange(20)
    with torch.no_grad():
        assert torch.allclose(ours(ids, torch.tensor([0, 20])), theirs(ids[None]).logits[0], atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": FRANCE}], add_generation_prompt=True, return_dict=True)
    ends = theirs.generation_config.eos_token_id  # which the talker's own cards did not name
    said = theirs.generate(torch.tensor([asked["input_ids"]]), max_new_tokens=60, do_sample=False, eos_token_id=ends)
    assert int(said[0, -1]) in ends  # it stops by itself
    assert not list(tmp_path.glob(".out-*"))


def test_a_folder_that_computes_something_else_is_not_kept(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting.write_folder

    def spoiled(folder: Path, config: dict, tensors: dict, **others: object) -> dict[str, str]:
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        return write(folder, config, {**tensors, name: -tensors[name]}, **others)

    monkeypatch.setattr(exporting, "write_folder", spoiled)
    with pytest.raises(ModelError, match="computes something else"):
        fz.export("run:learned", tmp_path / "out", runs=adapted)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_it_is_built(adapted: Path, talker: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format"):
        fz.export("run:learned", tmp_path / "out", to="transformer", runs=adapted)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something"):
        fz.export("run:learned", tmp_path / "full", runs=adapted)
    with pytest.raises(ModelError, match="no weights"):
        fz.export("mlp", tmp_path / "out", runs=adapted)


def test_a_published_folder_goes_through_unchanged(talker: Path, tmp_path: Path) -> None:
    found = fz.export(str(talker), tmp_path / "out")
    assert found.difference == 0.0 and (tmp_path / "out" / "tokenizer_config.json").is_file()
