"""Models that fromzero does not write itself, from a recipe to use: planned, trained, gone on with, opened again, refused."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.models import FAMILIES
from fromzero.runner.saved import read_model
from fromzero.runner.start import build_published
from fromzero.weights import open_pretrained

WORDS = {"weather": ["rain", "sun", "wind", "cloud", "storm", "snow"], "food": ["bread", "cheese", "soup", "apple", "rice", "tea"]}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    lines = ["text,topic"]
    for i in range(80):
        topic = list(WORDS)[i % 2]
        picks = torch.randint(6, (2 + i % 7,), generator=generator).tolist()
        lines.append(f"today there was {' and '.join(WORDS[topic][p] for p in picks)} number {i},{topic}")
    path = tmp_path / "topics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 120)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, level in (("dark", 30), ("light", 210)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (level + i, level, level - i)).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def published(folder: Path, kind: str, make: str, texts: Path, **more: Any) -> Path:
    """A tiny model as others publish it, with a tokenizer learned from the texts"""
    assert kind not in FAMILIES
    tokenizer = tk.byte_pairs(texts.read_text().splitlines(), 300)
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, vocab_size=tk.vocabulary_size(tokenizer), **SHAPE, **more)
    getattr(transformers, make)(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def classify(data: Path, model: object, **more: object) -> dict[str, Any]:
    values = {"task": "classify", "model": model, "batch": 8, "epochs": 5, "optimizer": {"lr": 1e-2}, "report": []}
    values["limits"] = {"threads": 1}  # tiny models only wait for each other's threads
    return {"name": "t", "data": {"train": str(data), "hold_out": 0.2}, **values, **more}


@pytest.mark.parametrize(
    ("kind", "make"), [("electra", "ElectraForPreTraining"), ("mpnet", "MPNetModel"), ("gpt_neox", "GPTNeoXForCausalLM")]
)
def test_texts_are_classified_on_a_body_of_transformers_and_opened_again(kind: str, make: str, table: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", kind, make, table)
    planned = fz.plan(classify(table, str(folder), head="new"), runs=tmp_path / "runs")
    told = next(str(f) for f in planned.plan.findings if f.code == "foreign")
    assert f"the model is built by transformers {transformers.__version__}" in told and planned.plan.attention == ""
    outcome = fz.run(planned, quiet=True)
    assert outcome.result["validation"]["accuracy"] == 1.0
    found = fz.predict("run:t", ["there was rain and snow and wind", "there was bread and tea"], runs=tmp_path / "runs")
    assert [row.answer for row in found.rows] == ["weather", "food"]
    assert fz.evaluate("run:t", str(table), runs=tmp_path / "runs")["accuracy"] >= 0.95
    assert read_model(tmp_path / "runs" / "t" / "model").design.blueprint.kind == "foreign"  # type: ignore[union-attr]
    again = fz.load(str(tmp_path / "runs" / "t" / "model"), runs=tmp_path / "elsewhere").state_dict()  # it brings no code
    assert len(again) >= 20 and all(torch.equal(again[name], tensor) for name, tensor in outcome.model.state_dict().items())


def test_frozen_the_body_keeps_its_published_bits_and_a_run_is_gone_on_from(table: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", "electra", "ElectraForPreTraining", table)
    recipe = classify(table, str(folder), head="new", freeze="body", epochs=1)
    planned = fz.plan(recipe, runs=tmp_path, probe=False)
    assert planned.plan.trainable_parameters == 2 * 16 + 2
    outcome = fz.run(planned, quiet=True)
    file, after = load_file(folder / "model.safetensors"), outcome.model.state_dict()
    same = [name for name in file if name.startswith("electra.")]
    assert len(same) >= 30 and all(torch.equal(after[f"theirs.{name}"], file[name]) for name in same)
    second = fz.run(fz.plan({**recipe, "name": "second", "model": "run:t", "head": "keep", "freeze": "none"}, runs=tmp_path), quiet=True)
    assert second.result["validation"]["loss"] < outcome.result["validation"]["loss"]


def test_a_stopped_run_goes_on_to_the_same_weights(table: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", "mpnet", "MPNetModel", table)  # its dropout is drawn in training
    recipe = classify(table, str(folder), head="new", epochs=2)
    whole = fz.run(fz.plan({**recipe, "name": "whole"}, runs=tmp_path, probe=False), quiet=True)
    planned = fz.plan({**recipe, "name": "part", "limits": {"seconds": 0.0001, "threads": 1}}, runs=tmp_path, probe=False)
    with pytest.raises(fz.NumbersError):
        fz.run(planned, quiet=True)
    text = (tmp_path / "part" / "recipe.yaml").read_text()
    (tmp_path / "part" / "recipe.yaml").write_text(text.replace("0.0001", "none"))
    part = fz.resume("part", runs=tmp_path, quiet=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, part.model.state_dict()[name]), name


def test_what_is_fresh_in_a_published_model_follows_from_the_seed(table: Path, tmp_path: Path) -> None:
    found = open_pretrained(str(published(tmp_path / "body", "electra", "ElectraForPreTraining", table)))
    built = []
    for ambient, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        built.append(build_published(found, {}, fresh_head=2, seed=seed)[0].state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    first, second, third = built
    assert all(torch.equal(first[name], second[name]) for name in first)
    apart = [name for name in first if not torch.equal(first[name], third[name])]
    assert apart == ["theirs.classifier.dense.weight", "theirs.classifier.out_proj.weight"]


def test_a_corpus_is_gone_on_with_by_a_published_language_model(corpus: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", "gpt_neox", "GPTNeoXForCausalLM", corpus)
    recipe = {"name": "c", "task": "language", "model": str(folder), "batch": 8, "steps": 60, "optimizer": {"lr": 1e-2}, "report": []}
    recipe |= {"limits": {"threads": 1}, "data": {"train": str(corpus), "max_tokens": 24}}
    outcome = fz.run(fz.plan(recipe, runs=tmp_path / "runs"), quiet=True)
    measured = outcome.result["validation"]
    assert measured["loss"] < 1.0 and measured["token_accuracy"] > 0.6
    assert fz.evaluate("run:c", str(corpus), runs=tmp_path / "runs")["loss"] < 1.0
    model = fz.load(str(folder))  # per token, as its config.json says
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([5, 9, 2, 7, 7])
    expected = torch.cat([theirs(input_ids=part[None]).logits[0] for part in tokens.split([2, 3])])
    torch.testing.assert_close(model(tokens, torch.tensor([0, 2, 5])), expected, rtol=1e-5, atol=1e-6)


def test_images_are_classified_with_the_mean_and_deviation_that_came_along(pictures: Path, tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=7)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "net")
    recipe = classify(pictures, str(tmp_path / "net"), head="new", epochs=12)
    bare = next(f for f in fz.plan(recipe, runs=tmp_path, probe=False).plan.findings if f.code == "foreign")
    assert "which gets (pixels - 0.5) / 0.5, for want of a preprocessor_config.json" in bare.what and bare.severity == "note"
    scale = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, **scale}))
    planned = fz.plan(recipe, runs=tmp_path)
    told = next(f.what for f in planned.plan.findings if f.code == "foreign")
    assert told.endswith("which gets (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.2, 0.3]") and "outputs" not in {
        f.code for f in planned.plan.findings
    }
    assert fz.run(planned, quiet=True).result["validation"]["accuracy"] == 1.0
    found = fz.predict("run:t", str(pictures / "dark"), runs=tmp_path)
    assert {row.answer for row in found.rows} == {"dark"}
    opened: Any = fz.load("run:t", runs=tmp_path)
    assert opened.mean.flatten().tolist() == pytest.approx(scale["image_mean"])


# ------------------------------------------------------------------------------------------- refusals


def rewrite(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


def test_code_beside_the_weights_is_named_and_not_run(table: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", "electra", "ElectraForPreTraining", table)
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nclass Net: pass\nclass Config: pass\n")
    wanted = {"AutoConfig": "modeling_evil.Config", "AutoModelForSequenceClassification": "modeling_evil.Net"}
    for kind in ("electra", "evil"):
        rewrite(folder, model_type=kind, auto_map=wanted)
        with pytest.raises(fz.ModelError) as caught:
            fz.plan(classify(table, str(folder), head="new"), runs=tmp_path)
        said = str(caught.value)
        assert f"is of model_type '{kind}', which neither fromzero nor transformers alone can build" in said
        assert "config.json asks for code of its own (auto_map" in said and "was not run" in said
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "auto_map"}))
    with pytest.raises(fz.ModelError, match=r"it brings code \(modeling_evil.py\), which was not run"):
        fz.load(str(folder))
    assert not marker.exists()


def test_packed_weights_options_and_a_missing_head_are_refused(table: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", "electra", "ElectraForPreTraining", table)
    with pytest.raises(fz.ModelError, match=r"a model of 'electra' takes no options here \(dropout\); change its config.json"):
        fz.plan(classify(table, {"from": str(folder), "dropout": 0.5}, head="new"), runs=tmp_path)
    with pytest.raises(fz.SourceError, match=r"do not fit the model: missing classifier.dense.bias, .*; extra discriminator_predictions"):
        fz.plan(classify(table, str(folder)), runs=tmp_path)
    rewrite(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(fz.ModelError, match=r"its weights are packed \(quantization_config\)"):
        fz.plan(classify(table, str(folder), head="new"), runs=tmp_path)


def test_a_tensor_too_many_or_of_another_shape_is_listed(table: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "body", "electra", "ElectraForPreTraining", table)
    tensors = load_file(folder / "model.safetensors")
    tensors["electra.encoder.layer.9.output.dense.bias"] = tensors["electra.encoder.layer.1.output.dense.bias"].clone()
    tensors["electra.encoder.layer.0.output.dense.bias"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(fz.SourceError) as caught:
        fz.plan(classify(table, str(folder), head="new"), runs=tmp_path)
    assert "extra electra.encoder.layer.9.output.dense.bias" in str(caught.value)
    assert "electra.encoder.layer.0.output.dense.bias is (5,), not (16,)" in str(caught.value)


def test_without_transformers_the_plan_says_how_to_install_it(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "body", "electra", "ElectraForPreTraining", table)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(fz.MissingExtra, match=r"pip install 'fromzero\[hub\]'"):
        fz.plan(classify(table, str(folder), head="new"), runs=tmp_path)


# ------------------------------------------------------------------------------------ torch.hub, timm

NET = """
import torch
from pathlib import Path
Path(__file__).with_name("ran").touch()

