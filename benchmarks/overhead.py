"""What do safety and exactness cost? Seconds of the same steps, in turns, in one process.

    python benchmarks/overhead.py [--rounds 5] [--json FILE]

cnn:      the digits network (5,000 images, batch 64): the bare loop; the loop whose dropout draws from torch's stream; a whole run that
          writes its log and saves a checkpoint every epoch, from its first step to its last evaluation
encoder:  MiniLM, all of it learning, dropout 0.1, on texts written here: the bare loop, and with torch's stream

Ratios are medians over rounds of those within a round; in brackets the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import circumstances, machine_line
from torch import nn

import fromzero as fz
from fromzero.report.events import Evaluated, StepDone
from fromzero.runner.assemble import assemble
from fromzero.runner.loop import Best, train
from fromzero.runner.progress import Progress

BARS = {"run / bare": 1.02, "bare / torch's dropout": 1.03}


def recipe(name: str, folder: Path) -> dict[str, Any]:
    if name == "cnn":
        model = str(Path(__file__).parents[1] / "recipes" / "models" / "seed_cnn.py") + ":SeedCNN"
        return {"task": "classify", "model": model, "data": {"train": "mnist-5k"}, "batch": 64, "epochs": 2, "save": "epoch", "report": ()}
    words = ["the", "sun", "warms", "hills", "of", "harbour", "and", "boats", "wait", "for", "a", "tide", "that", "comes", "late"]
    rows = [f"{' '.join(words[(i * k) % 15] for k in range(1, 6 + i % 25))},{'ab'[i % 2]}" for i in range(640)]
    (folder / "texts.csv").write_text("\n".join(["text,kind", *rows]))
    data = {"train": str(folder / "texts.csv"), "input": "text", "target": "kind"}
    model = {"from": "minilm-l6", "dropout": 0.1}
    return {"task": "classify", "model": model, "head": "new", "data": data, "batch": 32, "steps": 18, "report": ()}


def bare(planned: fz.Planned, *, torchs: bool) -> float:
    """Seconds of the loop, its first step left out.  torchs: dropout as torch draws it"""
    job = assemble(planned.plan, planned.loaded, planned.place)
    if torchs:
        for module in job.model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                vars(module).pop("forward", None)
    began = 0.0
    for event in train(job, Progress(), Best(), lambda: False):
        if isinstance(event, StepDone) and event.step == 1:
            began = time.perf_counter()
    return time.perf_counter() - began


def whole(planned: fz.Planned) -> float:
    """Seconds of a run with its log and its checkpoints, from the end of its first step to its last evaluation and the save behind it."""
    heard: dict[str, float] = {}

    def hear(event: object) -> None:
        if isinstance(event, StepDone):
            heard.setdefault("began", time.perf_counter())
        heard["saved" if type(event).__name__ == "Saved" else "evaluated" if isinstance(event, Evaluated) else ""] = time.perf_counter()

    fz.run(planned, quiet=True, observers=[hear])
    return max(heard["saved"], heard["evaluated"]) - heard["began"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    seen, found = circumstances(), {}
    print(machine_line(seen))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cnn", "encoder"):
            planned = fz.plan(recipe(name, Path(folder)), runs=Path(folder) / "runs", probe=False)
            torch.set_num_threads(planned.plan.threads)
            rounds = []
            for _ in range(asked.rounds):
                once = {"bare": bare(planned, torchs=False), "torch's dropout": bare(planned, torchs=True)}
                rounds.append(once | ({"run": whole(planned)} if name == "cnn" else {}))
            found[name] = rounds
            for pair, bar in BARS.items():
                one, other = pair.split(" / ")
                if one in rounds[0]:
                    ratios = sorted(times[one] / times[other] for times in rounds)
                    middle = statistics.median(ratios)
                    verdict = "met" if middle <= bar else "MISSED"
                    print(f"{name:<9}{pair:<26}{middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})  bar {bar}: {verdict}")
    if asked.json:
        asked.json.write_text(json.dumps({"circumstances": seen, "seconds": found}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
