"""Does a run that is killed at any instant, and goes on as often as it takes, end in the bits of an unbroken one?

    python benchmarks/kill.py TEXTS.csv [--kills 200] [--seed 0] [--only cnn encoder decoder] [--json FILE]

TEXTS.csv has columns text and category (banking77_train.csv). Three recipes take turns: a convolutional network with dropout and
augmentation, a new head on frozen MiniLM of which what it says is kept, a small decoder with adapters. Each is run once unbroken; then
runs of it are killed with SIGKILL again and again, each up to KILLS_A_RUN times, and afterwards go on to their end. What they leave is
compared byte by byte: model, texts, state of the optimizer, and what the log says of each step; the result but for times and memory.

Children are forked from this process, which has imported and planned already; each tells through a pipe what it is doing, so that a kill
can be aimed at a save or an evaluation, and is counted where it fell.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a fork takes no threads along

import torch

import fromzero as fz
from fromzero.planner import cut
from fromzero.report import events
from fromzero.report.jsonlines import EVENTS, read_events
from fromzero.runner import prefix
from fromzero.runner.loop import is_evaluated

KILLS_A_RUN = 8
OF_A_PROCESS = {"seconds", "samples_per_second", "tokens_per_second", "peak_memory_bytes"}  # of a result
CLASSES = ["card_arrival", "lost_or_stolen_card", "exchange_rate"]  # of the texts
PHASES = ("starting", "training", "evaluation", "saving", "ending")
AIMS = ("any", "any", "evaluation", "saving", "ending")  # where the next kill is to fall: most of a run's time is training


# ------------------------------------------------------------------------------------------------------------ what must be equal


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a log says of the run's steps, without the times."""
    said = read_events(folder / EVENTS)
    return [{k: v for k, v in event.items() if k != "at"} for event in said if event["event"] in events.OF_A_STEP]


def differences(ours: Path, theirs: Path) -> list[str]:
    """Where two run folders that should hold the same run do not, in words."""
    found = [f"{name}: other bytes" for name, one, other in _files(ours, theirs) if one != other]
    one, other = steps_of(ours), steps_of(theirs)
    if one != other:
        first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        found.append(
            f"{EVENTS}: {len(one)} and {len(other)} lines of steps, the first that differs is {first}: {one[first : first + 1]}, {other[first : first + 1]}"
        )
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    found += [
        f"result.json: {k} is {results[0].get(k)}, not {v}"
        for k, v in results[1].items()
        if k not in OF_A_PROCESS and results[0].get(k) != v
    ]
    ends = [event["status"] for event in read_events(ours / EVENTS) if event["event"] == "Finished"]
    return found + ([] if ends.count("done") == 1 and ends[-1] == "done" else [f"{EVENTS}: it ended {ends}"])


def _files(ours: Path, theirs: Path) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    """Name and bytes on both sides of what holds no times; None where it is missing. A kill may leave one old checkpoint more."""
    names = {path.relative_to(folder) for folder in (ours, theirs) for path in (*folder.glob("model/*"), *folder.glob("samples.json"))}
    names |= {path.relative_to(theirs) for path in theirs.glob("checkpoints/step-*/*.safetensors")}
    for name in sorted(names):
        one, other = (path.read_bytes() if path.is_file() else None for path in (ours / name, theirs / name))
        yield str(name), one, other


# ------------------------------------------------------------------------------------------------------------------ the recipes


