# SPDX-License-Identifier: Apache-2.0
"""`Metrics`: what Prometheus is told of requests, batches and the bank. No label grows with the number of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..bank.bank import MaskBank
from .batching import BatchFacts

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, bank: MaskBank) -> None:
        """Count for a bank."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "smn_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "smn_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self._batch = Histogram("smn_batch_samples", "Samples per forward", buckets=_SIZES, registry=self.registry)
        self._tasks = Histogram("smn_batch_tasks", "Tasks per forward", buckets=_SIZES, registry=self.registry)
        self._ran = Histogram("smn_batch_seconds", "Time per forward", buckets=_SECONDS, registry=self.registry)
        self.registry.register(_BankCollector(bank))
        ProcessCollector(registry=self.registry)

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when it is read."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, facts: BatchFacts) -> None:
        """One batch was run."""
        self._batch.observe(facts.samples)
        self._tasks.observe(facts.tasks)
        self._ran.observe(facts.seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _BankCollector(Collector):
    """The bank's own counters, read when they are asked for."""

    def __init__(self, bank: MaskBank) -> None:
        self._bank = bank

    def collect(self) -> Iterator[Metric]:
        stats = self._bank.stats
        yield GaugeMetricFamily("smn_bank_tasks", "Tasks in the bank", value=len(self._bank))
        yield GaugeMetricFamily("smn_bank_resident_bytes", "Bytes of decoded tasks", value=stats.resident_bytes)
        yield GaugeMetricFamily("smn_bank_resident_tasks", "Decoded tasks", value=stats.resident)
        yield CounterMetricFamily("smn_bank_hits", "Lookups of decoded tasks", value=stats.hits)
        yield CounterMetricFamily("smn_bank_misses", "Lookups that had to decode", value=stats.misses)
        yield CounterMetricFamily("smn_bank_evictions", "Decoded tasks that made room", value=stats.evictions)
        yield CounterMetricFamily("smn_bank_switches", "Rewrites of the model's weights", value=stats.switches)
