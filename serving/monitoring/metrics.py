"""Metrics of the service: its own names, and those of TensorFlow Serving as a view of them.

Reference: the counters and samplers in tensorflow_serving/servables/tensorflow/util.cc and
tensorflow_serving/batching/batching_session.cc. Times are microseconds there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serving.errors import ServiceError
from serving.monitoring.logs import REQUESTS, event
from serving.version.names import WORKERS_FOLDER, VersionStatus

OK = "OK"

# 10 µs, and 1.8 times more in each of 33 buckets: about 20 minutes.
_SECONDS = tuple(10e-6 * 1.8**power for power in range(33))
_ROWS = tuple(2.0**power for power in range(13))
_PREFIX = ":tensorflow:serving:"
_POOL = "twotower_batch_threads"
_OUR_LABELS = {"model_name": "model", "API": "api"}  # of TensorFlow Serving's
_log = logging.getLogger(REQUESTS)
prometheus_client.disable_created_metrics()  # the times at which counters were made


class Metrics:
    """Counts and times, of all workers together; every method may be called by any thread."""

    queue_depth: Callable[[], int] = staticmethod(lambda: 0)  # rows that wait, in this process

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self._registry)
        histogram = functools.partial(Histogram, registry=self._registry, buckets=_SECONDS)
        api = ("model", "api")
        self._requests = counter(
            "twotower_requests", "Requests answered, by what was told.", (*api, "status")
        )
        self._seconds = histogram(
            "twotower_request_seconds", "Time of good requests.", (*api, "entrypoint")
        )
        self._stages = histogram(
            "twotower_stage_seconds",
            "Time of the stages of a request: decode, queue, run, encode.",
            (*api, "stage"),
        )
        self._batch_rows = histogram(
            "twotower_batch_rows", "Rows that ran together.", api, buckets=_ROWS
        )
        self._refusals = counter(
            "twotower_refusals", "Requests refused, by reason.", ("entrypoint", "reason")
        )
        self._changes = counter(
            "twotower_version_changes", "Versions loaded, failed, unloaded.", ("model", "change")
        )
        self._load_seconds = histogram(
            "twotower_version_load_seconds", "Time to load and warm up a version.", ["model"]
        )
        self._depth = Gauge(
            "twotower_queue_depth",
            "Rows that wait to be run.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self.watched = _Watched()
        self._registry.register(self.watched)

    @contextlib.contextmanager
    def timed(self, name: str, model: str, api: str) -> Iterator[None]:
        """Adds the time of what is done inside to a stage, "decode" or "encode"."""
        start = time.perf_counter()
        yield
        self._stages.labels(model, api, name).observe(time.perf_counter() - start)

    def answered(self, model: str, api: str, entrypoint: str, seconds: float) -> None:
        self._requests.labels(model, api, OK).inc()
        self._seconds.labels(model, api, entrypoint).observe(seconds)

    def refused(
        self, error: ServiceError, entrypoint: str, model: str, api: str, request_id: str
    ) -> None:
        """Counts and logs a request that was refused.

        `model` and `api` are names that exist, or empty: clients must not make up labels.
        """
        self._requests.labels(model, api, error.grpc).inc()
        self._refusals.labels(entrypoint, error.reason or error.grpc.lower()).inc()
        fields = {"model": model, "api": api, "entrypoint": entrypoint, "status": error.grpc}
        event(_log, logging.WARNING, str(error), request_id=request_id, **fields)

    def cancelled(self, model: str, api: str) -> None:
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
        self._depth.set(self.queue_depth())

    def changed(self, model: str, change: str, seconds: float) -> None:
        """Counts what became of a version: "loaded", "failed", "unloaded", "waiting", "pruned"."""
        self._changes.labels(model, change).inc()
        if change == "loaded":
            self._load_seconds.labels(model).observe(seconds)

    def exposition(self) -> bytes:
        self._depth.set(self.queue_depth())
        registry = self._registry
        if WORKERS_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
            registry.register(self.watched)
        families = {family.name: family.samples for family in registry.collect()}

        def samples(name: str) -> list[Sample]:
            return families.get(f"twotower_{name}", [])

        stages = samples("stage_seconds")
        runs = [sample for sample in stages if sample.labels["stage"] == "run"]
        counts = [sample for sample in runs if sample.name.endswith("_count")]
        waits = [sample for sample in stages if sample.labels["stage"] == "queue"]
        lines = (
            *_counts("request_count", samples("requests"), "model_name", "status"),
            *_times(
                "request_latency", samples("request_seconds"), "model_name", "API", "entrypoint"
            ),
            *_times("runtime_latency", runs, "model_name", "API", runtime="TF2"),
            *_times("batching_session:queuing_latency", waits, thread_pool_name=_POOL),
            *_sizes("batching_session:processed_batch_size", samples("batch_rows")),
            *_counts("batching_session:wrapped_run_count", counts),
        )
        tf_serving = "".join(f"{line}\n" for line in lines)
        return generate_latest(registry) + tf_serving.encode()


class _Watched(Collector):
    """What is read when it is asked for: state of the versions."""

    statuses: Callable[[], Mapping[str, Sequence[VersionStatus]]] = staticmethod(dict)
    ready: Callable[[], bool] = staticmethod(lambda: False)

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "twotower_version_state",
            "State of a version: 10 start, 20 loading, 30 available, 40 unloading, 50 end.",
            labels=["model", "version"],
        )
        for model, statuses in self.statuses().items():
            for status in statuses:
                state.add_metric([model, str(status.version)], status.state)
        yield state
        yield GaugeMetricFamily("twotower_ready", "1 where the service is ready.", self.ready())


def _view(
    kind: str, name: str, samples: Sequence[Sample], *labels: str, unit: float = 1.0, **fixed: str
) -> Iterator[str]:
    """A metric of TensorFlow Serving: sums of ours over the labels that it does not have."""
    values: dict[tuple[str, str], float] = defaultdict(float)
    for sample in samples:
        part = sample.name.rsplit("_", 1)[1]
        chosen = {name: sample.labels[_OUR_LABELS.get(name, name)] for name in labels} | fixed
        if part == "bucket":
            bound = float(sample.labels["le"]) * unit
            chosen["le"] = "+Inf" if math.isinf(bound) else f"{bound:.6g}"
        ending = f"_{part}" if kind == "histogram" else ""
        values[ending, _text(chosen)] += sample.value * (unit if part == "sum" else 1.0)
    yield f"# TYPE {_PREFIX}{name} {kind}"
    for (ending, text), value in values.items():
        yield f"{_PREFIX}{name}{ending}{text} {value:.15g}"


_counts = functools.partial(_view, "counter")
_sizes = functools.partial(_view, "histogram")
_times = functools.partial(_sizes, unit=1e6)


def _text(labels: dict[str, str]) -> str:
    escaped = (
        '{}="{}"'.format(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for name, value in labels.items()
    )
    return "{" + ",".join(escaped) + "}" if labels else ""
