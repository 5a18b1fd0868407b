"""Does transfer pay? The same few digits learned from what 0 to 4 taught, and from zero; mean over five seeds.

    python benchmarks/transfer.py [--seeds 5] [--json FILE]

Each seed draws its own 5 examples a class, its own hold-out and its own first weights. The base is recipes/digits.yaml.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import fromzero as fz

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FROM_ZERO = ["model=models/seed_cnn.py:SeedCNN", "freeze=none"]
VARIANTS = {
    "as shipped (adamw 1e-3)": [],
    "longer (100 epochs)": ["epochs=100"],
    "sgd 0.01, momentum 0.9": ["optimizer={name: sgd, lr: 0.01, momentum: 0.9}"],
    "50 examples a class": ["data.limit.per_class=50", "epochs=12"],
}


def accuracy(runs: Path, base: str, *overrides: str) -> float:
    recipe = fz.read(RECIPES / "digits-finetune.yaml", f"model=run:{base}", "evaluate=1000000", "report=[]", *overrides)
    planned = fz.plan(recipe, runs=runs, probe=False, beside=RECIPES)
    return float(fz.run(planned, quiet=True).result["validation"]["accuracy"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=[*VARIANTS], action="append")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        recipe = fz.read(RECIPES / "digits.yaml", "report=[]")
        base = fz.run(fz.plan(recipe, runs=runs, probe=False, beside=RECIPES), quiet=True).folder.name
        print(f"{'variant':<28}{'fine-tuned':>11}{'from zero':>11}{'gain':>8}   by seed")
        for name, overrides in VARIANTS.items():
            if asked.only and name not in asked.only:
                continue
            pairs = [
                (accuracy(runs, base, *overrides, f"seed={s}"), accuracy(runs, base, *overrides, *FROM_ZERO, f"seed={s}"))
                for s in range(asked.seeds)
            ]
            tuned, zero = (statistics.mean(column) for column in zip(*pairs, strict=True))
            rows[name] = {"tuned": tuned, "zero": zero, "pairs": pairs}
            gains = " ".join(f"{100 * (a - b):+.1f}" for a, b in pairs)
            print(f"{name:<28}{tuned:>11.1%}{zero:>11.1%}{100 * (tuned - zero):>+8.1f}   {gains}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
