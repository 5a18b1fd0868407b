"""Run folders: a name in, a fresh folder out, or the one that has that name; and the list of all runs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from fromzero.errors import SourceError, UserError, did_you_mean

RESULT = "result.json"
_ELSEWHERE = "make it writable, or name another folder with --runs"


def refuse_unwritable(folder: Path) -> None:
    """raises: UserError where nothing can be written into a folder, or it cannot be made; asked before any work, nothing is left behind"""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise UserError("is no folder that runs can be written to", why=f"{there} is a file", mend=_ELSEWHERE, file=str(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        said = os.strerror(errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES)
        raise UserError(f"no run can be written there ({said}: {there})", mend=_ELSEWHERE, file=str(folder))


def new_folder(runs: Path, name: str) -> Path:
    """`runs/name`, or `name-2`, `name-3` … where that is taken; two runs at once never get the same one."""
    refuse_unwritable(runs)
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"no run can be written there ({error.strerror})", mend=_ELSEWHERE, file=str(folder)) from None
        return folder
    raise UserError(f"holds 9,999 runs named {name}", mend="give the recipe another name", file=str(runs), key="name")


def find_run(runs: Path, name: str) -> Path:
    """`NAME`, `run:NAME` or the folder itself.  raises: SourceError naming the nearest run"""
    short = name.removeprefix("run:")
    for folder in (runs / short, Path(short)):
        if (folder / "recipe.yaml").is_file() and short not in ("", ".", ".."):
            return folder
    raise no_run(runs, short)


def no_run(runs: Path, name: str, *, key: str = "") -> SourceError:
    """That there is none of this name, and which there are."""
    there = sorted(folder.name for folder in _run_folders(runs))
    mend = did_you_mean(name, there) or (f"the runs are {', '.join(there[-8:])}" if there else "fromzero train RECIPE makes one")
    return SourceError(f"there is no run '{name}' in {runs}", mend=mend, key=key)


def _run_folders(runs: Path) -> list[Path]:
    return [folder for folder in runs.iterdir() if (folder / "recipe.yaml").is_file()] if runs.is_dir() else []


def read_result(folder: Path) -> dict[str, Any]:
    """What a run said when it last ended; nothing of one that has not."""
    try:
        result = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def saved_steps(folder: Path) -> list[int]:
    """After which steps a run was saved; whether the checkpoints are whole is not looked at."""
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return [int(name) for name in names if name.isdigit()]


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """One row a run, oldest first: what its result says, or how far it came."""
    rows = []
    for folder in _run_folders(runs):
        row: dict[str, Any] = {"run": folder.name, "status": "unfinished", "task": "", "steps": 0, "seconds": None, "validation": {}}
        row |= (result := read_result(folder))
        if not result:
            row["steps"] = max(saved_steps(folder), default=0)
        rows.append({**row, "created": (folder / "recipe.yaml").stat().st_mtime})
    return sorted(rows, key=lambda row: (row["created"], row["run"]))