def net(width=4, weights=None):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "hubconf.py").write_text(NET)
    return tmp_path / "mine"


def test_a_repository_that_the_recipe_does_not_trust_is_neither_fetched_nor_run(
    hub: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(fz.RecipeError) as caught:
        fz.plan(classify(pictures, "hub:./mine/net"), runs=tmp_path, beside=tmp_path)
    said = str(caught.value)
    assert f"trust: 'hub:./mine/net' would run the hubconf.py of {hub.resolve()}" in said and said.endswith("trust: [hub]")
    assert not (hub / "ran").exists()
    called: list[object] = []
    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: called.append(a))
    with pytest.raises(fz.RecipeError, match=r"would run the hubconf.py of github.com/pytorch/vision:v0.6.0; code that a source brings"):
        fz.plan(classify(pictures, "hub:pytorch/vision:v0.6.0/resnet18"), runs=tmp_path)
    assert not called


def test_a_trusted_repository_is_trained_and_its_run_is_opened_inside_the_runs_only(hub: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = classify(pictures, {"from": "hub:./mine/net", "width": 6}, trust=["hub"], epochs=25, batch=4)
    outcome = fz.run(fz.plan(recipe, runs=tmp_path / "runs", beside=tmp_path), quiet=True)
    assert outcome.result["validation"]["accuracy"] == 1.0 and outcome.model.get_parameter("1.weight").shape == (6, 768)
    found = fz.predict("run:t", str(pictures / "light"), runs=tmp_path / "runs")
    assert {row.answer for row in found.rows} == {"light"}
    assert fz.evaluate("run:t", str(pictures), runs=tmp_path / "runs")["accuracy"] == 1.0
    (hub / "ran").unlink()
    with pytest.raises(
        fz.SourceError, match=r"its model.json runs Python code \(.*mine/net\); code of a folder outside your runs is not run"
    ):
        fz.predict(str(tmp_path / "runs" / "t"), str(pictures), runs=tmp_path / "elsewhere")
    assert not (hub / "ran").exists()


def test_a_published_entry_gets_its_own_weights_option(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> nn.Module:
        calls.append((args, kwargs))
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 1000))

    monkeypatch.setattr(torch.hub, "load", load)
    model = {"from": "hub:pytorch/vision:v0.6.0/resnet18", "weights": "DEFAULT", "progress": False}
    planned = fz.plan(classify(pictures, model, trust=["hub"], head="new"), runs=tmp_path, probe=False)
    ((args, kwargs),) = calls
    assert args == ("pytorch/vision:v0.6.0", "resnet18") and kwargs["trust_repo"] is True and kwargs["source"] == "github"
    assert kwargs["weights"] == "DEFAULT" and kwargs["progress"] is False
    assert planned.plan.facts.model.output_shape == (2,)


