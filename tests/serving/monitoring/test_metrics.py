import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import InvalidRequest, NotFound, Overloaded
from serving.monitoring.metrics import Metrics
from serving.version.names import State, VersionStatus


def read(metrics):
    """{(name, labels as a sorted tuple): value} of the whole page."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics, name, **labels):
    return read(metrics)[name, tuple(sorted(labels.items()))]


@pytest.fixture
def metrics():
    metrics = Metrics()
    metrics.answered("shop", "predict", "GRPC", 0.000_015)
    metrics.answered("shop", "predict", "REST", 0.003)
    metrics.answered("shop", "retrieve", "REST", 0.003)
    metrics.refused(InvalidRequest("no"), "REST", "shop", "predict", "r1")
    metrics.refused(NotFound("no"), "GRPC", "", "", "r2")
    metrics.cancelled("shop", "predict")
    metrics.batch("shop", "predict", [0.000_05, 0.000_2], 3, 0.002)
    metrics.batch("shop", "retrieve", [0.000_05], 64, 0.002)
    return metrics


def test_tensorflow_servings_counts(metrics):
    lines = metrics.exposition().decode().splitlines()
    count = ":tensorflow:serving:request_count"
    assert f'{count}{{model_name="shop",status="OK"}} 3' in lines
    assert f'{count}{{model_name="shop",status="INVALID_ARGUMENT"}} 1' in lines
    assert f'{count}{{model_name="shop",status="CANCELLED"}} 1' in lines
    assert f'{count}{{model_name="",status="NOT_FOUND"}} 1' in lines
    assert ":tensorflow:serving:batching_session:wrapped_run_count 2" in lines


def test_tensorflow_servings_histograms_are_in_microseconds(metrics):
    name = ":tensorflow:serving:request_latency"
    labels = {"model_name": "shop", "API": "predict", "entrypoint": "GRPC"}
    assert value(metrics, f"{name}_bucket", le="10", **labels) == 0
    assert value(metrics, f"{name}_bucket", le="18", **labels) == 1
    assert value(metrics, f"{name}_bucket", le="+Inf", **labels) == 1
    assert value(metrics, f"{name}_count", **labels) == 1
    assert value(metrics, f"{name}_sum", **labels) == pytest.approx(15)
    name = ":tensorflow:serving:runtime_latency"
    labels = {"model_name": "shop", "API": "retrieve", "runtime": "TF2"}
    assert value(metrics, f"{name}_sum", **labels) == pytest.approx(2000)
    name = ":tensorflow:serving:batching_session:queuing_latency"
    labels = {"thread_pool_name": "twotower_batch_threads"}
    assert value(metrics, f"{name}_count", **labels) == 3
    assert value(metrics, f"{name}_bucket", le="58.32", **labels) == 2
    assert value(metrics, f"{name}_sum", **labels) == pytest.approx(300)


def test_buckets_rise_in_the_order_of_their_bounds(metrics):
    name = ":tensorflow:serving:batching_session:processed_batch_size_bucket"
    buckets = [(labels[0][1], n) for (one, labels), n in read(metrics).items() if one == name]
    bounds = [float(bound) for bound, _ in buckets]
    assert bounds == sorted(bounds)
    assert dict(buckets)["4"] == 1
    assert dict(buckets)["64"] == dict(buckets)["+Inf"] == 2


def test_types_are_declared_as_tensorflow_serving_does(metrics):
    lines = metrics.exposition().decode().splitlines()
    assert "# TYPE :tensorflow:serving:request_count counter" in lines
    assert "# TYPE :tensorflow:serving:request_latency histogram" in lines


def test_our_own_names(metrics):
    assert value(metrics, "twotower_refusals_total", entrypoint="REST", reason="invalid_argument")
    stage = {"model": "shop", "api": "predict", "stage": "queue"}
    assert value(metrics, "twotower_stage_seconds_count", **stage) == 2
    assert value(metrics, "twotower_batch_rows_sum", model="shop", api="retrieve") == 64
    with metrics.timed("encode", "shop", "predict"):
        pass
    encode = {"model": "shop", "api": "predict", "stage": "encode"}
    assert value(metrics, "twotower_stage_seconds_count", **encode) == 1
    assert 0 < value(metrics, "twotower_stage_seconds_sum", **encode) < 60
    metrics.changed("shop", "loaded", 2.5)
    assert value(metrics, "twotower_version_changes_total", model="shop", change="loaded") == 1
    assert value(metrics, "twotower_version_load_seconds_sum", model="shop") == 2.5


def test_what_is_watched_is_asked_when_the_page_is_read(metrics):
    assert value(metrics, "twotower_queue_depth") == 0
    metrics.queue_depth = lambda: 17
    metrics.watched.ready = lambda: True
    metrics.watched.statuses = lambda: {"shop": [VersionStatus(4, State.AVAILABLE)]}
    assert value(metrics, "twotower_queue_depth") == 17
    assert value(metrics, "twotower_ready") == 1
    assert value(metrics, "twotower_version_state", model="shop", version="4") == 30


def test_labels_are_escaped(metrics):
    metrics.refused(NotFound("no"), "GRPC", 'a"b\\c\nd', "", "r1")
    count = ":tensorflow:serving:request_count_total"  # as the parser calls any counter
    assert value(metrics, count, model_name='a"b\\c\nd', status="NOT_FOUND") == 1


def test_a_refusal_is_logged_with_its_request_id(caplog):
    with caplog.at_level(logging.WARNING):
        Metrics().refused(Overloaded("too much"), "REST", "shop", "predict", "abc-1")
    [record] = caplog.records
    assert record.getMessage() == "too much"
    assert record.fields == {
        "model": "shop",
        "api": "predict",
        "entrypoint": "REST",
        "status": "UNAVAILABLE",
        "request_id": "abc-1",
    }
