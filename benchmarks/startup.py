"""Starting up: how long a person waits before fromzero does anything.

    python benchmarks/startup.py --rounds 15 --json benchmarks/results/startup.json

`--help` and the import are held to bars; `fromzero new` on a small table is shown beside `import torch`, without a bar.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from report import circumstances, differences, in_turn, machine_line, print_table, run_child, spread, write_json

HELP_BAR_SECONDS = 0.3  # of `fromzero --help`, whole process
IMPORT_BAR_SECONDS = 0.1  # of `import fromzero`, beyond a bare Python


def commands(table: Path) -> dict[str, list[str]]:
    """What is measured, the bare Python first. The script is left out where fromzero was not installed."""
    python = sys.executable
    found = {
        "python": [python, "-c", "pass"],
        "import": [python, "-c", "import fromzero"],
        "help": [python, "-m", "fromzero", "--help"],
        "import torch": [python, "-c", "import torch"],
        "new": [python, "-m", "fromzero", "new", str(table)],
    }
    script = Path(python).with_name("fromzero")
    if script.exists():
        found["script help"] = [str(script), "--help"]
    else:
        print("the script `fromzero` is not beside this Python: pip install -e . to measure it too", file=sys.stderr)
    return found


def wall_seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    run_child(command)
    return time.perf_counter() - started


def verdict(seconds: float, bar: float | None) -> str:
    return "" if bar is None else f"{bar} s: {'met' if seconds <= bar else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each command")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds begins at 1")

    seen = circumstances()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "table.csv")
        table.write_text("size,colour,kind\n" + "".join(f"{i},{'red' if i % 2 else 'green'},{'ab'[i % 2]}\n" for i in range(40)))
        known = commands(table)
        for command in known.values():  # so that the first round does not read modules from the disk
            wall_seconds(command)
        found = in_turn(list(known), asked.rounds, lambda side: {"seconds": wall_seconds(known[side])})

    seconds = {side: [one["seconds"] for one in all_] for side, all_ in found.items()}
    beyond = differences(seconds["import"], seconds["python"])
    rows = [["what", "seconds: median (min to max)", "bar"]]
    for side, label, bar in (
        ("help", "python -m fromzero.cli --help", HELP_BAR_SECONDS),
        ("script help", "fromzero --help", HELP_BAR_SECONDS),
        ("new", "fromzero new table.csv", None),
        ("import torch", "python -c 'import torch'", None),
        ("python", "python -c pass", None),
    ):
        if side in seconds:
            took = spread(seconds[side])
            rows.append([label, took.show(3), verdict(took.median, bar)])
    rows.insert(1, ["import fromzero, beyond python -c pass", beyond.show(3), verdict(beyond.median, IMPORT_BAR_SECONDS)])
    print_table(rows)
    print(f"\n{machine_line(seen)}")
    write_json(asked.json, {**seen, "bars_seconds": {"help": HELP_BAR_SECONDS, "import": IMPORT_BAR_SECONDS}, "found": found})


if __name__ == "__main__":
    main()
