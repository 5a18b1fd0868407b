"""A 300-row table: how much longer `fromzero train` takes than a plain script, as whole processes.

    python benchmarks/table.py --rounds 9 --json benchmarks/results/table.json

The table has 6 columns of numbers, 2 of words and 3 classes. Both sides read the CSV, train the same network for the same
number of steps, and leave a model on the disk. `fromzero train` also checks, plans, probes, evaluates each epoch, and
writes a page, a log and a result; the difference is its price, which is to stay below the bar.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import circumstances, differences, in_turn, last_json, machine_line, print_table, run_child, spread, usable_cores, write_json

BAR_SECONDS = 1.5  # most that fromzero may take longer than the script
ROWS = 300
CLASSES = ("ash", "elm", "oak")

RECIPE = """\
task: classify
model: mlp
data: {train: table.csv, target: tree}
optimizer: {name: adamw, lr: 1e-3}
batch: 32
epochs: 10
"""

SCRIPT = '''\
"""What a person would write by hand for this table."""
import csv, json, sys
import torch
import torch.nn.functional as F
from torch import nn

folder = sys.argv[1]
torch.manual_seed(0)
with open(f"{folder}/table.csv", newline="") as file:
    rows = list(csv.DictReader(file))
columns = []
for name in rows[0]:
    if name == "tree":
        continue
    cells = [row[name] for row in rows]
    try:
        values = torch.tensor([float(cell) for cell in cells])
        columns.append(((values - values.mean()) / values.std())[:, None])
    except ValueError:
        words = sorted(set(cells))
        columns.append(F.one_hot(torch.tensor([words.index(cell) for cell in cells]), len(words) + 1).float())  # + 1: a word never seen
x = torch.cat(columns, 1)
classes = sorted({row["tree"] for row in rows})
y = torch.tensor([classes.index(row["tree"]) for row in rows])
order = torch.randperm(len(x))
held, kept = order[: TRAIN_HOLD], order[TRAIN_HOLD :]

model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(classes)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
steps = 0
for epoch in range(10):
    model.train()
    for index in kept[torch.randperm(len(kept))].split(32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        steps += 1
    model.eval()
    with torch.no_grad():
        scores = model(x[held])
        print(epoch, F.cross_entropy(scores, y[held]).item(), (scores.argmax(1) == y[held]).float().mean().item())
torch.save(model.state_dict(), f"{folder}/model.pt")
print(json.dumps({"steps": steps, "parameters": sum(p.numel() for p in model.parameters())}))
'''.replace("TRAIN_HOLD", str(ROWS // 10))


def write_files(folder: Path) -> None:
    """The table, the recipe and the script; the same every time."""
    draw = random.Random(0)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["height", "girth", "age", "light", "water", "slope", "colour", "site", "tree"])
        for row in range(ROWS):
            kind = row % len(CLASSES)
            numbers = [f"{draw.gauss(kind * (place - 2), 3):.3f}" for place in range(6)]
            writer.writerow([*numbers, draw.choice(["red", "green", "brown"]), draw.choice(["north", "south"]), CLASSES[kind]])
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "script.py").write_text(SCRIPT)


def measure(side: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one side as a process.  returns: its wall time in seconds, steps and parameters"""
    with tempfile.TemporaryDirectory() as runs:
        fromzero = ["-m", "fromzero", "train", str(folder / "recipe.yaml"), "--runs", runs, "--json"]
        command = [sys.executable, *(fromzero if side == "fromzero" else [str(folder / "script.py"), str(folder)])]
        started = time.perf_counter()
        text = run_child(command, {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""})
        seconds = time.perf_counter() - started
    result = last_json(text)
    return {"seconds": seconds, "steps": result["steps"], "parameters": result["parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="pairs")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()))
    parser.add_argument("--json", metavar="FILE", help="write every measurement there")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds begins at 1")

    seen = circumstances()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for side in ("fromzero", "script"):  # so that no side of the first pair reads its modules from the disk
            measure(side, folder, asked.threads)
        found = in_turn(("fromzero", "script"), asked.rounds, lambda side: measure(side, folder, asked.threads))
    for work in ("steps", "parameters"):
        counts = {side: {one[work] for one in all_} for side, all_ in found.items()}
        if counts["fromzero"] != counts["script"]:
            sys.exit(f"the two sides do not do the same: {work} are {counts}")

    ours, theirs = ([one["seconds"] for one in found[side]] for side in ("fromzero", "script"))
    more = differences(ours, theirs)
    print_table(
        [
            ["side", "seconds: median (min to max)"],
            ["fromzero train", spread(ours).show(2)],
            ["script", spread(theirs).show(2)],
            ["difference of a pair", more.show(2)],
        ]
    )
    print(f"\nbar: at most {BAR_SECONDS} s longer: {'met' if more.median <= BAR_SECONDS else 'MISSED'}\n{machine_line(seen)}")
    write_json(asked.json, {**seen, "bar_seconds": BAR_SECONDS, "found": found})


if __name__ == "__main__":
    main()