def plans(folder: Path, texts: str) -> dict[str, Callable[[], fz.Planned]]:
    one_thread = {"threads": 1}
    often = {"every": 4, "keep": 2}
    corpus = folder / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60)
    cnn = {
        "name": "cnn",
        "task": "classify",
        "model": {"from": "cnn", "channels": [8, 16], "dropout": 0.3, "batch_norm": True},
        "data": {"train": "mnist-5k", "limit": 400, "hold_out": 0.3, "augment": "light"},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "batch": 16,
        "steps": 60,
        "evaluate": {"every": 6},
        "save": often,
        "limits": one_thread,
    }
    encoder = {
        "name": "encoder",
        "task": "classify",
        "model": "minilm-l6",
        "head": "new",
        "freeze": "body",
        "data": {
            "train": str(Path(texts).resolve()),
            "input": "text",
            "target": "category",
            "limit": 60,
            "hold_out": 0.3,
            "classes": CLASSES,
        },
        "optimizer": {"name": "adamw", "lr": 0.01},
        "batch": 8,
        "steps": 60,
        "evaluate": {"every": 5},
        "save": often,
        "limits": one_thread,
    }
    base = {
        "name": "base",
        "task": "language",
        "model": {"from": "decoder", "width": 64, "layers": 3, "heads": 4, "context": 32},
        "data": {"train": str(corpus), "tokenizer": "characters", "max_tokens": 32},
        "steps": 20,
        "batch": 8,
        "limits": one_thread,
    }
    decoder = base | {
        "name": "decoder",
        "model": "run:base",
        "adapter": {"name": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"},
        "optimizer": {"name": "adamw", "lr": 5e-3},
        "steps": 40,
        "evaluate": {"every": 10, "samples": 1},
        "save": often,
    }

    def after_base() -> fz.Planned:
        fz.run(fz.plan(base, runs=folder / "bases", probe=False), quiet=True)
        return fz.plan(decoder | {"model": str(folder / "bases" / "base")}, runs=folder)

    return {"cnn": lambda: fz.plan(cnn, runs=folder), "encoder": lambda: fz.plan(encoder, runs=folder), "decoder": after_base}


# ------------------------------------------------------------------------------------------------------------------ the killing


class Child:
    """One process that trains a run on. Letters come through a pipe, one an event."""

    def __init__(self, planned: fz.Planned, runs: Path) -> None:
        self.reads, writes = os.pipe()
        self.said = ""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reads)
            try:
                go_on(planned, runs, lambda letter: os.write(writes, letter.encode()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writes)

    def hear(self, seconds: float) -> bool:
        """Wait for more, not longer than this.  returns: whether more may come"""
        if select.select([self.reads], [], [], max(seconds, 0.0))[0]:
            letters = os.read(self.reads, 4096).decode()
            self.said += letters
            return bool(letters)
        return True

    def wait_for(self, letter: str, times: int) -> None:
        while self.said.count(letter) < times and self.hear(60.0):
            pass

    def kill(self) -> int:
        """returns: its exit code, negative where the kill came before its end"""
        os.kill(self.pid, signal.SIGKILL)  # its id is not given to another before it is waited for
        _, status = os.waitpid(self.pid, 0)
        while select.select([self.reads], [], [], 0.0)[0] and self.hear(0.0):
            pass
        os.close(self.reads)
        return os.waitstatus_to_exitcode(status)

    def end(self) -> int:
        while self.hear(600.0):
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self.reads)
        return os.waitstatus_to_exitcode(status)

    @property
    def phase(self) -> str:
        return {"": "starting", "b": "starting", "d": "training", "e": "evaluation", "s": "saving", "f": "ending"}[self.said[-1:]]


def go_on(planned: fz.Planned, runs: Path, tell: Callable[[str], object]) -> None:
    plan = planned.plan

    def hear(event: object) -> None:
        """b begun, d a step done, e an evaluation or its texts come next, s a save comes next, f the end comes next"""
        if isinstance(event, events.Started):
            tell("b")
        elif isinstance(event, events.StepDone):
            tell("e" if is_evaluated(plan, event.step) else "d")
        elif isinstance(event, events.Saving):
            tell("s")
        elif isinstance(event, (events.Saved, events.Evaluated)):
            tell("f" if event.step == plan.steps else "d")

    name = plan.recipe.name or "run"
    if (runs / name / "recipe.yaml").is_file():
        fz.resume(name, runs=runs, observers=[hear], quiet=True)
    else:  # killed before it was a run
        shutil.rmtree(runs / name, ignore_errors=True)
        fz.run(replace(planned, place=replace(planned.place, runs=runs)), observers=[hear], quiet=True)


