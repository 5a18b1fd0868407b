"""Retired: an old name in, the new one out, with a warning that says so. One line a name; it goes after two minor releases."""

from __future__ import annotations

import warnings

RETIRED = {  # where it is written: old → new
    "export --to": {"transformers": "hf"},
    "export": {"--output": "FOLDER"},
}


def renamed(where: str, name: str) -> str:
    """The name as it is now; a warning where it had to be changed."""
    new = RETIRED[where].get(name, name)
    if new != name:
        warnings.warn(f"{where} {name} is now {where} {new}; the old name will go", FutureWarning, stacklevel=3)
    return new
