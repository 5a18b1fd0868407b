"""Texts to go on with in, one at a time or many, their tokens out as they are made: one thread steps for all who wait. Knows no HTTP.

Requests hand in and hear over queues. Nobody waits for a lock, and only this thread touches the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from fromzero.models.together import Allowed, Batch, Made, Sampling


@dataclass(frozen=True)
class Wish:
    """One text. ids: it goes on from them; near: those whose text it stands beside"""

    ids: Sequence[int]
    near: Sequence[int]
    sampling: Sampling
    allowed: Allowed | None = None


@dataclass(eq=False)
class _Text:
    wish: Wish
    place: int  # among those of its request
    told: asyncio.Queue[tuple[int, Made | Exception]]
    gone: bool = False  # nobody listens any more; the decoding thread looks before each step


@dataclass
class Told:
    """What is made of the texts of one request, in the order it is made. `leave` whatever happens."""

    texts: list[_Text]
    heard: asyncio.Queue[tuple[int, Made | Exception]]
    open: int = field(init=False)

    def __post_init__(self) -> None:
        self.open = len(self.texts)

    async def next(self) -> tuple[int, Made]:
        """raises: what went wrong with one of the texts"""
        while True:
            place, made = await self.heard.get()
            if isinstance(made, Exception):
                raise made
            if not self.texts[place].gone:
                self.open -= bool(made.ended)
                return place, made

    def stop(self, place: int) -> None:
        """One text has said enough."""
        if not self.texts[place].gone:
            self.texts[place].gone = True
            self.open -= 1

    def leave(self) -> None:
        for text in self.texts:
            text.gone = True


class Decoding:
    """The thread. together: how many texts share a step; the others wait for their turn.

    running, waiting:  how many there are now
    made:              tokens so far
    """

    def __init__(self, new_batch: Callable[[], Batch], together: int) -> None:
        self._new_batch, self._together = new_batch, together
        self._asked: SimpleQueue[_Text | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.running = self.waiting = self.made = 0

    def start(self) -> None:
        """From the loop in which requests listen."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """After the step that is being taken. Who still listens hears no more."""
        self._asked.put(None)
        self._thread.join()

    def begin(self, wishes: Sequence[Wish]) -> Told:
        heard: asyncio.Queue[tuple[int, Made | Exception]] = asyncio.Queue()
        texts = [_Text(wish, place, heard) for place, wish in enumerate(wishes)]
        for text in texts:
            self._asked.put(text)
        return Told(texts, heard)

    def _work(self) -> None:
        batch, waiting = self._new_batch(), deque[_Text]()
        running: dict[int, _Text] = {}
        while self._take(waiting, wait=not running and not waiting):
            for number in [number for number, text in running.items() if text.gone]:
                batch.remove(number)
                del running[number]
            while waiting and len(running) < self._together:
                text = waiting.popleft()
                if not text.gone:
                    try:
                        running[batch.add(text.wish.ids, text.wish.sampling, allowed=text.wish.allowed)] = text
                    except Exception as error:  # this one is wrong, the others are not
                        self._say([(text, error)])
            self.running, self.waiting = len(running), len(waiting)
            if not running:
                continue
            said: list[tuple[_Text, Made | Exception]]
            try:
                made = batch.step()
                said = [(running.pop(one.number) if one.ended else running[one.number], one) for one in made]
                self.made += len(made)
            except Exception as error:  # it is not known whose fault it was: all who shared the step hear of it, and others go on
                traceback.print_exc()
                said = [(text, error) for text in running.values()]
                batch, running = self._new_batch(), {}
            self.running = len(running)
            self._say(said)

    def _take(self, waiting: deque[_Text], *, wait: bool) -> bool:
        """What was handed in since the last step.  returns: False where no more is to be done"""
        while wait or not self._asked.empty():
            text = self._asked.get()
            if text is None:
                return False
            waiting.append(text)
            wait = False
        return True

    def _say(self, said: Sequence[tuple[_Text, Made | Exception]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(_deliver, said)


def _deliver(said: Sequence[tuple[_Text, Made | Exception]]) -> None:
    for text, made in said:
        text.told.put_nowait((text.place, made))
