"""The metrics of TensorFlow Serving's Prometheus page, computed from our own when it is read.

Reference: the counters and samplers in tensorflow_serving/servables/tensorflow/util.cc and
tensorflow_serving/batching/batching_session.cc. Times are microseconds there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.samples import Sample

# 10 µs, and 1.8 times more in each of 33 buckets: about 20 minutes.
BUCKETS_SECONDS = tuple(10e-6 * 1.8**power for power in range(33))

_MICROSECONDS = 1e6
_BATCHING = "batching_session:"
_Labels = dict[str, str]


def view(
    *,
    requests: Sequence[Sample],
    seconds: Sequence[Sample],
    stages: Sequence[Sample],
    batch_rows: Sequence[Sample],
) -> str:
    """The text of TensorFlow Serving's metrics, from the samples of our own."""
    runs = [one for one in stages if one.labels["stage"] == "run"]
    waits = [one for one in stages if one.labels["stage"] == "queue"]
    parts = (
        _counter("request_count", requests, "_total", _of_model),
        _histogram("request_latency", seconds, _of_request),
        _histogram("runtime_latency", runs, _of_runtime),
        _histogram(f"{_BATCHING}queuing_latency", waits, _of_threads),
        _histogram(f"{_BATCHING}processed_batch_size", batch_rows, lambda _: {}, unit=1.0),
        _counter(f"{_BATCHING}wrapped_run_count", runs, "_count", lambda _: {}),
    )
    return "".join(line + "\n" for part in parts for line in part)


def _of_model(labels: _Labels) -> _Labels:
    return {"model_name": labels["model"], "status": labels["status"]}


def _of_request(labels: _Labels) -> _Labels:
    return {
        "model_name": labels["model"],
        "API": labels["api"],
        "entrypoint": labels["entrypoint"],
    }


def _of_runtime(labels: _Labels) -> _Labels:
    return {"model_name": labels["model"], "API": labels["api"], "runtime": "TF2"}


def _of_threads(_: _Labels) -> _Labels:
    return {"thread_pool_name": "twotower_batch_threads"}


def _counter(
    name: str, samples: Iterable[Sample], ending: str, relabel: Callable[[_Labels], _Labels]
) -> Iterator[str]:
    counts: dict[str, float] = defaultdict(float)
    for sample in samples:
        if sample.name.endswith(ending):
            counts[_shown(relabel(sample.labels))] += sample.value
    yield f"# TYPE :tensorflow:serving:{name} counter"
    for labels, count in counts.items():
        yield f":tensorflow:serving:{name}{labels} {count:.0f}"


def _histogram(
    name: str,
    samples: Iterable[Sample],
    relabel: Callable[[_Labels], _Labels],
    unit: float = _MICROSECONDS,
) -> Iterator[str]:
    values: dict[tuple[str, str], float] = defaultdict(float)
    for sample in samples:
        part, labels = sample.name.rsplit("_", 1)[1], relabel(sample.labels)
        if part == "bucket":
            bound = float(sample.labels["le"]) * unit
            labels["le"] = "+Inf" if math.isinf(bound) else f"{bound:.6g}"
        if part != "created":
            values[part, _shown(labels)] += sample.value * (unit if part == "sum" else 1.0)
    yield f"# TYPE :tensorflow:serving:{name} histogram"
    for (part, shown), value in values.items():
        yield f":tensorflow:serving:{name}_{part}{shown} {value:.15g}"


def _shown(labels: _Labels) -> str:
    escaped = (
        '{}="{}"'.format(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for name, value in labels.items()
    )
    return "{" + ",".join(escaped) + "}" if labels else ""
