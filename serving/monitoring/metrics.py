"""Metrics of the service: its own names, and those of TensorFlow Serving as a view of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.errors import ServiceError
from serving.monitoring.logs import REQUESTS, event
from serving.monitoring.tf_serving import BUCKETS_SECONDS, view
from serving.version.status import VersionStatus

OK = "OK"

_ROWS = tuple(2.0**power for power in range(13))
_log = logging.getLogger(REQUESTS)


class Metrics:
    """Counts and times; every method may be called by any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "twotower_requests", "Requests answered, by what was told.", "model", "api", "status"
        )
        self._seconds = self._histogram(
            "twotower_request_seconds", "Time of good requests.", "model", "api", "entrypoint"
        )
        self._stages = self._histogram(
            "twotower_stage_seconds",
            "Time of the stages of a request: decode, queue, run, encode.",
            *("model", "api", "stage"),
        )
        self._batch_rows = self._histogram(
            "twotower_batch_rows", "Rows that ran together.", "model", "api", buckets=_ROWS
        )
        self._refusals = self._counter(
            "twotower_refusals", "Requests refused, by reason.", "entrypoint", "reason"
        )
        self._changes = self._counter(
            "twotower_version_changes", "Versions loaded, failed, unloaded.", "model", "change"
        )
        self._load_seconds = self._histogram(
            "twotower_version_load_seconds", "Time to load and warm up a version.", "model"
        )
        self.watched = _Watched()
        self._registry.register(self.watched)

    def stage(self, name: str, seconds: float, model: str = "", api: str = "") -> None:
        """Adds to the latency of a stage: "decode" and "encode" are measured by the APIs."""
        self._stages.labels(model, api, name).observe(seconds)

    def answered(self, model: str, api: str, entrypoint: str, seconds: float) -> None:
        """Counts a good request."""
        self._requests.labels(model, api, OK).inc()
        self._seconds.labels(model, api, entrypoint).observe(seconds)

    def refused(
        self,
        error: ServiceError,
        entrypoint: str,
        model: str = "",
        api: str = "",
        request_id: str = "",
    ) -> None:
        """Counts and logs a request that was refused; the APIs call it for what they refuse.

        Args:
          error: what the client was told.
          entrypoint: "REST" or "GRPC".
          model, api: as far as they are known and exist; clients must not make up labels.
          request_id: for the log.
        """
        self._requests.labels(model, api, error.grpc).inc()
        self._refusals.labels(entrypoint, error.reason or error.grpc.lower()).inc()
        fields = {"model": model, "api": api, "entrypoint": entrypoint, "status": error.grpc}
        event(_log, logging.WARNING, str(error), request_id=request_id, **fields)

    def cancelled(self, model: str, api: str) -> None:
        """Counts a request whose client went away."""
        self._requests.labels(model, api, "CANCELLED").inc()

    def batch(
        self, model: str, api: str, waits: Sequence[float], rows: int, seconds: float
    ) -> None:
        """Counts a batch: the seconds that each request waited, its rows, its seconds."""
        queue = self._stages.labels(model, api, "queue")
        for wait in waits:
            queue.observe(wait)
        self._stages.labels(model, api, "run").observe(seconds)
        self._batch_rows.labels(model, api).observe(rows)

    def changed(self, model: str, change: str, seconds: float) -> None:
        """Counts what became of a version: "loaded", "failed", "unloaded", "waiting", "pruned"."""
        self._changes.labels(model, change).inc()
        if change == "loaded":
            self._load_seconds.labels(model).observe(seconds)

    def exposition(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        tf_serving = view(
            requests=_samples(self._requests),
            seconds=_samples(self._seconds),
            stages=_samples(self._stages),
            batch_rows=_samples(self._batch_rows),
        )
        return generate_latest(_Plain(self._registry)) + tf_serving.encode()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: Sequence[float] = BUCKETS_SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)


class _Watched(Collector):
    """What is read when it is asked for: depth of the queue, state of the versions."""

    queue_depth: Callable[[], int] = staticmethod(lambda: 0)
    statuses: Callable[[], Mapping[str, Sequence[VersionStatus]]] = staticmethod(dict)
    ready: Callable[[], bool] = staticmethod(lambda: False)

    def collect(self) -> Iterator[Metric]:
        """The three gauges."""
        depth = GaugeMetricFamily("twotower_queue_depth", "Rows that wait to be run.")
        depth.add_metric([], self.queue_depth())
        yield depth
        state = GaugeMetricFamily(
            "twotower_version_state",
            "State of a version: 10 start, 20 loading, 30 available, 40 unloading, 50 end.",
            labels=["model", "version"],
        )
        for model, statuses in self.statuses().items():
            for status in statuses:
                state.add_metric([model, str(status.version)], status.state)
        yield state
        ready = GaugeMetricFamily("twotower_ready", "1 where the service is ready.")
        ready.add_metric([], self.ready())
        yield ready


class _Plain(Collector):
    """A registry without the times at which its counters were made."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric


def _samples(metric: Counter | Histogram) -> list:
    return [sample for family in metric.collect() for sample in family.samples]
