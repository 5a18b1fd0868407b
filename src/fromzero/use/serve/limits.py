"""What a request, a connection and the whole server may take. Each number stands here once; docs/serve.md has them as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server is started with.

    body:            bytes of a request's body; 413 beyond
    header_seconds:  for the head of a request to arrive; 408 then
    body_seconds:    for its body to arrive; 408 then
    answer_seconds:  for its answer, waiting for a turn included; 408 then, and a stream is cut off
    drain_seconds:   that open answers may still take after SIGTERM
    connections:     open at a time; 503 beyond
    requests:        being read, waiting or answered at a time; 429 beyond
    together:        texts that share a decoding step; the others wait for their turn
    """

    body: int = 8 * 2**20
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    drain_seconds: float = 30.0
    connections: int = 256
    requests: int = 128
    together: int = 32


RETRY_SECONDS = 1  # what a client is told to wait where there is no place
DISCARD_SECONDS = 2.0  # for which a body that is refused is still taken in, so that its sender comes to read why
MOST_TOKENS = 8192  # of one answer
MOST_MESSAGES = 1024
MOST_TOOLS = 64
MOST_TEXTS = 8  # that one request asks for: its prompts times n
MOST_STOPS = 4  # stop strings
LONGEST_STOP = 256  # characters
MOST_LIKELIEST = 20  # tokens told beside each token
MOST_INPUTS = 256  # texts of one request for embeddings
MOST_ROWS = 10_000  # of one request for predictions
SHORTEST_KEY = 16  # characters
