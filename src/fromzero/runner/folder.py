"""Run folders: a name in, a fresh folder out, or the one that has that name; and the list of all runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fromzero.errors import SourceError, UserError, did_you_mean

RESULT = "result.json"


def new_folder(runs: Path, name: str) -> Path:
    """`runs/name`, or `name-2`, `name-3` … where that is taken; two runs at once never get the same one."""
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if runs.exists() and not runs.is_dir():
                break
            continue
        except OSError as error:
            raise UserError(
                f"no run can be written there ({error.strerror})", file=str(folder), mend="name another folder with --runs"
            ) from None
        return folder
    raise UserError("is no folder that runs can be written to", file=str(runs), mend="name another one with --runs")


def find_run(runs: Path, name: str) -> Path:
    """`NAME`, `run:NAME` or the folder itself.  raises: SourceError naming the nearest run"""
    short = name.removeprefix("run:")
    for folder in (runs / short, Path(short)):
        if (folder / "recipe.yaml").is_file() and short not in ("", ".", ".."):
            return folder
    there = [p.name for p in sorted(runs.iterdir()) if (p / "recipe.yaml").is_file()] if runs.is_dir() else []
    mend = did_you_mean(short, there) or (f"the runs are {', '.join(there[-8:])}" if there else "fromzero train RECIPE makes one")
    raise SourceError(f"there is no run '{short}' in {runs}", mend=mend)


def read_result(folder: Path) -> dict[str, Any]:
    """What a run said when it last ended; nothing of one that has not."""
    try:
        result = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """One row a run, oldest first: what its result says, or how far it came."""
    rows = []
    for folder in runs.iterdir() if runs.is_dir() else []:
        if not (folder / "recipe.yaml").is_file():
            continue
        row: dict[str, Any] = {"run": folder.name, "status": "unfinished", "task": "", "steps": 0, "seconds": None, "validation": {}}
        row |= (result := read_result(folder))
        if not result:
            steps = [int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*") if p.suffix == ""]
            row["steps"] = max(steps, default=0)
        rows.append({**row, "created": (folder / "recipe.yaml").stat().st_mtime})
    return sorted(rows, key=lambda row: (row["created"], row["run"]))
