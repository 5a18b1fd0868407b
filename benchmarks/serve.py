"""A server and many clients in; how many streams were lost, and how memory grew, out.

    python benchmarks/serve.py [--streams 100] [--requests 1000] [--output results/serve.json]

A random chat model (no download) is served by `fromzero serve`: 100 streams at once must all come to their end, and after 1,000 requests
memory must be what it was after the first 200. The exit code is 1 where either is not so. The model is tiny, so that the figures are the
server's own: what a real model adds is what its steps take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.use.serving import Server, random_talker

TOKENS = 64
GROWTH = 0.05  # of memory, that may be the allocator's


def stream(server: Server, number: int) -> tuple[float, float, int]:
    """(seconds to the first token, to the last, tokens); raises where the stream does not come to its end"""
    import http.client

    began, first = time.perf_counter(), 0.0
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    value = {"model": "tiny", "messages": [{"role": "user", "content": f"stream {number}"}], "max_tokens": TOKENS, "temperature": 0}
    value |= {"stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/chat/completions", json.dumps(value), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    lines = []
    for line in answer:
        first = first or time.perf_counter() - began
        lines += [line.decode().strip()] * bool(line.strip())
    connection.close()
    assert lines[-1] == "data: [DONE]", lines[-1:]
    return first, time.perf_counter() - began, json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"]


def together(server: Server, count: int) -> tuple[list[tuple[float, float, int]], int]:
    """All begin at the same moment.  returns: those that came to their end, and how many did not"""
    barrier = threading.Barrier(count)

    def one(number: int) -> tuple[float, float, int] | None:
        barrier.wait()
        try:
            return stream(server, number)
        except (AssertionError, OSError, ValueError):
            return None

    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(one, range(count)))
    return [each for each in found if each is not None], sum(each is None for each in found)


def spread(seconds: list[float]) -> dict[str, float]:
    return (
        {"median": round(median(seconds), 3), "p95": round(quantiles(seconds, n=20, method="inclusive")[-1], 3)} if len(seconds) > 1 else {}
    )


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--streams", type=int, default=100)
    given.add_argument("--requests", type=int, default=1000, help="memory is looked at after a fifth of them, and at the end")
    given.add_argument("--output", type=Path)
    asked = given.parse_args()
    early = asked.requests // 5
    with tempfile.TemporaryDirectory() as folder, Server.typed(str(random_talker(Path(folder) / "tiny")), cwd=Path(folder)) as server:
        stream(server, 0)
        began = time.perf_counter()
        done, lost = together(server, asked.streams)
        seconds = time.perf_counter() - began
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: stream(server, number), range(early)))
            before, threads_before = server.memory()
            list(threads.map(lambda number: stream(server, number), range(early, asked.requests)))
        after, threads_after = server.memory()
        code = server.stop()
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "streams": asked.streams,
        "lost": lost,
        "seconds_to_first_token": spread([first for first, _, _ in done]),
        "seconds_to_last_token": spread([last for _, last, _ in done]),
        "tokens_per_second": round(sum(tokens for _, _, tokens in done) / seconds, 1),
        "megabytes": {f"after {early} requests": round(before, 1), f"after {asked.requests} requests": round(after, 1)},
        "threads": [threads_before, threads_after],
        "exit_code": code,
    }
    print(json.dumps(found, indent=1))
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=1) + "\n")
    if lost or after > before * (1 + GROWTH) or threads_after > threads_before or code != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
