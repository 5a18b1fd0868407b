"""What was opened in, an ASGI app out: the routes. What may come in at all is the gate's affair.

One of the two files that need the extra packages of `serve`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from fromzero.models.together import Batch
from fromzero.use.serve.asked import Chat, Completion, Embedding, check, read_json
from fromzero.use.serve.decoding import Decoding
from fromzero.use.serve.gate import Gate, Receive, Scope, Send
from fromzero.use.serve.limits import Limits
from fromzero.use.serve.metrics import TYPE, Metrics
from fromzero.use.serve.opened import Opened
from fromzero.use.serve.predicting import Embedder, Predictor
from fromzero.use.serve.refusal import Refused
from fromzero.use.serve.speaking import begin, wishes_of
from fromzero.use.speak import Speaker

PAGE = Path(__file__).with_name("page.html")
# The page's script stands in it, and it may speak with this server alone
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:; connect-src 'self'; form-action 'none'"
WORKERS = 2  # threads for templates, predictions and embeddings
Found = TypeVar("Found")


class Events:
    """An ASGI response of server-sent events. It begins with the first one, so that until then an error is an error."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async with aclosing(self.events) as events:
            async for event in events:
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
                await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


class Routes:
    """The answers to each route, for what was opened."""

    def __init__(self, opened: Opened, limits: Limits) -> None:
        self.opened, self.metrics = opened, Metrics()
        self.decoding: Decoding | None = None
        if isinstance(speaker := opened.does, Speaker):
            self.decoding = Decoding(lambda: Batch(speaker.model, speaker.stops), limits.together)
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="serve")

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        if self.decoding is not None:
            self.decoding.start()
        yield
        if self.decoding is not None:
            self.decoding.stop()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def table(self) -> dict[str, tuple[str, Callable[[Request], Any]]]:
        always: dict[str, tuple[str, Callable[[Request], Any]]] = {
            "/": ("GET", self.page),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.measured),
            "/v1/models": ("GET", self.models),
        }
        if isinstance(self.opened.does, Speaker):
            return {**always, "/v1/chat/completions": ("POST", self.chat), "/v1/completions": ("POST", self.complete)}
        if isinstance(self.opened.does, Predictor):
            return {**always, "/v1/predict": ("POST", self.predict)}
        return {**always, "/v1/embeddings": ("POST", self.embed)}

    async def page(self, request: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers={"content-security-policy": _POLICY})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def measured(self, request: Request) -> Response:
        work = self.decoding
        now = {} if work is None else {"running": work.running, "waiting": work.waiting, "decoded": work.made}
        return Response(self.metrics.page(now), media_type=TYPE)

    async def models(self, request: Request) -> Response:
        one = {"id": self.opened.name, "object": "model", "created": 0, "owned_by": "fromzero", "task": self.opened.task}
        return JSONResponse({"object": "list", "data": [one]})

    async def chat(self, request: Request) -> Any:
        return await self._speak(request, Chat)

    async def complete(self, request: Request) -> Any:
        return await self._speak(request, Completion)

    async def _speak(self, request: Request, kind: type[Chat] | type[Completion]) -> Any:
        speaker, decoding = self.opened.does, self.decoding
        assert isinstance(speaker, Speaker) and decoding is not None
        asked: Chat | Completion = check(kind, await _json(request))
        self._check_name(asked.model)
        wishes = await self._apart(lambda: wishes_of(speaker, asked))
        answer = begin(speaker, decoding, asked, wishes, self.metrics)
        return Events(answer.events()) if asked.stream else JSONResponse(await answer.whole())

    async def predict(self, request: Request) -> Response:
        predictor, kind, body = self.opened.does, _type(request), await request.body()
        assert isinstance(predictor, Predictor)
        return JSONResponse({"model": self.opened.name, **await self._apart(lambda: predictor.answer(kind, body))})

    async def embed(self, request: Request) -> Response:
        embedder, asked = self.opened.does, check(Embedding, await _json(request))
        assert isinstance(embedder, Embedder)
        self._check_name(asked.model)
        return JSONResponse(await self._apart(lambda: embedder.answer(asked)))

    def _check_name(self, name: str) -> None:
        if name != self.opened.name:
            what = f"no model is called {name[:60]!r} here"
            raise Refused(404, what, mend=f"the one that is served is {self.opened.name!r}", param="model", name="model_not_found")

    async def _apart(self, work: Callable[[], Found]) -> Found:
        """In a thread of its own, so that the other requests go on."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)


def make_app(opened: Opened, limits: Limits, keys: tuple[bytes, ...] = ()) -> Gate:
    """keys: those that open every route but /health; none: no key is asked for, and only names of this machine are answered"""
    routes = Routes(opened, limits)
    table = routes.table()
    made = Router(
        [Route(path, answer, methods=[method]) for path, (method, answer) in table.items()],
        redirect_slashes=False,
        lifespan=routes.lifespan,
    )
    return Gate(made, limits, keys, routes.metrics, {path: method for path, (method, _) in table.items()})


def _type(request: Request) -> str:
    return str(request.headers.get("content-type", "")).partition(";")[0].strip().lower()


async def _json(request: Request) -> Any:
    """raises: Refused for another type too: a page elsewhere may send those without being asked whether it may"""
    if _type(request) != "application/json":
        raise Refused(415, "the body is not declared as JSON", mend="send Content-Type: application/json")
    return read_json(await request.body())
