"""Targets fully masked or cut away, texts longer than the context: counted when planning, dropped or refused, and never a loss of 0."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn

import fromzero as fz
from fromzero.data import IGNORED
from fromzero.data import tokens as tk
from fromzero.report.events import Evaluated, StepDone, Warned

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TINY = {"width": 16, "layers": 1, "heads": 2}


def chat(tmp_path: Path, prompts: list[str], model: Any = None, **data: Any) -> dict[str, Any]:
    """One conversation for each prompt."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "tokenizer.json").write_text(tk.add_tokens(tk.byte_pairs(["the seven hills user assistant\n"] * 3, 320), ["<s>", "<e>"]))
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"answer {i}"}]} for i, p in enumerate(prompts)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "train": str(tmp_path / "chats.jsonl"),
        "template": str(tmp_path / "chat.jinja"),
        "tokenizer": str(tmp_path / "tokenizer.json"),
    }
    keys = {"task": "chat", "data": {**given, "hold_out": 0.2, **data}, "batch": 4, "epochs": 1, "report": (), "limits": {"threads": 1}}
    return {**keys, "model": model or {"from": "decoder", **TINY}}


LONG = " ".join(["the seven hills"] * 20)
PROMPTS = [f"hills {i}" for i in range(16)] + [f"{LONG} {i}" for i in range(4)]


def test_prompts_that_leave_no_answer_are_counted_and_refused_where_they_are_cut(tmp_path: Path) -> None:
    planned = fz.plan(chat(tmp_path, PROMPTS, max_tokens=24, too_long="cut"), runs=tmp_path / "runs", probe=False)
    with pytest.raises(fz.PlanRefused, match=r"no token is trained in 4 of 20 conversations: .*chats\.jsonl:17") as error:
        fz.run(planned, quiet=True)
    assert "their answers lie beyond data.max_tokens; data.too_long: drop or split, or raise data.max_tokens" in str(error.value)


def test_by_recipe_they_are_dropped_or_split_and_what_is_left_has_a_loss(tmp_path: Path) -> None:
    for way in ("drop", "split"):
        keys = chat(tmp_path, PROMPTS, max_tokens=24, too_long=way)
        heard: list[Any] = []
        fz.run(fz.plan(keys, runs=tmp_path / "runs", probe=False), observers=[heard.append], quiet=True)
        losses = [event.loss for event in heard if isinstance(event, (StepDone, Evaluated))]
        assert len(losses) >= 3 and all(0 < loss < 20 for loss in losses)
    with pytest.raises(fz.PlanRefused, match="nothing is lost unasked"):
        fz.run(fz.plan(chat(tmp_path, PROMPTS, max_tokens=24), runs=tmp_path / "runs", probe=False), quiet=True)


def test_a_batch_in_which_nothing_is_asked_stops_and_has_no_loss_of_zero(tmp_path: Path) -> None:
    x, y = torch.rand(40, 4), torch.arange(40) % 2

    def masked(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        kept = targets.where(targets == 5, IGNORED)
        return torch.nn.functional.cross_entropy(outputs, kept, ignore_index=IGNORED, reduction="sum"), (kept != IGNORED).sum()

    torch.manual_seed(0)
    keys = {"task": "classify", "model": nn.Linear(4, 2), "data": {"train": (x, y)}, "loss": masked, "batch": 8, "report": ()}
    keys |= {"limits": {"threads": 1}, "epochs": 1}
    heard: list[Any] = []
    with pytest.raises(fz.NumbersError, match=r"step 1: no sample of the batch counts; training examples \["):
        fz.run(fz.plan(keys, runs=tmp_path, probe=False), observers=[heard.append], quiet=True)
    assert not [event for event in heard if isinstance(event, StepDone)]
    heard.clear()
    outcome = fz.run(fz.plan(keys | {"not_finite": {"skip": 9}}, runs=tmp_path, probe=False), observers=[heard.append], quiet=True)
    assert sum(isinstance(event, Warned) for event in heard) == 5 == outcome.result["skipped_steps"]
    assert all(math.isnan(event.loss) and math.isnan(event.train_loss) for event in heard if isinstance(event, Evaluated))
    with pytest.raises(fz.PlanRefused, match=r"the first loss is nan.*no example of the batch counts"):
        fz.run(fz.plan(keys, runs=tmp_path), quiet=True)


def table(tmp_path: Path, longest: int) -> str:
    rows = [f"{'hills ' * (longest if i == 3 else 4)}{i},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "texts.csv").write_text("text,kind\n" + "\n".join(rows))
    return str(tmp_path / "texts.csv")


@pytest.mark.parametrize(
    "model", [{"from": "encoder", **TINY, "context": 300}, {"from": "decoder", **TINY, "context": 300, "family": "gpt2"}]
)
def test_texts_longer_than_learned_positions_are_counted_when_planning(model: dict[str, Any], tmp_path: Path) -> None:
    """Longer than what is run through the model when it is inspected: without the count the run would die in its middle."""
    keys = {"task": "classify", "model": model, "batch": 8, "epochs": 1, "report": (), "limits": {"threads": 1}}
    data = {"train": table(tmp_path, 400), "hold_out": 0, "tokenizer": "characters"}
    with pytest.raises(fz.DataError, match=r"1 of 40 texts have more tokens than the model has positions: up to 240\d, not 300") as error:
        fz.plan({**keys, "data": data}, runs=tmp_path, probe=False)
    assert "data.max_tokens=300 leaves their ends out" in str(error.value)
    planned = fz.plan({**keys, "data": {**data, "max_tokens": 300}}, runs=tmp_path, probe=False)
    assert "1 of 40 training texts are longer than data.max_tokens" in " ".join(map(str, planned.plan.findings))
    assert fz.run(planned, quiet=True).result["status"] == "done"


def test_conversations_longer_than_learned_positions_are_counted_when_planning(tmp_path: Path) -> None:
    model = {"from": "decoder", **TINY, "context": 32, "family": "gpt2"}
    with pytest.raises(fz.DataError, match=r"4 of 20 texts have more tokens than the model has positions"):
        fz.plan(chat(tmp_path, PROMPTS, model), runs=tmp_path / "runs", probe=False)
    planned = fz.plan(chat(tmp_path, PROMPTS, model, max_tokens=32, too_long="drop"), runs=tmp_path / "runs", probe=False)
    assert fz.run(planned, quiet=True).result["status"] == "done"


def test_a_text_of_which_the_tokenizer_leaves_nothing_is_named_by_its_row(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tk.byte_pairs(["hills and rain 0123456789"] * 3, 300))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    rows = "\n".join(("\u200b" if i in (5, 9) else f"hills {i}") + f",{'ab'[i % 2]}" for i in range(40))
    (tmp_path / "x.csv").write_text("text,kind\n" + rows)
    data = {"train": str(tmp_path / "x.csv"), "input": "text", "tokenizer": str(tmp_path / "t.json"), "hold_out": 0}
    with pytest.raises(fz.DataError, match=r"2 texts become no token at all, the first in .*x\.csv:7; the tokenizer takes away"):
        fz.plan({"task": "classify", "model": {"from": "encoder", **TINY}, "data": data}, runs=tmp_path, probe=False)
