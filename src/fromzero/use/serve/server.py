"""A model and an address in, answers over HTTP out, until a signal; open answers are finished first.

One of the two files that need the extra packages of `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fromzero.errors import UserError
from fromzero.use.serve.app import make_app
from fromzero.use.serve.limits import RETRY_SECONDS, SHORTEST_KEY, Limits
from fromzero.use.serve.opened import open_model
from fromzero.use.serve.refusal import Refused, as_json


def serve_model(
    source: str,
    runs: Path,
    *,
    host: str,
    port: int,
    key_file: Path | None,
    limits: Limits,
    say: Callable[[str], None],
    quantize: str | None = None,
) -> dict[str, Any]:
    """Serve until SIGTERM or Ctrl-C; a second signal ends at once.

    port:     0: any that is free
    key_file: a key a line; needed where others than this machine reach the address
    quantize: int8 or int4
    say:      hears one line when requests are answered, and one when no more are taken
    returns:  model, address and how many requests there were
    raises:   UserError for an address that may not or cannot be had, or keys that are none; as open_model
    """
    keys = read_keys(key_file) if key_file is not None else ()
    taken = bind(host, port, keys=bool(keys))
    with taken:
        opened, cost = open_model(source, runs, quantize)
        if cost is not None:
            say(str(cost))
        app = make_app(opened, limits, keys)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{taken.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=_bounded(limits),
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # a log of requests would hold what they ask; metrics count them
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(limits.drain_seconds),
        )
        server = _Server(config, lambda: say(f"serving {opened.name} ({opened.task}) at {address}"), say)
        asyncio.run(server.serve(sockets=[taken]))
    return {"model": opened.name, "address": address, "requests": sum(app.metrics.requests.values())}


def read_keys(path: Path) -> tuple[bytes, ...]:
    """A key a line; empty lines and those that begin with # are left out.  raises: UserError, which shows no key"""
    mend = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as a file of keys ({type(error).__name__})"
        raise UserError(what, mend=f"a key a line, in ASCII; {mend}", file=str(path)) from None
    keys = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not keys:
        raise UserError("holds no key", mend=mend, file=str(path))
    for number, key in keys:
        if len(key) < SHORTEST_KEY or " " in key:
            what = f"its key is shorter than {SHORTEST_KEY} characters, or has a space in it"
            raise UserError(what, why="it could be guessed", mend=mend, file=str(path), line=number)
    return tuple(key.encode() for _, key in keys)


def bind(host: str, port: int, *, keys: bool) -> socket.socket:
    """raises: UserError for an address that is not of this machine's, is taken, or is open to others while there are no keys"""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not keys and not all(ipaddress.ip_address(one[4][0]).is_loopback for one in found):
            why = "whoever reaches it could use the model, and read what others are answered"
            raise UserError(f"--host {host} is reached by others", why=why, mend="give --key-file, or leave --host out")
        with contextlib.ExitStack() as failing:
            made = failing.enter_context(socket.socket(found[0][0], socket.SOCK_STREAM))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(found[0][4])
            made.listen()
            failing.pop_all()
    except OSError as error:
        raise UserError(f"{host}, port {port}: {error.strerror or error}", mend="choose another --host or --port") from None
    return made


class _Server(uvicorn.Server):
    """uvicorn's, but: it says where it listens, ends with 0 after SIGTERM, and at once after a second signal."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None], say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._started, self._say = started, say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self.should_exit:
            sys.stderr.flush()
            os._exit(128 + number)
        self.should_exit = True
        self._say("no more requests are taken; open ones are finished; a second signal ends at once")


def _bounded(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol with what it has no limit for: how many connections, and how long the head of a request may take."""

    class Bounded(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._end(Refused(503, f"{limits.connections} connections are open", mend="try again a little later"))
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()

        def _watch(self) -> None:
            """The time for a head begins when one may come, and not anew with every byte."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._late is None:
                self._late = self.loop.call_later(limits.header_seconds, self._too_late)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _too_late(self) -> None:
            self._end(Refused(408, f"no whole request came within {limits.header_seconds:g} s"))

        def _end(self, error: Refused) -> None:
            if not self.transport.is_closing():
                body = json.dumps(as_json(error)).encode()
                phrase = {408: "Request Timeout", 503: "Service Unavailable"}[error.status]
                lines = [f"HTTP/1.1 {error.status} {phrase}", "content-type: application/json", f"content-length: {len(body)}"]
                lines += [f"retry-after: {RETRY_SECONDS}"] * (error.status == 503) + ["connection: close", "", ""]
                self.transport.write("\r\n".join(lines).encode() + body)
                self.transport.close()

    return Bounded
