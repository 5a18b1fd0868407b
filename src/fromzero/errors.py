"""Errors: what went wrong in, one message out that says what, where, why and the mend.

FromzeroError              code 1   our bug, such as a frozen tensor that moved, unless a subclass says otherwise
├── UserError              code 2   the user can mend it
│   ├── RecipeError                 the recipe: keys, values, overrides
│   ├── DataError                   files, columns, labels, images
│   ├── ModelError                  the model cannot be built, or does not fit the data
│   ├── ShapeError                  two tensors that do not belong together
│   ├── SourceError                 a name that leads to no file, an archive or weights not to be trusted
│   ├── PlanRefused                 the plan shows that the run cannot do what was asked
│   └── MissingExtra                an optional package is not installed
├── NumbersError           code 3   the numbers stopped the run: NaN, or limits.seconds
└── Interrupted            code 130 or 143, after saving
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

MOST_SHOWN, TAIL_SHOWN = 1000, 200  # characters of a part of a message, and of these at its end: what is wrong often stands there


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. `key` is a recipe key or a column; `line` counts from 1."""

    what: str
    why: str = ""
    mend: str = ""
    file: str = ""
    line: int = 0
    key: str = ""

    def __str__(self) -> str:
        place = self.file + (f":{self.line}" if self.line else "")
        where = " ".join(part for part in (place, _shown(self.key)) if part)
        said = [self.what, self.why, self.mend]
        text = (f"{where}: " if where else "") + "; ".join(_shown(part) for part in said if part)
        return text.encode("utf-8", "backslashreplace").decode()  # a name or a cell may hold what cannot be printed


def _shown(text: str) -> str:
    """What a person reads of it: a key or a value may be a file's whole content."""
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[: MOST_SHOWN - TAIL_SHOWN]} … {text[-TAIL_SHOWN:]} ({len(text):,} characters)"


class FromzeroError(Exception):
    """An error with fields; `faults` holds several when all were found at once."""

    code = 1

    def __init__(self, what: str | Sequence[Fault], *, why: str = "", mend: str = "", file: str = "", line: int = 0, key: str = "") -> None:
        if isinstance(what, str):
            self.faults: tuple[Fault, ...] = (Fault(what, why, mend, file, line, key),)
        else:
            self.faults = tuple(what)
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def as_json(self) -> dict[str, object]:
        """What `--json` prints for this error."""
        return {"error": type(self).__name__, "code": self.code, "faults": [asdict(fault) for fault in self.faults]}


class UserError(FromzeroError):
    code = 2


class RecipeError(UserError): ...


class DataError(UserError): ...


class ModelError(UserError): ...


class ShapeError(UserError): ...


class SourceError(UserError): ...


class PlanRefused(UserError): ...


class MissingExtra(UserError): ...


class NumbersError(FromzeroError):
    code = 3


class Interrupted(FromzeroError):
    """Stopped by a signal, after saving. `code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, what: str, *, code: int, mend: str = "") -> None:
        super().__init__(what, mend=mend)
        self.code = code


_NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, torch on a CPU or a GPU, or the system says it."""
    return isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError)) and any(said in str(error) for said in _NO_MEMORY))


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def listed(names: Sequence[object], most: int) -> str:
    """The first ones, and whether there are more."""
    return ", ".join(map(str, names[:most])) + (" …" if len(names) > most else "")


def nearest(word: str, known: Iterable[str], *, count: int = 1) -> list[str]:
    """The known words closest to this one, best first; none where nothing is close."""
    spelled = {name.lower(): name for name in reversed(list(known))}
    return [spelled[close] for close in difflib.get_close_matches(word.lower(), list(spelled), n=count, cutoff=0.6)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or an empty string."""
    close = nearest(word, known)
    return f"did you mean '{close[0]}'?" if close else ""
