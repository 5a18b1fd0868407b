"""Reporting: measurements of several sides in, medians, ratios of pairs and a table out. Imports nothing heavy.

The parent of a benchmark must stay small: Linux counts its memory into the peak of a child until the child has started.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of one figure over all rounds."""

    median: float
    lowest: float
    highest: float

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.lowest:.{digits}f} to {self.highest:.{digits}f})"


def arguments(doc: str | None, sides: Collection[str], *, rounds: int, steps: int, warmup: int, each: str) -> argparse.ArgumentParser:
    """The options of every benchmark of training. each: what a step is"""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=steps, help=f"timed steps ({each})")
    parser.add_argument("--warmup", type=int, default=warmup, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()))
    parser.add_argument("--only", nargs="+", choices=list(sides), metavar="SIDE", help=f"of {', '.join(sides)}")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "PLACE"), help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    asked = parser.parse_args()
    if asked.rounds < 1 or asked.steps < 1 or asked.warmup < 1:
        parser.error("--rounds, --steps and --warmup begin at 1")
    return asked


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """ours / theirs round by round: what slows the machine for a while slows both sides of a pair."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def differences(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """ours - theirs round by round."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)])


def in_turn(sides: Sequence[str], rounds: int, measure: Callable[[str], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Measure A B C A B C …, so that every round holds one measurement of each side, taken close together."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(1, rounds + 1):
        for side in sides:
            print(f"round {turn}/{rounds}  {side}", file=sys.stderr, flush=True)
            found[side].append(measure(side))
    return found


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run to the end and return what it printed; if it fails, show its words and end the benchmark."""
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\n{' '.join(command[:4])} … ended with exit code {done.returncode}")
    return done.stdout


def last_json(text: str) -> dict[str, Any]:
    """The last line of a child's output; libraries may have printed before it."""
    value: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return value


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the heading; Markdown, so that it can be pasted into the README."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    print("\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]))


def circumstances() -> dict[str, Any]:
    """What a figure means nothing without. load: processes that wanted a core in the minute before."""
    return {
        "command": command(),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in ("torch", "lightning", "keras") if (version := _version(name))},
    }


def machine_line(seen: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
    return f"{seen['cpu']}, {seen['cores']} cores, load {seen['load']} at the start; Python {seen['python']}, {versions}; commit {seen['commit']}\n`{seen['command']}`"


def command() -> str:
    """How to do it again, without where this machine keeps things."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and not word.startswith("--json"):
            words.append(word)
        skip = word == "--json"
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def commit() -> str:
    """The commit that was measured; `+` stands for changes that it does not hold."""
    name = _git("rev-parse", "--short=12", "HEAD")
    return (name + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks") else "")) if name else "unknown"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_json(path: str | None, value: Any) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=1) + "\n")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
