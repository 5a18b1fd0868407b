"""Requests and tokens counted in, a page in Prometheus' text format out. Knows no HTTP.

source: prometheus.io/docs/instrumenting/exposition_formats, text format 0.0.4
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """requests: by path and status; seconds: of answers, by path; tokens: by kind (prompt or completion); left: clients that did not wait"""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.left = 0

    def note(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] += 1
        self.seconds[path] += seconds  # type: ignore[assignment]

    def page(self, now: Mapping[str, int]) -> str:
        """now: what is measured at this moment, by name"""
        answers: Counter[str] = Counter()
        for (path, _), count in self.requests.items():
            answers[path] += count
        families: list[tuple[str, str, Iterable[tuple[str, float]]]] = [
            ("requests_total", "counter", [(f'{{path="{p}",status="{s}"}}', n) for (p, s), n in sorted(self.requests.items())]),
            ("clients_left_total", "counter", [("", self.left)]),
            ("tokens_total", "counter", [(f'{{kind="{kind}"}}', count) for kind, count in sorted(self.tokens.items())]),
            *((name, "gauge", [("", value)]) for name, value in now.items()),
        ]
        lines = []
        for name, kind, values in families:
            lines += [f"# TYPE fromzero_{name} {kind}", *(f"fromzero_{name}{labels} {value}" for labels, value in values)]
        lines.append("# TYPE fromzero_request_seconds summary")
        for path, total in sorted(self.seconds.items()):
            lines += [
                f'fromzero_request_seconds_sum{{path="{path}"}} {total:.6f}',
                f'fromzero_request_seconds_count{{path="{path}"}} {answers[path]}',
            ]
        return "\n".join(lines) + "\n"
