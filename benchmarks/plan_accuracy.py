"""How far are a plan's predictions from what the run then took? One `fromzero train` a recipe, each in a process of its own.

    python benchmarks/plan_accuracy.py [--texts FOLDER] [--only NAME …] [--rounds N] [--json FILE]

Of each kind of model and task one recipe, the shipped ones shortened in steps, others that no shipped recipe is like; the
ledger starts empty, so that nothing was learned from earlier runs. texts: where banking77_train.csv, penguins.csv,
tinyshakespeare.txt and self_instruct_seed_tasks.jsonl are. Seconds and peak memory as `train --json` prints them.

With several rounds the recipes take turns. Then it is also printed how far one and the same run is from the median of its own
repetitions: nothing that is foretold before a run begins can be nearer than that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fromzero.sources.cache import cache_folder

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHIPPED = {
    "digits": ("digits", ["epochs=4"]),
    "seed": ("seed", ["epochs=3"]),
    "banking77": ("banking77", ["epochs=4"]),
    "banking77-full": ("banking77-full", ["epochs=none", "steps=100"]),
    "shakespeare-decoder": ("shakespeare-decoder", ["steps=60", "evaluate.every=30"]),
    "shakespeare-lstm": ("shakespeare-lstm", ["steps=100", "evaluate.every=50"]),
    "smollm2-lora": ("smollm2-lora", ["epochs=1"]),
    "smollm2-full": ("smollm2-full", ["epochs=none", "steps=25"]),
}
DIGITS = {"task": "classify", "data": "mnist-5k", "batch": 64}
OWN = {
    "mlp, a table": {
        "task": "classify",
        "model": "mlp",
        "data": {"train": "penguins.csv", "target": "species"},
        "batch": 16,
        "epochs": 150,
    },
    "mlp, gradient descent": {
        **DIGITS,
        "model": {"from": "mlp", "hidden": [256]},
        "batch": "all",
        "epochs": 40,
        "optimizer": {"name": "sgd", "lr": 0.1},
    },
    "cnn, augmented": {**DIGITS, "model": "cnn", "data": {"train": "mnist-5k", "augment": "light"}, "epochs": 5},
    "resnet18": {
        **DIGITS,
        "model": {"from": "resnet18", "stem": "small"},
        "data": {"train": "mnist-5k", "limit": 1000},
        "epochs": 1,
        "batch": 32,
    },
    "vit-tiny": {**DIGITS, "model": {"from": "vit-tiny", "patch": 7, "depth": 4}, "epochs": 3},
    "encoder from zero": {
        "task": "classify",
        "model": {"from": "encoder", "width": 128, "layers": 3, "heads": 4},
        "data": {"train": "banking77_train.csv", "input": "text", "target": "category"},
        "batch": 32,
        "steps": 300,
    },
    "gru, texts": {
        "task": "classify",
        "model": {"from": "gru", "width": 128},
        "data": {"train": "banking77_train.csv", "input": "text", "target": "category"},
        "batch": 64,
        "epochs": 4,
    },
    "encoder, frozen through a layer": {
        "task": "classify",
        "model": "minilm-l6",
        "head": "new",
        "freeze": {"through": "blocks.3"},
        "data": {"train": "banking77_train.csv", "input": "text", "target": "category", "limit": 2000},
        "batch": 32,
        "epochs": 2,
    },
    "decoder, tokens a batch": {
        "task": "language",
        "model": {"from": "decoder", "width": 128, "layers": 3, "heads": 4, "context": 128},
        "data": {"train": "tinyshakespeare.txt", "tokenizer": "bpe", "vocabulary": 1000, "max_tokens": 128},
        "batch": {"tokens": 2048},
        "steps": 80,
    },
    "conversations, last layers": {
        "task": "chat",
        "model": "smollm2-135m-instruct",
        "adapter": {"name": "lora", "layers": "last-4"},
        "data": {"train": "self_instruct_seed_tasks.jsonl", "max_tokens": 512, "too_long": "drop"},
        "batch": 4,
        "steps": 25,
    },
}


def train(arguments: list[str], runs: Path) -> dict[str, object]:
    command = [str(Path(sys.executable).with_name("fromzero")), "train", *arguments, "--runs", str(runs), "--json"]
    cache = runs.parent / "cache"  # all that was fetched, and nothing that an earlier round has kept
    (cache / "fromzero").mkdir(parents=True)
    for entry in cache_folder().iterdir() if cache_folder().is_dir() else ():
        if entry.name != "kept":
            (cache / "fromzero" / entry.name).symlink_to(entry)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def run(name: str, texts: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        if name in SHIPPED:
            recipe, overrides = SHIPPED[name]
            path = RECIPES / f"{recipe}.yaml"
            needs = [text for text in ("banking77_train.csv", "banking77_test.csv", "tinyshakespeare.txt") if text in path.read_text()]
            places = [f"data.{side}={(texts / text).absolute()}" for side, text in zip(("train", "validation"), needs, strict=False)]
            return train([str(path), *overrides, *places, "report=[]"], Path(folder) / "runs")
        values = json.loads(json.dumps(OWN[name]))
        values["data"] = values["data"] if isinstance(values["data"], dict) else {"train": values["data"]}
        if "." in values["data"]["train"]:
            values["data"]["train"] = str((texts / values["data"]["train"]).absolute())
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps({**values, "report": []}))
        return train([str(path)], Path(folder) / "runs")


def apart(rows: list[dict[str, object]]) -> list[float]:
    """How far each run's seconds are from the median of all runs of its recipe"""
    names = {row["recipe"] for row in rows}
    middle = {name: statistics.median(row["seconds"] for row in rows if row["recipe"] == name) for name in names}
    return [abs(row["seconds"] / middle[row["recipe"]] - 1) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=Path())
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    print(f"{'recipe':<32}{'seconds':>9}{'told':>9}{'error':>8}{'peak MB':>10}{'told':>8}{'error':>8}")
    for name in [*(asked.only or [*SHIPPED, *OWN])] * asked.rounds:
        found = run(name, asked.texts)
        told = found["predicted"]
        row = {"recipe": name, "seconds": found["seconds"], "told_seconds": told["seconds"]}
        row |= {"peak_bytes": found["peak_memory_bytes"], "told_peak_bytes": told["peak_memory_bytes"]}
        row["seconds_error"] = row["told_seconds"] / row["seconds"] - 1
        row["peak_error"] = row["told_peak_bytes"] / row["peak_bytes"] - 1
        rows.append(row)
        print(
            f"{name:<32}{row['seconds']:>9.1f}{row['told_seconds']:>9.1f}{row['seconds_error']:>+8.0%}"
            f"{row['peak_bytes'] / 1e6:>10,.0f}{row['told_peak_bytes'] / 1e6:>8,.0f}{row['peak_error']:>+8.0%}",
            flush=True,
        )
    medians = {key: statistics.median(abs(row[key]) for row in rows) for key in ("seconds_error", "peak_error")}
    worst = {key: max(abs(row[key]) for row in rows) for key in medians}
    print(f"median error: time {medians['seconds_error']:.1%}, peak {medians['peak_error']:.1%}; ", end="")
    print(f"largest: time {worst['seconds_error']:.0%}, peak {worst['peak_error']:.0%}; {len(rows)} runs")
    noise = apart(rows)
    if asked.rounds > 1:
        print(f"one run from the median of its repetitions: median {statistics.median(noise):.1%}, largest {max(noise):.0%}")
        for name in dict.fromkeys(row["recipe"] for row in rows):
            errors = [row["seconds_error"] for row in rows if row["recipe"] == name]
            took = [row["seconds"] for row in rows if row["recipe"] == name]
            print(f"  {name:<32}error {statistics.median(errors):+.0%} ({min(errors):+.0%} to {max(errors):+.0%})", end="")
            print(f"   took {statistics.median(took):.1f} ({min(took):.1f} to {max(took):.1f})")
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows, "medians": medians, "worst": worst, "apart": noise}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
