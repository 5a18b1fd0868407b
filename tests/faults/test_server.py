"""What the network does to a server: floods, slowness, clients that vanish, signals. It answers, with bounds, and is well afterwards.

Every server listens on a free loopback port, in a process of its own that ends with its test.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.use.serving import HI, Server, random_talker

KEY = "sk-0123456789abcdefg"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_talker(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with Server(tiny, header_seconds=1.5, body_seconds=1.5, connections=40, requests=6, together=4, drain_seconds=20) as made:
        yield made


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI, "temperature": 0, **more}


def sent(port: int, text: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    made.sendall(text)
    return made


def head(length: int, path: str = "/v1/chat/completions", more: str = "") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {length}"]
    return ("\r\n".join(lines) + f"\r\n{more}\r\n").encode()


def heard(made: socket.socket, *, until: bytes = b"") -> bytes:
    """All that comes until the other side closes, or until some bytes were among it"""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while (part := made.recv(65536)) and not (until and until in said + part):
            said += part
    return said + (part or b"")


def streaming(server: Server, most: int = 4000) -> socket.socket:
    body = json.dumps({"model": "tiny", "prompt": "hi", "temperature": 0, "stream": True, "max_tokens": most}).encode()
    return sent(server.port, head(len(body), "/v1/completions") + body)


def settles(server: Server, name: str, value: float, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while (now := server.measure(name)) != value:
        assert time.monotonic() < until, f"{name} is {now}"
        time.sleep(0.05)


def test_a_body_of_100_megabytes_is_refused_whether_or_not_its_size_was_declared(server: Server) -> None:
    before, _ = server.memory()
    block = b"x" * 2**20
    for first, wrap in (
        (head(100 * 2**20), lambda part: part),
        (
            head(0, more="Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b""),
            lambda part: b"%x\r\n%s\r\n" % (len(part), part),
        ),
    ):
        with sent(server.port, first) as made:
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    made.sendall(wrap(block))
            answer = heard(made)
        assert b" 413 " in answer and b"the body has more than 8388608 bytes" in answer, answer[:200]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as plain:
        plain.request("POST", "/v1/completions", block * 24, {"Content-Type": "application/json"})
        assert plain.getresponse().status == 413, "a client that sends all before it reads comes to read why"
    with sent(server.port, head(100 * 2**20, more="Expect: 100-continue\r\n")) as made:
        began, answer = time.monotonic(), heard(made)
        assert answer.startswith(b"HTTP/1.1 413") and time.monotonic() - began < 1.5, "it is told not to send"
    assert server.memory()[0] - before < 60
    server.still_answers("tiny")


def test_a_head_or_a_body_that_comes_a_byte_at_a_time_ends_with_408(server: Server) -> None:
    for text, slow, said in (
        (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"no whole request came within 1.5 s"),
        (head(400), b"{" * 400, b"the body did not arrive within 1.5 s"),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"no whole request came"),
    ):
        with sent(server.port, text) as made:
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for byte in slow:
                    made.sendall(bytes([byte]))
                    time.sleep(0.25)
                    if time.monotonic() - began > 4.5:
                        break
            answer = heard(made)
            assert b" 408 " in answer and said in answer, answer
            assert time.monotonic() - began < 8
    server.still_answers("tiny")


def test_a_head_without_end_is_refused(server: Server) -> None:
    with sent(server.port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ") as made:
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                made.sendall(b"x" * 2**16)
        assert b" 200 " not in heard(made)
    server.still_answers("tiny")


def test_more_connections_than_there_is_room_for_are_told_so_and_the_rest_are_answered(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)) for _ in range(500)]
        said = [heard(one) for one in made[40:]]
        refused = [
            one for one in said if one.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in one and b"40 connections are open" in one
        ]
        assert len(refused) >= 450
        idle = [heard(one) for one in made[:40]]
        assert all(one.startswith(b"HTTP/1.1 408") for one in idle), "who opens a connection and says nothing loses it"
    server.still_answers("tiny")


def test_more_requests_than_are_taken_are_told_to_come_again(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            assert b"data: " in heard(stack.enter_context(streaming(server)), until=b"data: ")
        for _ in range(2):
            stack.enter_context(streaming(server))
        settles(server, "waiting", 2)
        assert server.measure("running") == 4, "the others wait for their turn"
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps(asked()), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        assert (answer.status, answer.getheader("retry-after"), error["type"]) == (429, "1", "rate_limit_error")
        assert "6 requests are being answered" in error["message"]
        connection.close()
        assert server.ask("GET", "/health")[0] == 200
    settles(server, "running", 0)
    server.still_answers("tiny")


def test_a_client_that_leaves_stops_its_text_within_a_token_or_two(server: Server) -> None:
    settles(server, "running", 0)
    for stream in (True, False):
        body, before = json.dumps(asked(stream=stream, max_tokens=8000)).encode(), server.measure("decoded")
        with sent(server.port, head(len(body)) + body) as made:
            if stream:
                heard(made, until=b"data: ")
            settles(server, "running", 1)
        settles(server, "running", 0, seconds=5)
        made_by_then = server.measure("decoded")
        time.sleep(0.5)
        assert server.measure("decoded") == made_by_then < before + 8000
    server.still_answers("tiny")


def test_after_200_broken_streams_memory_and_threads_are_what_they_were(server: Server) -> None:
    def broken(_: int) -> None:
        with streaming(server) as made:
            heard(made, until=b"data: ")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(broken, range(20)))  # what is loaded once is loaded
        settles(server, "running", 0)
        before, threads_before = server.memory()
        list(threads.map(broken, range(200)))
    settles(server, "running", 0)
    after, threads_after = server.memory()
    assert threads_after <= threads_before and after - before < 20, (before, after)
    server.still_answers("tiny")


def test_a_client_that_reads_nothing_is_cut_off_when_its_time_is_over(tiny: Path) -> None:
    with Server(tiny, answer_seconds=2.0) as server:
        with streaming(server, 8000) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            settles(server, "running", 1)
            settles(server, "running", 0, seconds=8)
            assert b"[DONE]" not in heard(made)
        status, body = server.ask("POST", "/v1/chat/completions", asked(max_tokens=8000))
        assert status == 408 and "the answer took more than 2 s; ask for fewer tokens" in body
        server.still_answers("tiny")
        assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_answers_end_takes_no_more_and_exits_with_0(tiny: Path, number: int) -> None:
    with Server(tiny) as server:
        with ThreadPoolExecutor(2) as threads, streaming(server, 600) as stream:
            heard(stream, until=b"data: ")
            value = {"model": "tiny", "prompt": "hi", "max_tokens": 500, "temperature": 0}
            whole = threads.submit(server.ask, "POST", "/v1/completions", value)
            settles(server, "running", 2)
            server.process.send_signal(number)
            said = heard(stream)
            assert said.rstrip().endswith(b"0") and b"data: [DONE]" in said, "the stream came to its own end"
            status, body = whole.result(30)
            assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 500
            with pytest.raises(OSError):
                server.ask("GET", "/health")
        assert server.process.wait(30) == 0
        assert "open ones are finished" in server.said() and "Traceback" not in server.said()
        assert json.loads(server.said().splitlines()[-1])["requests"] >= 2


def test_open_answers_get_no_more_than_their_time_after_a_signal(tiny: Path) -> None:
    with Server(tiny, drain_seconds=1) as server, streaming(server, 8000) as stream:
        heard(stream, until=b"data: ")
        began = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - began < 15
        assert b"[DONE]" not in heard(stream) and "Traceback" not in server.said()


def test_a_second_signal_ends_at_once(tiny: Path) -> None:
    with Server(tiny) as server, streaming(server, 8000) as stream:
        heard(stream, until=b"data: ")
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while "a second signal ends at once" not in server.said():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert server.stop() == 143


def test_keys_are_in_no_line_that_the_server_writes(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# of the team\n{KEY}\n")
    with Server(tiny, key_file=tmp_path / "keys") as server:
        told = {"Authorization": f"Bearer {KEY}"}
        assert server.ask("GET", "/v1/models")[0] == 401 and server.ask("GET", "/health")[0] == 200
        assert server.ask("GET", f"/v1/models?key={KEY}")[0] == 401
        assert server.ask("GET", "/v1/models", **told)[0] == 200
        assert server.ask("POST", "/v1/chat/completions", asked(max_tokens=2), **told)[0] == 200
        pages = [server.ask("GET", path, **told)[1] for path in ("/metrics", "/")]
        assert server.stop() == 0
        assert not any(KEY in text for text in (*pages, server.said()))


FIELDS: dict[str, Any] = {
    "n": {"type": "integer"},
    "max_tokens": {"type": "integer", "maximum": 3},
    "temperature": {"type": "number"},
    "top_p": {"type": "number"},
    "seed": {"type": "integer"},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
    "stream": {"type": "boolean"},
    "logprobs": {},
    "tools": {"type": "array", "items": {"type": "object"}},
    "response_format": {"type": "object", "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}},
}
MESSAGES = {"type": "array", "items": {"type": "object", "properties": {"role": {"enum": ["user", "system", "x"]}, "content": {}}}}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 40}
SAID = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "system", "assistant"]}, "content": TEXT},
    "required": ["role", "content"],
}
FINE: dict[str, Any] = {  # what is answered with 200
    "n": {"type": "integer", "minimum": 1, "maximum": 2},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0.01, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 1, "maximum": 500},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 10},
    "seed": {"type": "integer", "minimum": -9, "maximum": 2**40},
    "stop": {"type": "array", "maxItems": 4, "items": TEXT},
    "stream": {"type": "boolean"},
    "response_format": {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
}


def api(fields: dict[str, Any], models: list[str], **prompts: Any) -> dict[str, Any]:
    """prompts: what chat and plain completions are asked with"""

    def route(name: str) -> dict[str, Any]:
        properties = {"model": {"enum": models}, **fields, name: prompts[name]}
        body: dict[str, Any] = {"type": "object", "properties": properties, "required": ["model", "max_tokens", name]}
        for one in (body, *(part for part in (fields["response_format"], prompts[name].get("items", {})) if "required" in part)):
            one["additionalProperties"] = fields is not FINE
        content = {"application/json": {"schema": body}}
        return {"post": {"requestBody": {"required": True, "content": content}, "responses": {"200": {"description": "fine"}}}}

    paths = {"/v1/chat/completions": route("messages"), "/v1/completions": route("prompt")}
    return {"openapi": "3.1.0", "info": {"title": "served", "version": "1"}, "paths": paths}


PROMPT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}]}
WILD = api(FIELDS, ["tiny", "x"], messages=MESSAGES, prompt=PROMPT)
SOUND = api(FINE, ["tiny"], messages={"type": "array", "minItems": 1, "maxItems": 4, "items": SAID}, prompt=TEXT)


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_whatever_a_request_holds_the_answer_is_one_and_the_server_is_well_afterwards(server: Server, seconds: int) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="NOT CHECKED: requests are made up by schemathesis")
    import hypothesis

    settles(server, "running", 0)
    seen: dict[int, int] = {}

    def requests(pages: dict[str, Any], *modes: Any) -> Any:
        operations = [found.ok() for found in schemathesis.openapi.from_dict(pages).get_all_operations()]
        assert len(operations) == 2
        made = hypothesis.strategies.one_of(*(one.as_strategy(generation_mode=mode) for one in operations for mode in modes))

        @hypothesis.settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=made)
        def ask(case: Any) -> None:
            answer = case.call(base_url=server.address, timeout=30)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code in ((200,) if pages is SOUND else (200, 400, 404, 405, 413, 415)), (case.body, answer.text[:300])
            if answer.status_code != 200:
                assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"} and len(answer.text) < 2000

        return ask

    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    wild, sound = requests(WILD, positive, negative), requests(SOUND, positive)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:  # each time from another seed
        wild()
        sound()
    assert seen.get(400, 0) >= 20 and seen.get(200, 0) >= 20, seen
    assert "Traceback" not in server.said(), server.said()[-3000:]
    settles(server, "running", 0)
    server.still_answers("tiny")
