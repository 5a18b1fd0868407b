"""Around: what surrounds a run, each for as long as it lasts: observers that hear, warnings that become events, signals, a full disk."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromzero.errors import UserError
from fromzero.report.events import Event, Warned
from fromzero.report.summary import format_bytes
from fromzero.sources.cache import FULL, free_disk


@dataclass
class Stop:
    """Why the loop should end after the step that is running: a signal's number, or `seconds`."""

    reason: int | str | None = None


def teller(observers: Sequence[Callable[[Event], None]], *, goes_on: bool) -> Callable[[Event], None]:
    """goes_on: an observer that has no room to write is left out, and the others hear of it; else that ends the run"""
    listening = list(observers)

    def tell(event: Event) -> None:
        for observer in tuple(listening):
            try:
                observer(event)
            except OSError as error:
                if not goes_on or error.errno not in FULL:
                    raise
                listening.remove(observer)
                tell(
                    Warned(
                        f"{type(observer).__name__} writes no more: {error.strerror}", "training goes on without what it would have written"
                    )
                )

    return tell


def close_all(observers: Sequence[Any]) -> None:
    """The log first, then those that read it; one that cannot write is no fault of the run, and those still open hear of it."""
    left = [*observers[:1], *reversed(observers[1:])]
    while left:
        closing = left.pop(0)
        try:
            closing.close()
        except OSError as error:
            what = f"{error.filename or type(closing).__name__} could not be written ({error.strerror})"
            for observer in left:
                observer(Warned(what, "the run itself is not touched by that"))


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A disk that is full, whatever was being written, is one message that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"could not be written ({error.strerror}); {format_bytes(free_disk(folder))} are free",
            why="what was saved before is as it was",
            mend=f"make room; fromzero resume {folder.name} then goes on from there",
            file=str(error.filename or folder),
        ) from error


@contextmanager
def spoken_once(tell: Callable[[Event], None]) -> Iterator[None]:
    """Python warnings become events, each once."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            tell(Warned(str(message).splitlines()[0][:300]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextmanager
def signals() -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM asks the loop to stop after its step; a second one ends at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        stop.reason = number
        put_back()  # both: whichever comes next ends at once

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        put_back()
