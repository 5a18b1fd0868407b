"""What does the frozen part cost that is computed once? A new head on MiniLM, and a ResNet-18 frozen through its third layer.

    python benchmarks/prefix.py TEXTS.csv [--count 1000] [--rounds 3] [--threads N] [--json FILE]

TEXTS.csv has columns text and category (banking77_train.csv). Sides take turns in one process, so that a slow minute slows all of
a round; ratios are taken within a round. What is kept goes into a cache of its own that is thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fromzero as fz
from fromzero.data import TextExamples
from fromzero.report.events import Evaluated
from fromzero.runner import prefix

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
EPOCHS = 10
PADDED_BATCHES = 16  # of the padded loop that are run; the rest is scaled up


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def trained(planned: fz.Planned) -> tuple[float, list[float], float]:
    """Seconds by the run's own clock, from the frozen part to the last step; when each epoch was measured; seconds of the whole call"""
    done: list[float] = []
    begun = time.perf_counter()
    outcome = fz.run(
        planned, quiet=True, observers=[lambda event: done.append(time.perf_counter()) if isinstance(event, Evaluated) else None]
    )
    return float(outcome.result["seconds"]), done, time.perf_counter() - begun


@torch.no_grad()
def unpadded_pass(model: torch.nn.Module, examples: TextExamples, batch: int) -> None:
    """Every text once, the shortest first"""
    for index in examples.lengths.argsort(stable=True).split(batch):
        model(*examples.take(index)[0])


def padded_steps(body: Any, examples: TextExamples, classes: int, batches: int, batch: int) -> float:
    """Seconds of so many steps of a plain loop: texts padded to the longest of their batch, no gradient in the body, mean of states, a head."""
    head = torch.nn.Linear(body.config.hidden_size, classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).split(batch)[:batches]

    def steps() -> None:
        for index in order:
            (tokens, offsets), targets = examples.take(index)
            rows = [tokens[a:b] for a, b in pairwise(offsets)]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            with torch.no_grad():
                states = body(input_ids=ids, attention_mask=mask).last_hidden_state
                pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            loss = F.cross_entropy(head(pooled), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return seconds_of(steps)


def minilm(texts: Path, count: int, rounds: int, runs: Path) -> dict[str, list[float]]:
    import transformers

    def plan(lr: float) -> fz.Planned:
        keys = [
            f"data.train={texts}",
            "data.validation=none",
            f"data.limit={count}",
            f"epochs={EPOCHS}",
            f"optimizer.lr={lr}",
            f"limits.threads={torch.get_num_threads()}",
        ]
        return fz.plan(fz.read(RECIPES / "banking77.yaml", *keys, "report=[]", "data.hold_out=0"), runs=runs, beside=RECIPES)

    first, second = plan(0.01), plan(0.003)
    assert first.plan.prefix and isinstance(first.loaded.train, TextExamples)
    examples, classes, batch = first.loaded.train, len(first.plan.facts.data.classes or ()), first.plan.batch
    ours = fz.load("minilm-l6")
    body = transformers.AutoModel.from_pretrained(fz.fetch("minilm-l6")).eval()
    batches = min(PADDED_BATCHES, first.plan.steps_per_epoch)
    rows: dict[str, list[float]] = {name: [] for name in ("kept", "kept whole call", "once", "padded", "second", "second whole call")}
    for _ in range(rounds + 1):
        shutil.rmtree(runs / "kept", ignore_errors=True)
        kept, _, whole = trained(first)
        again, _, whole_again = trained(second)
        once = seconds_of(lambda: unpadded_pass(ours, examples, batch))
        padded = padded_steps(body, examples, classes, batches, batch) * first.plan.steps / batches
        for name, value in zip(rows, (kept, whole, once, padded, again, whole_again), strict=True):
            rows[name].append(value)
    return {name: values[1:] for name, values in rows.items()}  # the first round warms up


def resnet(rounds: int, runs: Path, size: int, batch: int) -> dict[str, list[float]]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (10 * batch // 3, 3, size, size), generator=draw, dtype=torch.uint8), torch.arange(10 * batch // 3) % 10
    keys = {
        "name": "resnet",
        "task": "classify",
        "model": "resnet18",
        "freeze": {"through": "layer3"},
        "batch": batch,
        "epochs": 3,
        "limits": {"threads": torch.get_num_threads()},
    }
    planned = fz.plan({**keys, "data": (x, y), "report": []}, runs=runs)
    assert planned.plan.prefix == "layer4.0", planned
    live = replace(planned, plan=replace(planned.plan, prefix="", kept_in=""))
    rows: dict[str, list[float]] = {"kept": [], "live": []}
    for _ in range(rounds):
        for name, one in (("kept", planned), ("live", live)):
            _, done, _ = trained(one)
            rows[name].append((done[-1] - done[0]) / (len(done) - 1))  # seconds of an epoch from the second on
    return rows


def ratio(above: list[float], below: list[float]) -> str:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["minilm", "resnet"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        prefix.cache_folder = lambda: Path(folder)  # what is kept; weights come from the real cache
        if asked.only != "resnet":
            rows = found["minilm"] = minilm(asked.texts.resolve(), asked.count, asked.rounds, Path(folder))
            print(
                f"MiniLM, new head, {asked.count} texts, {EPOCHS} epochs: "
                + ", ".join(f"{n} {statistics.median(v):.2f} s" for n, v in rows.items())
            )
            print(f"  kept / one unpadded pass: {ratio(rows['kept'], rows['once'])}  bar 1.2")
            print(f"  padded loop (scaled from {PADDED_BATCHES} batches) / kept: {ratio(rows['padded'], rows['kept'])}  bar 20")
            print(f"  second learning rate / first: {ratio(rows['second'], rows['kept'])}  bar 0.2")
        if asked.only != "minilm":
            rows = found["resnet"] = resnet(asked.rounds, Path(folder), asked.size, asked.batch)
            print(
                f"ResNet-18 through layer3, {asked.size} px, batch {asked.batch}: "
                + ", ".join(f"{n} {statistics.median(v):.3f} s an epoch" for n, v in rows.items())
            )
            print(f"  live / kept from the second epoch on: {ratio(rows['live'], rows['kept'])}  bar 2.5")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
