"""Every request in, those let through with their whole body out to the app: host, key, size, time and number. Knows no route's meaning.

It is ASGI and nothing more. What the client sends is read here and nowhere else, and an answer ends here when its client leaves.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import json
import re
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

from fromzero.use.serve.limits import DISCARD_SECONDS, RETRY_SECONDS, Limits
from fromzero.use.serve.metrics import Metrics
from fromzero.use.serve.refusal import Refused, as_json, status_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
Given = TypeVar("Given")

OPEN = "/health"  # the one route without a key
_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Left(Exception):
    """The client is gone."""


class Gate:
    """keys: any of them opens; none at all: whoever reaches the loopback address may ask, under a name of this machine alone

    routes:  the paths that there are, and the method of each
    """

    def __init__(self, app: App, limits: Limits, keys: tuple[bytes, ...], metrics: Metrics, routes: Mapping[str, str]) -> None:
        self.app, self.limits, self.keys, self.metrics, self.routes = app, limits, keys, metrics, routes
        self.requests = 0  # being read, waiting or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, whole = time.monotonic(), 0, False

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_SAFE]}
            await send(message)

        async def heard() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)
            return message

        try:
            await self._let_through(scope, heard, noted)
        except Left:
            self.metrics.left += 1
        except Exception as error:
            if status:  # half an answer was sent; the connection ends, which is all that can still be said
                if not isinstance(error, Refused):
                    traceback.print_exc()
                raise Cut from None
            if not whole:
                await _discard(scope, heard)
            await _refuse(noted, error, end=not whole)
        finally:
            path = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.note(path, status, time.monotonic() - began)

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] != OPEN:
            self._check_sender(headers)
        method = self.routes.get(scope["path"])
        if method is None or scope["method"] not in (method, "HEAD" if method == "GET" else ""):
            what = f"{scope['method'][:20]} {scope['path'][:80]} is not answered by this model"
            raise Refused(405 if method else 404, what, mend=f"there are {', '.join(f'{how} {path}' for path, how in self.routes.items())}")
        if method != "POST":
            await self.app(scope, receive, send)
            return
        if self.requests >= self.limits.requests:
            raise Refused(429, f"{self.requests} requests are being answered", mend="try again a little later", name="queue_full")
        self.requests += 1
        try:
            body = await self._body(headers, receive)
            try:
                async with asyncio.timeout(self.limits.answer_seconds):
                    await _unless_left(receive, self.app(scope, _replayed(body), send))
            except TimeoutError:
                raise Refused(408, f"the answer took more than {self.limits.answer_seconds:g} s", mend="ask for fewer tokens") from None
        finally:
            self.requests -= 1

    def _check_sender(self, headers: Mapping[str, str]) -> None:
        if not self.keys:
            if not _is_here(headers.get("host", "")):  # a page elsewhere, under a name that was made to lead here
                mend = "ask for localhost, or start with --key-file"
                raise Refused(403, "without keys only names of this machine are answered", mend=mend, name="host")
            return
        given = _key_of(headers.get("authorization", ""))
        right = [hmac.compare_digest(given, key) for key in self.keys]  # all of them: time tells nothing
        if not any(right):
            raise Refused(401, "no key that is known here came along", mend="send Authorization: Bearer KEY", name="invalid_api_key")

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        most, parts, size = self.limits.body, list[bytes](), 0
        too_large = Refused(413, f"the body has more than {most} bytes", mend="send less at a time")
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None


class Cut(Exception):
    """An answer ends in its middle."""


def _is_here(host: str) -> bool:
    name = re.sub(r":\d+$", "", host)
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"


def _key_of(authorization: str) -> bytes:
    """Bearer KEY, or Basic with the key as password, which browsers send by themselves."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return value.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _replayed(body: bytes) -> Receive:
    """What the app may receive: the body, and then nothing. That the client leaves is heard here."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[return-value]

    return receive


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, Given]) -> Given:
    """The work, which is cancelled and seen to its end when the client leaves first.  raises: Left then"""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Left
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _discard(scope: Scope, receive: Receive) -> None:
    """Take in what a refused client still sends, for a little while: a connection closed over unread bytes takes the answer along."""
    if any(name.lower() == b"expect" for name, _ in scope["headers"]):
        return  # it waits to be told whether to send at all
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass


async def _refuse(send: Send, error: Exception, *, end: bool) -> None:
    """end: of the connection, where something of the request is still to come"""
    status = status_of(error)
    if status == 500:
        traceback.print_exception(error, file=sys.stderr)
    body = json.dumps(as_json(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if end:
        headers.append((b"connection", b"close"))
    if status in (429, 503):
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    if status == 401:
        headers += [(b"www-authenticate", b'Basic realm="fromzero"'), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