def killed(child: Child, draw: random.Random, whole: float) -> int:
    """Kill at an instant that is drawn.  returns: the child's exit code, which is not that of a kill where it ended before"""
    aim = draw.choice(AIMS)
    if aim == "any":
        until = time.monotonic() + draw.uniform(0.0, whole)
        while time.monotonic() < until and child.hear(until - time.monotonic()):
            pass
    else:
        child.wait_for({"evaluation": "e", "saving": "s", "ending": "f"}[aim], draw.randint(1, 1 if aim == "ending" else 3))
        time.sleep(draw.uniform(0.0, 0.02))
    return child.kill()


def broken_run(planned: fz.Planned, runs: Path, draw: random.Random, whole: float, kills: int) -> tuple[Counter[str], str]:
    """Kill a run so many times, then let it end.  returns: phases in which kills fell, and what went wrong"""
    fell: Counter[str] = Counter()
    while sum(fell.values()) < kills:
        child = Child(planned, runs)
        code = killed(child, draw, whole)
        if code != -signal.SIGKILL:
            return fell, "" if code == 0 else f"went on and ended with {code}"  # 0: it was faster than the kill
        fell[child.phase] += 1
        if is_done(runs / (planned.plan.recipe.name or "run")):
            return fell, ""
    code = Child(planned, runs).end()
    return fell, "" if code == 0 else f"went on and ended with {code}"


def is_done(folder: Path) -> bool:
    path = folder / "result.json"
    return path.is_file() and json.loads(path.read_text())["status"] == "done"


def tries(name: str, planned: fz.Planned, folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill runs of one recipe until so many kills have fallen, and compare each with the unbroken one."""
    whole_runs = folder / "whole"
    began = time.monotonic()
    if Child(planned, whole_runs).end() != 0:
        raise SystemExit(f"{name}: the unbroken run failed")
    whole = time.monotonic() - began
    counts = {"survived": Counter(dict.fromkeys(PHASES, 0)), "failed": Counter(dict.fromkeys(PHASES, 0))}
    faults: list[str] = []
    runs = 0
    while sum(sum(c.values()) for c in counts.values()) < kills and runs < 4 * kills:
        runs += 1
        place = folder / f"broken-{runs}"
        left = kills - sum(sum(c.values()) for c in counts.values())
        fell, wrong = broken_run(planned, place, draw, whole, min(left, draw.randint(1, KILLS_A_RUN)))
        run = planned.plan.recipe.name or "run"
        found = [wrong] if wrong else differences(place / run, whole_runs / run)
        counts["failed" if found else "survived"].update(fell)
        faults += [f"{name}, run {runs}: {what}" for what in found]
        print(
            f"{name} run {runs}: {sum(fell.values())} kills ({', '.join(f'{n} {p}' for p, n in sorted(fell.items()))}) {'; '.join(found) or 'the same bits'}",
            file=sys.stderr,
        )
        if not found:
            shutil.rmtree(place)
    return {"runs": runs, **{kind: dict(count) for kind, count in counts.items()}, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["cnn", "encoder", "decoder"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fromzero-kill-"))
    cut.LOST_SECONDS = float("inf")  # the frozen part is kept though so few texts win little
    prefix.LEAST_SECONDS = float("inf")  # what the frozen part says is computed in every session, so that kills fall there too
    found: dict[str, Any] = {}
    making = plans(folder, asked.texts)
    for place, name in enumerate(asked.only):
        kills = asked.kills // len(asked.only) + (place < asked.kills % len(asked.only))
        found[name] = tries(name, making[name](), folder / name, kills, random.Random(f"{asked.seed} {name}"))
    report = {"command": " ".join(sys.argv), "kills": asked.kills, "seed": asked.seed, "torch": torch.__version__, "recipes": found}
    for name, row in found.items():
        for kind in ("survived", "failed"):
            print(f"{name:8} {kind:8} {sum(row[kind].values()):4}  " + "  ".join(f"{phase} {row[kind][phase]}" for phase in PHASES))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")
    if faults := [fault for row in found.values() for fault in row["faults"]]:
        print("\n".join(faults), f"\nwhat they left: {folder}", file=sys.stderr)
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
