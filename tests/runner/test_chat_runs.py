"""Conversations trained end to end: the losses of transformers and peft step for step, saved small, resumed exactly, used afterwards."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fromzero as fz
from fromzero.data import IGNORED, epoch_order
from fromzero.report.events import StepDone
from fromzero.runner.assemble import assemble
from fromzero.tuning import LowRank

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft and transformers between themselves
LORA = {"name": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"}


def recipe(speaker: Path, chats: Path, **more: object) -> dict[str, object]:
    keys: dict[str, object] = {
        "name": "talk",
        "task": "chat",
        "model": str(speaker),
        "adapter": LORA,
        "data": {"train": str(chats), "hold_out": 0.2},
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0},
        "batch": 8,
        "steps": 20,
        "evaluate": {"keep": "last", "samples": 1},
        "report": ["console"],
    }
    return {**keys, **more}


def run(keys: dict[str, object], runs: Path) -> tuple[object, list[float]]:
    losses: list[float] = []

    def hear(event: object) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    return fz.run(fz.plan(keys, runs=runs, probe=False), observers=[hear], quiet=True), losses


def theirs_losses(model: torch.nn.Module, planned: fz.Planned, steps: int, lr: float) -> list[float]:
    """A padded loop over the same batches, labels -100 where nothing is asked."""
    train, seed = planned.loaded.train, planned.plan.recipe.seed
    order = torch.cat([epoch_order(seed, epoch, len(train)) for epoch in range(10)])
    ends = [*range(8, len(train), 8), len(train)]
    batches = [
        (a, b)
        for epoch in range(10)
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
        for a, b in [(a + epoch * len(train), b + epoch * len(train))]
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for begin, end in batches[:steps]:
        rows = []
        for example in order[begin:end].tolist():
            (tokens, _), targets = train.take(torch.tensor([example]))
            rows.append((tokens, targets))
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.stack([F.pad(tokens, (0, longest - len(tokens))) for tokens, _ in rows])
        mask = torch.stack([F.pad(torch.ones_like(tokens), (0, longest - len(tokens))) for tokens, _ in rows])
        labels = torch.stack([F.pad(targets, (0, longest - len(targets)), value=IGNORED) for _, targets in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_of_adapters_have_the_losses_of_peft(speaker: Path, chats: Path, tmp_path: Path) -> None:
    keys = recipe(speaker, chats)
    planned = fz.plan(keys, runs=tmp_path, probe=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(speaker, dtype=torch.float32), config)
    first = assemble(planned.plan, planned.loaded, planned.place)
    published = first.design.published_layers(first.design.adapted.layers)
    inside = dict(theirs.named_modules())
    count = 0
    for name, module in first.model.named_modules():
        if isinstance(module, LowRank):
            for part, a in zip(published[name], module.a.split(module.rank), strict=True):
                inside[f"base_model.model.{part}"].lora_A["default"].weight.data.copy_(a)
                count += 1
    assert count == 14 == sum(name.endswith("lora_A.default") for name in inside)
    outcome, ours = run(keys, tmp_path)
    losses = theirs_losses(theirs, planned, 20, 1e-2)
    assert len(ours) == 20 and max(abs(a - b) / b for a, b in zip(ours, losses, strict=True)) < 1e-4
    assert ours[-1] < ours[0]
    assert outcome.result["trainable_parameters"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_twenty_steps_of_the_whole_model_have_the_losses_of_transformers(speaker: Path, chats: Path, tmp_path: Path) -> None:
    keys = recipe(speaker, chats, adapter="none")
    _, ours = run(keys, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(speaker, dtype=torch.float32)
    losses = theirs_losses(theirs, fz.plan(keys, runs=tmp_path, probe=False), 20, 1e-2)
    assert max(abs(a - b) / b for a, b in zip(ours, losses, strict=True)) < 1e-4


@pytest.mark.parametrize("precision, most", [("float32", 1e-5), ("float64", 1e-10)])
def test_losses_do_not_depend_on_how_a_batch_lies_in_memory(
    speaker: Path, chats: Path, tmp_path: Path, precision: str, most: float
) -> None:
    losses = {}
    for micro in ("auto", 1, 3):
        keys = recipe(speaker, chats, precision=precision, limits={"micro_batch": micro}, name=f"m{micro}", steps=12)
        losses[micro] = torch.tensor(run(keys, tmp_path)[1], dtype=torch.float64)
    for micro in (1, 3):
        assert ((losses[micro] - losses["auto"]).abs() / losses["auto"]).max() < most


def test_what_learned_is_saved_small_and_others_open_it(speaker: Path, chats: Path, tmp_path: Path) -> None:
    outcome, _ = run(recipe(speaker, chats), tmp_path)
    folder = tmp_path / "talk" / "model"
    files = {path.name for path in folder.iterdir()}
    ours = {"model.json", "probe.safetensors"}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", *ours} == files
    assert (folder / "adapter_model.safetensors").stat().st_size < (speaker / "model.safetensors").stat().st_size
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)("red green blue stone", add_special_tokens=False)["input_ids"])
    offsets = torch.tensor([0, len(ids)])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(speaker, dtype=torch.float32), folder)
    theirs_scores = theirs(ids[None]).logits[0]
    plain = AutoModelForCausalLM.from_pretrained(speaker, dtype=torch.float32)(ids[None]).logits[0]
    assert (plain - theirs_scores).abs().max() > 1e-2
    for model in (outcome.model, fz.load("run:talk", runs=tmp_path), fz.load("run:talk", runs=tmp_path, merge=True)):
        assert (model(ids, offsets) - theirs_scores).abs().max() < 1e-5 * theirs_scores.abs().max()
    assert not any(isinstance(m, LowRank) for m in fz.load("run:talk", runs=tmp_path, merge=True).modules())
    samples = json.loads((tmp_path / "talk" / "samples.json").read_text())
    assert [sample["step"] for sample in samples] == [0, 20] and samples[0]["prompt"] == samples[1]["prompt"]


def test_a_base_that_has_changed_since_is_refused(speaker: Path, chats: Path, tmp_path: Path) -> None:
    run(recipe(speaker, chats, steps=1), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(speaker)
    theirs.model.norm.weight.data[0] += 1
    theirs.save_pretrained(speaker)
    with pytest.raises(fz.SourceError, match="is no longer what it was when the run trained"):
        fz.load("run:talk", runs=tmp_path)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(speaker: Path, chats: Path, tmp_path: Path) -> None:
    whole, _ = run(recipe(speaker, chats), tmp_path / "a")
    keys = recipe(speaker, chats, save={"every": 1, "keep": 30})
    planned = fz.plan(keys, runs=tmp_path / "b", probe=False)

    class Enough(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise Enough

    with pytest.raises(Enough):
        fz.run(planned, observers=[stop], quiet=True)
    outcome = fz.resume("talk", runs=tmp_path / "b", quiet=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(outcome.model.state_dict()[name], tensor), name
    held = {path.name for path in (tmp_path / "b" / "talk" / "checkpoints" / "step-20").glob("weights*")}
    size = (tmp_path / "b" / "talk" / "checkpoints" / "step-20" / "weights.safetensors").stat().st_size
    assert held and size < (speaker / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "dora", "rank": 2, "targets": "attention"},
        {"rank": 2, "targets": ["*.down"], "layers": "last-1", "rank_stabilised": True},
        {"rank": 2, "targets": "mlp", "base": "8bit", "dropout": 0.1},
        {"rank": 2, "targets": "all-linear", "base": "4bit", "train": ["embedding.tokens.weight"]},
    ],
    ids=["dora", "last", "8bit", "4bit"],
)
def test_kinds_of_adapters_learn_and_come_back_as_they_were(speaker: Path, chats: Path, tmp_path: Path, adapter: dict[str, object]) -> None:
    outcome, losses = run(recipe(speaker, chats, adapter=adapter), tmp_path)
    assert losses[-1] < losses[0]
    again = fz.load("run:talk", runs=tmp_path).state_dict()
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_a_target_that_matches_nothing_is_refused(speaker: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(fz.RecipeError, match=r"adapter\.targets: 'qvk' matches no Linear of the model; did you mean '.*qkv'"):
        fz.plan(recipe(speaker, chats, adapter={"targets": ["qvk"]}), runs=tmp_path, probe=False)


def test_trial_steps_compare_the_fast_paths_and_the_plan_says_what_learns(speaker: Path, chats: Path, tmp_path: Path) -> None:
    planned = fz.plan(recipe(speaker, chats), runs=tmp_path)
    certificate = planned.plan.facts.measured.certificate
    assert {"attention", "adapters"} <= set(planned.plan.fast_ways) and not certificate.refused
    assert planned.plan.lowrank == "merged" and certificate.error < 1e-5 < certificate.bound
    shown = str(planned)
    assert "adapters: merged" in shown and "blocks.0.attention.qkv" in shown
    assert not any(finding.code == "no-gradient" for finding in planned.plan.findings)


def test_batches_and_lengths_count_tokens(speaker: Path, chats: Path, tmp_path: Path) -> None:
    keys = recipe(speaker, chats, batch={"tokens": 200}, steps="none", tokens=3000)
    planned = fz.plan(keys, runs=tmp_path, probe=False)
    text = planned.plan.facts.data.text
    assert planned.plan.steps_per_epoch == -(-text.tokens // 200)
    assert planned.plan.steps == round(3000 / text.tokens * planned.plan.steps_per_epoch)
    outcome, losses = run(keys, tmp_path)
    assert outcome.result["steps"] == len(losses) == planned.plan.steps
    with pytest.raises(fz.FromzeroError, match="is smaller than the longest example"):
        fz.plan(recipe(speaker, chats, batch={"tokens": 20}), runs=tmp_path, probe=False)
    with pytest.raises(fz.RecipeError, match=r"batch\.tokens: counts tokens, but the data is no text"):
        fz.plan({"task": "classify", "model": "mlp", "data": (torch.randn(9, 2), torch.arange(9) % 2), "batch": {"tokens": 9}}, probe=False)


def test_tensors_that_do_not_move_are_named(speaker: Path, chats: Path, tmp_path: Path) -> None:
    keys = recipe(speaker, chats, optimizer={"name": "sgd", "lr": 1e-2, "lr_scale": {"blocks.1.mlp.down.a": 0}}, steps=4)
    planned = fz.plan(keys, runs=tmp_path, probe=False)
    heard: list[object] = []
    fz.run(planned, observers=[heard.append], quiet=True)
    said = [event.what for event in heard if type(event).__name__ == "Warned"]
    assert any("1 of 16 tensors that should learn have not moved after 3 steps: blocks.1.mlp.down.a" in what for what in said), said


def test_a_run_is_measured_on_other_conversations_and_names_no_answers(speaker: Path, chats: Path, tmp_path: Path) -> None:
    outcome, _ = run(recipe(speaker, chats), tmp_path)
    own = fz.evaluate("run:talk", runs=tmp_path)
    assert own["examples"] == 12 and own["loss"] == pytest.approx(outcome.result["validation"]["loss"], rel=1e-6)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chats.read_text().splitlines(keepends=True)[:5]))
    found = fz.evaluate("run:talk", str(other), runs=tmp_path)
    assert found["examples"] == 5 and found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item(), rel=1e-5)
    with pytest.raises(fz.DataError, match="goes on with text, it names no answer"):
        fz.predict("run:talk", str(other), runs=tmp_path)
