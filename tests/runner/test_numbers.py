"""Numbers of text models: the layer that goes wrong is named whatever the way, and no spoiled model is written or exported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fromzero as fz
from fromzero.runner.assemble import assemble
from fromzero.runner.before import Before
from fromzero.runner.numbers import _first_layer
from fromzero.runner.prefix import keep_prefix
from fromzero.runner.saved import write_model
from fromzero.sources import digest_of
from fromzero.tuning import frozen_digest, set_training

NAN = float("nan")


def test_a_model_that_is_no_finite_number_is_neither_written_nor_exported(tmp_path: Path, speaker: Path, chats: Path) -> None:
    keys = {
        "name": "talk",
        "task": "chat",
        "model": str(speaker),
        "data": str(chats),
        "steps": 2,
        "batch": 8,
        "report": (),
        "limits": {"threads": 1},
    }
    planned = fz.plan(keys, runs=tmp_path, probe=False)
    fz.run(planned, quiet=True)
    job = assemble(planned.plan, planned.loaded, planned.place)
    saved = replace(job.saved, folder=tmp_path / "new")
    state = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    state["blocks.1.attention.qkv.weight"][3, 4] = NAN
    with pytest.raises(fz.NumbersError, match=r"blocks\.1\.attention\.qkv\.weight is no finite number: 1 of its 2048 values"):
        write_model(tmp_path / "new", saved, state, None)
    assert not (tmp_path / "new").exists()
    with pytest.raises(fz.NumbersError):
        write_model(tmp_path / "new", saved, job.model.state_dict(), state)
    file = tmp_path / "talk" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    description = json.loads((tmp_path / "talk" / "model" / "model.json").read_text())
    description["weights"]["model.safetensors"] = digest_of(file)
    (tmp_path / "talk" / "model" / "model.json").write_text(json.dumps(description))
    with pytest.raises(fz.ModelError, match=r"blocks\.0\.mlp\.up\.weight is no finite number: 1 of its 3072 values .*; whoever opened"):
        fz.export("run:talk", tmp_path / "out", runs=tmp_path)
    assert not (tmp_path / "out").exists()


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adapters": ({"adapter": "lora"}, {}, "blocks.1.mlp.down"),
    "pieces": ({}, {"micro_tokens": 40}, "blocks.1.mlp.down"),
    "stages that run again": ({}, {"checkpointed": ("blocks.0", "blocks.1")}, "blocks.1.mlp.down"),
    "compiled code": ({}, {"compiled": True}, "blocks.1.mlp.down"),
    "a tied head": ({}, {}, "what the model makes of them is none"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_layer_is_named_as_the_person_knows_it_whatever_the_way(
    way: str, tmp_path: Path, speaker: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("compiled code has no place for looking")

    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", fails))
    keys, chosen, named = WAYS[way]
    base = {"task": "chat", "model": str(speaker), "data": str(chats), "steps": 2, "batch": 8, "report": (), "limits": {"threads": 1}}
    planned = fz.plan({**base, **keys}, runs=tmp_path, probe=False)
    job = assemble(replace(planned.plan, **chosen), planned.loaded, planned.place)
    set_training(job.model, job.frozen)
    with torch.no_grad():
        if way == "a tied head":
            job.model.norm.weight.fill_(1e37)
            job.model.embedding.tokens.weight.mul_(1e3)
        elif way == "adapters":
            job.model.blocks[1].mlp.down.b.fill_(NAN)
        else:
            job.model.blocks[1].mlp.down.weight[0, 0] = NAN
    said = _first_layer(job, torch.arange(8), 0, Before(job))
    assert (job.model._compiled_call_impl is not None) == (way == "compiled code"), "and compiled again"
    assert named in said and "given one already" not in said, said


def test_a_layer_of_the_frozen_part_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x, y = torch.rand(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 2
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    keys = {"task": "classify", "model": body, "data": {"train": (x, y)}, "freeze": "body", "batch": 8, "epochs": 200, "report": ()}
    planned = fz.plan(keys, runs=tmp_path, probe=False)
    job = assemble(replace(planned.plan, prefix="4", kept_in="memory"), planned.loaded, planned.place)
    keep_prefix(job, frozen_digest(job.model, job.frozen), lambda event: None, lambda: None)
    assert job.stepped is not job.model
    with torch.no_grad():
        body_of = job.model.get_submodule("2")
        body_of.bias[0] = NAN
    assert "no finite number is 2" in _first_layer(job, torch.arange(4), 0, Before(job))
