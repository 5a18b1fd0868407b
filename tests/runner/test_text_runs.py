"""Text from data to use: classified, measured, gone on with; saved as a folder that others load; wrong tokenizers refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import fromzero as fz
from fromzero.data import tokens as tk

WORDS = {"weather": ["rain", "sun", "wind", "cloud", "storm", "snow"], "food": ["bread", "cheese", "soup", "apple", "rice", "tea"]}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    lines = ["text,topic"]
    for i in range(120):
        topic = list(WORDS)[i % 2]
        picks = torch.randint(6, (2 + i % 9,), generator=generator).tolist()
        lines.append(f"today there was {' and '.join(WORDS[topic][p] for p in picks)} number {i},{topic}")
    path = tmp_path / "topics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


TINY = {"width": 16, "layers": 2, "heads": 2}


def classify(table: Path, model: object, **more: object) -> dict[str, object]:
    data = {"train": str(table), "hold_out": 0.2, "tokenizer": "bpe", "vocabulary": 300}
    return {"name": "t", "task": "classify", "model": model, "data": data, "batch": 8, "epochs": 6, "optimizer": {"lr": 5e-3}, **more}


@pytest.mark.parametrize(
    "model",
    [{"from": "encoder", **TINY}, {"from": "lstm", "width": 16, "bidirectional": True}, {"from": "decoder", **TINY, "context": 64}],
    ids=["encoder", "lstm", "decoder"],
)
def test_text_is_classified_saved_opened_and_predicted(table: Path, tmp_path: Path, model: dict[str, object]) -> None:
    runs = tmp_path / "runs"
    outcome = fz.run(fz.plan(classify(table, model), runs=runs), quiet=True)
    assert outcome.result["validation"]["accuracy"] == 1.0 and outcome.result["tokens_per_second"] > 0
    found = fz.predict("run:t", ["rain and snow and wind", "bread and tea"], runs=runs)
    assert [row.answer for row in found.rows] == ["weather", "food"]
    assert fz.predict("run:t", str(table), runs=runs).rows[0].answer == "weather"
    assert fz.predict("run:t", "soup and cheese and rice", runs=runs).rows[0].answer == "food"
    assert fz.evaluate("run:t", str(table), runs=runs)["accuracy"] == 1.0
    again = fz.load("run:t", runs=runs).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in outcome.model.state_dict().items())


@pytest.mark.parametrize("model", [{"from": "decoder", **TINY, "context": 32}, {"from": "gru", "width": 16}], ids=["decoder", "gru"])
def test_a_corpus_is_gone_on_with_and_measured_per_token(corpus: Path, tmp_path: Path, model: dict[str, object]) -> None:
    recipe = {"name": "c", "task": "language", "model": model, "batch": 8, "steps": 60, "optimizer": {"lr": 1e-2}}
    recipe["data"] = {"train": str(corpus), "tokenizer": "characters", "max_tokens": 32}
    outcome = fz.run(fz.plan(recipe, runs=tmp_path / "runs"), quiet=True)
    measured = outcome.result["validation"]
    assert measured["loss"] < 1.5 and measured["perplexity"] == pytest.approx(torch.tensor(measured["loss"]).exp().item(), rel=1e-4)
    again = fz.evaluate("run:c", str(corpus), runs=tmp_path / "runs")
    assert again["loss"] < 1.5 and again["token_accuracy"] > 0.5


def test_a_language_model_from_zero_is_a_folder_that_transformers_loads(corpus: Path, tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "qwen3"):
        model = {"from": "decoder", **TINY, "context": 32, "family": family}
        data = {"train": str(corpus), "tokenizer": "characters", "max_tokens": 32}
        recipe = {"name": family, "task": "language", "model": model, "batch": 8, "steps": 5, "data": data}
        outcome = fz.run(fz.plan(recipe, runs=tmp_path, probe=False), quiet=True)
        folder = tmp_path / family / "model"
        theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not notes["missing_keys"] and not notes["unexpected_keys"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("the lazy dog", return_tensors="pt").input_ids
        assert ids[0].tolist() == tk.encode((folder / "tokenizer.json").read_text(), ["the lazy dog"], special=False)[0]
        with torch.no_grad():
            ours = outcome.model.eval()(ids[0], torch.tensor([0, ids.shape[1]]))
            torch.testing.assert_close(ours, theirs.eval()(ids).logits[0], rtol=1e-4, atol=1e-5)
        opened = fz.load(str(folder), per_token=True).state_dict()
        assert all(torch.equal(opened[name], tensor) for name, tensor in outcome.model.state_dict().items())


def test_a_classifier_on_a_published_body_keeps_the_body_and_learns_a_head(table: Path, tmp_path: Path) -> None:
    body = published(tmp_path / "body", table)
    recipe = classify(table, str(body), head="new", freeze="body")
    recipe["data"] = {"train": str(table), "hold_out": 0.2}
    planned = fz.plan(recipe, runs=tmp_path / "runs")
    assert planned.plan.trainable_parameters == 2 * 16 + 2 and planned.plan.attention == "documents"
    outcome = fz.run(planned, quiet=True)
    before = fz.load(str(body)).state_dict()
    after = outcome.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and "head.weight" not in before
    read, notes = transformers.AutoModel.from_pretrained(tmp_path / "runs" / "t" / "model", output_loading_info=True)
    assert type(read).__name__ == "BertModel" and set(notes["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    assert {name.split(".")[0] for name in notes["missing_keys"]} <= {"pooler"}
    assert read.config.id2label == {0: "food", 1: "weather"}
    opened = fz.load(str(tmp_path / "runs" / "t" / "model"), runs=tmp_path / "elsewhere")
    assert torch.equal(opened.head.weight, outcome.model.head.weight)
    with pytest.raises(fz.ModelError, match="has no head, only a body that gives embeddings; set head: new"):
        fz.plan({**recipe, "head": "keep", "freeze": "none"}, runs=tmp_path / "runs")


def published(folder: Path, table: Path) -> Path:
    """A small body as others publish it, with a tokenizer learned from the table"""
    tokenizer = tk.byte_pairs(table.read_text().splitlines(), 300)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=tk.vocabulary_size(tokenizer), hidden_dropout_prob=0.0, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused_with_the_price_of_growing(table: Path, tmp_path: Path) -> None:
    body = published(tmp_path / "body", table)
    grown = tk.byte_pairs(table.read_text().splitlines(), 300)
    values = json.loads(grown)
    size = tk.vocabulary_size(grown)
    more = [{"id": size + i, "content": f"<new{i}>", "special": True} for i in range(5)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"] += [{**token, **plain} for token in more]
    (tmp_path / "grown.json").write_text(json.dumps(values))
    recipe = classify(table, str(body), head="new")
    recipe["data"] = {"train": str(table), "tokenizer": str(tmp_path / "grown.json")}
    with pytest.raises(fz.ModelError) as caught:
        fz.plan(recipe, runs=tmp_path / "runs")
    assert f"has {size + 5} tokens, the embedding of {body} only {size}" in str(caught.value)
    assert "5 more rows would be 80 untrained values" in str(caught.value)


def test_a_published_body_without_its_tokenizer_and_weights_none_are_refused(table: Path, tmp_path: Path) -> None:
    body = published(tmp_path / "body", table)
    recipe = classify(table, str(body), head="new")
    recipe["data"] = {"train": str(table)}
    with pytest.raises(fz.RecipeError, match="names weights, and weights: none wants none"):
        fz.plan({**recipe, "model": {"from": str(body), "weights": "none"}}, runs=tmp_path / "runs")
    (body / "tokenizer.json").unlink()
    with pytest.raises(fz.ModelError, match=r"brings no tokenizer\.json"):
        fz.plan(recipe, runs=tmp_path / "runs")


def test_texts_longer_than_the_model_reads_are_refused_and_cut_only_when_asked(table: Path, tmp_path: Path) -> None:
    body = published(tmp_path / "body", table)
    table.write_text(table.read_text() + f'"{"rain and snow " * 600}",weather\n')
    recipe = classify(table, str(body), head="new", freeze="body")
    recipe["data"] = {"train": str(table), "hold_out": 0.2}
    with pytest.raises(fz.DataError, match=r"1 of 121 texts have more tokens than the model has positions: up to \d+, not 512"):
        fz.plan(recipe, runs=tmp_path / "runs")
    recipe["data"]["max_tokens"] = 512
    planned = fz.plan(recipe, runs=tmp_path / "runs", probe=False)
    longest = planned.plan.facts.data.text.longest
    assert longest == 512 or planned.plan.facts.data.text.cut == 0  # the long one may be held out


def test_an_encoder_is_not_asked_for_the_next_token_and_numbers_are_not_read_as_text(corpus: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(fz.ModelError, match="sees the tokens after each one too"):
        fz.plan({"task": "language", "model": {"from": "encoder", **TINY}, "data": str(corpus)})
    with pytest.raises(fz.ModelError, match="mlp takes numbers, the data is text"):
        fz.plan(classify(table, "mlp"))
    (tmp_path / "n.csv").write_text("a,b,y\n" + "\n".join(f"{i * i % 7},{i * 3 % 5},{i % 2}" for i in range(40)))
    with pytest.raises(fz.DataError, match="does not say which column is the text"):
        fz.plan({"task": "classify", "model": {"from": "encoder", **TINY}, "data": str(tmp_path / "n.csv")})


def test_cutting_a_batch_of_texts_keeps_the_losses(table: Path, tmp_path: Path) -> None:
    model = {"from": "decoder", **TINY, "context": 64}
    losses = []
    for micro in (8, 3, 1):
        heard: list[float] = []
        recipe = classify(table, model, precision="float64", limits={"micro_batch": micro}, name=f"m{micro}", epochs=2)
        planned = fz.plan(recipe, runs=tmp_path / "runs", probe=False)
        assert planned.plan.grade == "reordered"  # the fused path of attention adds in another order than the plain one
        fz.run(planned, quiet=True, observers=[lambda e, into=heard: into.append(e.loss) if type(e).__name__ == "StepDone" else None])
        losses.append(heard)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-9) and len(other) >= 20


def test_a_stopped_text_run_goes_on_to_the_same_weights(table: Path, tmp_path: Path) -> None:
    recipe = classify(table, {"from": "encoder", **TINY, "dropout": 0.1}, epochs=3)
    whole = fz.run(fz.plan({**recipe, "name": "whole"}, runs=tmp_path, probe=False), quiet=True)
    planned = fz.plan({**recipe, "name": "part", "limits": {"seconds": 0.0001}}, runs=tmp_path, probe=False)
    with pytest.raises(fz.NumbersError):
        fz.run(planned, quiet=True)
    text = (tmp_path / "part" / "recipe.yaml").read_text()
    (tmp_path / "part" / "recipe.yaml").write_text(text.replace("0.0001", "none"))
    part = fz.resume("part", runs=tmp_path, quiet=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, part.model.state_dict()[name]), name


def test_freezing_through_a_stage_freezes_everything_before_it(corpus: Path, tmp_path: Path) -> None:
    recipe = {"task": "language", "model": {"from": "decoder", **TINY, "layers": 3, "context": 32, "tied": False}, "steps": 3, "batch": 4}
    recipe |= {"data": {"train": str(corpus), "tokenizer": "characters", "max_tokens": 32}, "freeze": {"through": "blocks.1"}}
    planned = fz.plan(recipe, runs=tmp_path, probe=False)
    assert planned.plan.facts.model.stages == ("embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head")
    outcome = fz.run(planned, quiet=True)
    trained = {name.rsplit(".", 1)[0] for name, p in outcome.model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("blocks.2", "norm", "head")) for name in trained)


def test_first_recipes_are_written_for_text_and_the_one_for_a_corpus_trains_as_it_stands(
    table: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = fz.new(str(table))
    for line in ("model: minilm-l6", "head: new", "freeze: body", "  - text", "  target: topic"):
        assert line in text, text
    chinese = tmp_path / "zh.csv"
    chinese.write_text("text,topic\n" + "".join(f"今天 的 天气 很 好 {i},{'ab'[i % 2]}\n" for i in range(40)), encoding="utf-8")
    assert "model: encoder-4m" in fz.new(str(chinese))
    (tmp_path / "r.yaml").write_text(fz.new(str(corpus)))
    recipe = fz.read("r.yaml", "steps=3", "model.width=16", "model.heads=2", "evaluate=3")
    assert recipe.task == "language" and recipe.data.tokenizer == "characters"
    assert fz.run(fz.plan(recipe, runs=tmp_path / "runs", probe=False), quiet=True).result["validation"]["loss"] > 0


def test_examples_of_text_are_shown_in_their_tokens(table: Path, corpus: Path) -> None:
    from fromzero.use.examples import show_examples

    loaded = fz.plan(classify(table, {"from": "encoder", **TINY}), probe=False).loaded
    shown, values = show_examples(loaded, 2)
    assert "|" in shown and "tokens)" in shown and "".join(values[0]["pieces"]).startswith("today there was")
    recipe = {"task": "language", "model": {"from": "decoder", **TINY}, "data": {"train": str(corpus), "tokenizer": "characters"}}
    assert "the next token, at each token" in show_examples(fz.plan(recipe, probe=False).loaded, 1)[0]
