"""Contents: the rows of a source in, a short digest of each out; two such lists in, the rows that differ, by name, out. Knows no run.

One digest is of all rows and vouches for them; the short ones only find a row, and are bounded in number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fromzero.errors import Fault

MOST = 2**18  # short digests of one source, 2 MB as hex: of more rows, several share one
SHORT = 4  # bytes of a short digest
NAMED = 5  # rows that are named; the others are counted


@dataclass(frozen=True)
class Contents:
    """What a source held.

    unit:    what one of its rows is called: row, example, conversation, document, or file, which has a name
    whole:   SHA-256 of all rows in their order
    short:   hex, SHORT bytes for each `every` rows
    lines:   where each row begins in its file, as it is now; () where that says nothing
    """

    name: str
    unit: str
    rows: int
    whole: str
    every: int
    short: str
    names: tuple[str, ...] = ()
    lines: Sequence[int] = field(default=(), compare=False, repr=False)

    @property
    def parts(self) -> list[str]:
        """The short digests, one by one."""
        return [self.short[at : at + 2 * SHORT] for at in range(0, len(self.short), 2 * SHORT)]

    def place(self, row: int) -> str:
        """A row, counted from 0, as a person finds it."""
        line = self.lines[row] if row < len(self.lines) else row + 1
        return f"{self.unit} {row + 1:,}" + (f" (line {line:,})" if line != row + 1 else "")

    def places(self, begin: int, end: int) -> str:
        return self.place(begin) if end == begin + 1 else f"{self.unit}s {begin + 1:,} to {end:,}"


def contents(name: str, unit: str, rows: Sequence[bytes], *, names: Sequence[str] = (), lines: Sequence[int] = ()) -> Contents:
    """rows: all that is learned or measured from each"""
    every = max(-(-len(rows) // MOST), 1)
    whole = hashlib.sha256()
    short = hashlib.blake2b(digest_size=SHORT)
    found = []
    for place, row in enumerate(rows):
        said = len(row).to_bytes(8, "little") + row
        whole.update(said)
        short.update(said)
        if (place + 1) % every == 0 or place + 1 == len(rows):
            found.append(short.hexdigest())
            short = hashlib.blake2b(digest_size=SHORT)
    named = tuple(names) if len(names) == len(rows) <= MOST else ()
    return Contents(name, "file" if named else unit, len(rows), whole.hexdigest(), every, "".join(found), named, lines)


def differences(then: Contents, now: Contents) -> list[Fault]:
    """What has changed in a source, its first NAMED rows by name; none where all is as it was."""
    if then.whole == now.whole and then.names == now.names:
        return []
    if then.unit != now.unit or then.every != now.every:
        said = [f"held {then.rows:,} {then.unit}s, holds {now.rows:,} {now.unit}s"]
    elif now.names:
        said = list(_files(then, now))
    elif now.every > 1:
        first = (
            next((place for place, (a, b) in enumerate(zip(then.parts, now.parts, strict=False)) if a != b), len(then.parts)) * now.every
        )
        said = [f"differs first in {now.unit}s {first + 1:,} to {first + now.every:,} ({now.rows:,} in all, {then.rows:,} before)"]
    else:
        said = list(_rows(then, now))
    more = [f"and {len(said) - NAMED:,} more {now.unit}s"] if len(said) > NAMED else []
    return [Fault(what, file=now.name) for what in [*said[:NAMED], *more]]


def _files(then: Contents, now: Contents) -> Iterator[str]:
    before, after = (dict(zip(side.names, side.parts, strict=True)) for side in (then, now))
    for name in sorted(before | after):
        if before.get(name) != after.get(name):
            yield f"{name} " + ("is new" if name not in before else "is gone" if name not in after else "has changed")


def _rows(then: Contents, now: Contents) -> Iterator[str]:
    """Between what both begin and end with."""
    before, after = then.parts, now.parts
    shorter = min(len(before), len(after))
    begin = next((place for place in range(shorter) if before[place] != after[place]), shorter)
    tail = next((n for n in range(shorter - begin) if before[-1 - n] != after[-1 - n]), shorter - begin)
    old, new = before[begin : len(before) - tail], after[begin : len(after) - tail]
    end = begin + len(new)
    if not old and not new:
        yield f"has changed ({now.rows:,} {now.unit}s)"
    elif not old:
        yield f"{now.places(begin, end)} {'is' if len(new) == 1 else 'are'} new"
    elif not new:
        gone = f"{now.unit} {begin + 1:,} is" if len(old) == 1 else f"{now.unit}s {begin + 1:,} to {begin + len(old):,} are"
        yield f"{gone} gone"
    elif len(old) != len(new):
        yield f"{len(new):,} {now.unit}s stand where {len(old):,} stood, from {now.place(begin)} on"
    elif (old[0], old[-1]) == (new[-1], new[0]) and old[1:-1] == new[1:-1]:
        yield f"{now.unit}s {begin + 1:,} and {end:,} were swapped"
    elif sorted(old) == sorted(new):
        yield f"{now.places(begin, end)} stand in another order"
    else:
        yield from (f"{now.place(begin + at)} has changed" for at, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
