"""What is counted, for Prometheus: in a registry of the application's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .backend import Backend, Piece

__all__ = ["Metrics", "Watch"]

WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Backends(Collector):
    """What a backend counts, read when it is asked for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("tokenry_up", "whether texts can be written", float(self.backend.broken is None))
        for name, value in self.backend.numbers().items():
            yield GaugeMetricFamily(f"tokenry_{name}", f"{name.replace('_', ' ')} of the backend", value)


class Metrics:
    """The counters of one application."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Backends(backend))
        where: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tokenry_requests", "requests answered", ["route", "status"], **where)
        self.prompt = Counter("tokenry_prompt_tokens", "tokens of prompts", **where)
        self.written = Counter("tokenry_completion_tokens", "tokens written", **where)
        self.first = Histogram(
            "tokenry_time_to_first_token_seconds", "from request to first token", buckets=WAITS, **where
        )
        self.between = Histogram("tokenry_inter_token_seconds", "between tokens of a text", buckets=STEPS, **where)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class Watch:
    """Times the tokens of one text."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.last, self.begun = metrics, time.monotonic(), False

    def saw(self, piece: Piece) -> None:
        """A piece has come."""
        if not piece.ids:
            return
        now = time.monotonic()
        if self.begun:
            for _ in piece.ids:  # they came together: each took its share
                self.metrics.between.observe((now - self.last) / len(piece.ids))
        else:
            self.metrics.first.observe(now - self.last)
        self.metrics.written.inc(len(piece.ids))
        self.last, self.begun = now, True