def test_timm_is_sized_from_the_data_and_takes_a_file_of_weights(
    pictures: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = types.ModuleType("timm")
    asked: list[dict[str, Any]] = []

    def create_model(name: str, *, pretrained: bool, num_classes: int, in_chans: int, **options: Any) -> nn.Module:
        asked.append({"name": name, "pretrained": pretrained, **options})
        return nn.Sequential(nn.Conv2d(in_chans, 4, 16), nn.Flatten(), nn.Linear(4, num_classes))

    stub.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", stub)
    recipe = classify(pictures, {"from": "timm:resnet10t", "drop_rate": 0.1}, epochs=25, batch=4)
    outcome = fz.run(fz.plan(recipe, runs=tmp_path, probe=False), quiet=True)
    assert all(call == {"name": "resnet10t", "pretrained": False, "drop_rate": 0.1} for call in asked) and len(asked) == 2
    assert outcome.result["validation"]["accuracy"] == 1.0
    assert {row.answer for row in fz.predict("run:t", str(pictures / "dark"), runs=tmp_path).rows} == {"dark"}
    weights = {n: torch.full_like(t, 0.25) for n, t in outcome.model.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = {"from": "timm:resnet10t", "weights": str(tmp_path / "w.safetensors")}
    planned = fz.plan(classify(pictures, model, steps=1, epochs=None, optimizer={"lr": 1e-9}), runs=tmp_path, probe=False)
    after = fz.run(planned, quiet=True).model.state_dict()
    assert all(torch.allclose(tensor, torch.tensor(0.25), atol=1e-6) for tensor in after.values())
    with pytest.raises(fz.ModelError, match=r"timm:resnet10t takes images, the data has inputs of shape"):
        fz.plan(classify(table, "timm:resnet10t"), runs=tmp_path)


def test_where_timm_is_not_installed_the_plan_says_how(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(fz.MissingExtra, match="pip install timm torchvision"):
        fz.plan(classify(pictures, "timm:resnet10t"), runs=tmp_path)


def test_training_a_body_of_transformers_leaves_the_opened_file_as_it_was(table: Path, tmp_path: Path) -> None:
    """A reader may give the same memory twice: what trial steps learned would be where the run begins."""
    opened = open_pretrained(str(published(tmp_path / "body", "electra", "ElectraForPreTraining", table)))
    first, second = (build_published(opened, {}, fresh_head=2)[0] for _ in range(2))
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    third = build_published(opened, {}, fresh_head=2)[0].state_dict()
    assert all(torch.equal(tensor, before[name]) and torch.equal(tensor, third[name]) for name, tensor in second.state_dict().items())
