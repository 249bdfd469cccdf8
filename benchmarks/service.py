"""What the service costs over calling the SavedModel in process; see `benchmarks.serving`."""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

from benchmarks import load
from benchmarks.load import Call, Load
from pipeline.contract.bundle import write_bundle
from serving.retrieval.retriever import Retriever
from serving.version.versions import find_version

NAME = "model"
BATCH = 64
CALLERS = 4  # of requests with 64 queries, in process as through the service
SINGLE_CLIENTS = 16  # of requests with one query
WORKER_CLIENTS = 8  # of two workers as of one
RELOADS = 5
_BEFORE_SECONDS, _BETWEEN_SECONDS = 12.0, 3.0
_END = get_model_status_pb2.ModelVersionStatus.State.END
_AVAILABLE = get_model_status_pb2.ModelVersionStatus.State.AVAILABLE


def network(models: Path, ids: list[str], quick: bool, reloads: int = RELOADS) -> dict[str, Any]:
    """Serves the newest version of the model `NAME`, and puts load on the service.

    Args:
      models: directory of all models.
      ids: raw ids of queries.
      quick: shorter loads.
      reloads: how many versions replace each other under load; they are copies.

    Returns:
      grpc_fraction, rest_fraction: queries a second at 64 queries a request, by those of the
        same SavedModel called in process by as many threads; median over rounds.
      grpc_cpu_ms, rest_cpu_ms: CPU time of the server for such a request beyond that of its
        search, which is `Retriever.run` in process: encoder and index, rows and scores.
      added_ms_median, added_ms_p99: what gRPC adds to requests with one query, which come at
        random times, half as many as can be answered; in process they come at the same times.
      failed_during_reload, p99_ratio_during_reload: while versions replace each other under full
        load; only with `reloads`.
      The rest: what these come from.
    """
    seconds, rounds = (3.0, 1) if quick else (6.0, 5)
    version = find_version(models, NAME)
    local = load.in_process(version.load(version.manifest.details["default_index"]))
    retriever = Retriever(version)

    def search(ids: list[str]) -> None:
        retriever.run(load.SIGNATURE, query_id=tf.constant(ids))

    for call in (local, search):  # the first one builds ScaNN's searcher: not in four threads
        call(ids[:BATCH])

    with (
        load.served(models) as server,
        load.by_grpc(server, NAME) as by_grpc,
        load.by_rest(server, NAME) as by_rest,
    ):
        calls = {"in_process": local, "search": search, "grpc": by_grpc, "rest": by_rest}
        results = _throughput(calls, server.pid, ids, seconds, rounds)
        results |= _latency(local, {"": by_grpc, "rest_": by_rest}, ids, seconds, rounds)
        if reloads:
            results |= _reload(server, version.path, by_grpc, ids, reloads)
    return results


def two_workers(models: Path, ids: list[str], quick: bool) -> dict[str, Any]:
    """Two workers against one, asked in turn by clients that each have a connection.

    Returns:
      grpc_ratio, rest_ratio: queries a second of two by those of one; median over rounds.
      grpc_cpu_ms, rest_cpu_ms: CPU time of two workers for a request with 64 queries.
      grpc_16_cores, rest_16_cores: queries a second that 16 cores give at that CPU time, where
        clients have their own; a sum, not measured.
    """
    seconds, rounds = (3.0, 1) if quick else (5.0, 5)
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(load.served(models, "--workers", str(count))) for count in (1, 2)
        ]
        pids = [load.workers(server.pid) for server in servers]
        calls = {
            (way, count): stack.enter_context(by(servers[count - 1]))
            for count in (1, 2)
            for way, by in (
                ("grpc", lambda server: load.by_grpc(server, NAME, WORKER_CLIENTS)),
                ("rest", lambda server: load.by_rest(server, NAME)),
            )
        }
        for turn, ((way, count), call) in itertools.product(range(-1, rounds), calls.items()):
            before = sum(map(load.cpu_seconds, pids[count - 1]))
            answered = _good(
                load.closed_loop(call, ids, BATCH, WORKER_CLIENTS, seconds if turn >= 0 else 1.0)
            )
            spent = sum(map(load.cpu_seconds, pids[count - 1])) - before
            if turn >= 0:
                found.setdefault(f"{way}_{count}", []).append(BATCH * answered.rate)
                found.setdefault(f"{way}_{count}_cpu_ms", []).append(
                    1000.0 * spent / len(answered.latencies)
                )
    results: dict[str, Any] = {"clients": WORKER_CLIENTS}
    for way in ("grpc", "rest"):
        ratio = map(operator.truediv, found[f"{way}_2"], found[f"{way}_1"])
        cpu_ms = statistics.median(found[f"{way}_2_cpu_ms"])
        results[f"{way}_ratio"] = round(statistics.median(ratio), 3)
        results[f"{way}_cpu_ms"] = round(cpu_ms, 2)
        results[f"{way}_16_cores"] = round(16 * BATCH * 1000.0 / cpu_ms, -3)
        for count in (1, 2):
            median = statistics.median(found[f"{way}_{count}"])
            results[f"{way}_queries_per_second_{count}"] = round(median)
    return results


def worker_memory(models: Path, ids: list[str]) -> dict[str, Any]:
    """Proportional memory in MB of one worker alone and of the second of two, after queries."""
    found = []
    for count in (1, 2):
        with (
            load.served(models, "--workers", str(count), "--deadline_ms", "60000") as server,
            load.by_grpc(server, NAME, WORKER_CLIENTS) as call,
        ):
            _good(load.closed_loop(call, ids, 1, WORKER_CLIENTS, 5.0))
            sizes = [load.proportional_bytes(pid) / 1e6 for pid in load.workers(server.pid)]
            found.append(round(sizes[-1]))
    return {"alone_mb": found[0], "second_mb": found[1], "ratio": round(found[1] / found[0], 3)}


def synthetic_bundle(directory: Path, vectors: np.ndarray, queries: np.ndarray) -> Path:
    """A bundle whose query model looks its embedding up, as a trained one does."""
    ids = [f"query {row}" for row in range(len(queries))]
    model = _Lookup(ids, queries)
    saved = directory / "query_model"
    tf.saved_model.save(model, str(saved), signatures={load.SIGNATURE: model.embed})
    rng = np.random.default_rng(2)
    return write_bundle(
        directory / "bundle",
        vectors,
        [f"candidate {row}" for row in range(len(vectors))],
        source="synthetic clusters",
        query_model=saved,
        sample_queries=queries[:1024],
        query_ids=ids,
        seen=rng.integers(len(vectors), size=(len(queries), 20)).tolist(),
    )


class _Lookup(tf.Module):
    """A query SavedModel of a table."""

    def __init__(self, ids: Sequence[str], embeddings: np.ndarray) -> None:
        super().__init__()
        self.table = tf.Variable(embeddings, trainable=False)
        rows = tf.range(len(ids), dtype=tf.int64)
        initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(list(ids)), rows)
        self.rows = tf.lookup.StaticHashTable(initializer, default_value=-1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query_id")])
    def embed(self, query_id: tf.Tensor) -> dict[str, tf.Tensor]:
        row = self.rows.lookup(query_id)
        found = tf.gather(self.table, tf.maximum(row, 0))
        return {"embedding": found, "known": row >= 0}


def _throughput(
    calls: dict[str, Call], server: int, ids: list[str], seconds: float, rounds: int
) -> dict[str, Any]:
    """Requests with 64 queries, taking turns."""
    rates: dict[str, list[float]] = {way: [] for way in calls}
    cpu_ms: dict[str, list[float]] = {way: [] for way in calls}
    for call in calls.values():
        load.closed_loop(call, ids, BATCH, CALLERS, 1.0)
    for turn in range(rounds):
        for way, call in calls.items():
            pid = server if way in ("grpc", "rest") else os.getpid()
            before = load.cpu_seconds(pid)
            answered = _good(load.closed_loop(call, ids, BATCH, CALLERS, seconds, turn))
            spent = load.cpu_seconds(pid) - before
            rates[way].append(answered.rate)
            cpu_ms[way].append(1000.0 * spent / len(answered.latencies))
    results: dict[str, Any] = {"search_cpu_ms": round(statistics.median(cpu_ms["search"]), 3)}
    for way in ("grpc", "rest"):
        fraction = map(operator.truediv, rates[way], rates["in_process"])
        beyond = map(operator.sub, cpu_ms[way], cpu_ms["search"])
        results[f"{way}_fraction"] = round(statistics.median(fraction), 3)
        results[f"{way}_cpu_ms"] = round(statistics.median(beyond), 3)
    return results | {
        f"{way}_queries_per_second": round(BATCH * statistics.median(rates[way])) for way in calls
    }


def _latency(
    local: Call, ways: dict[str, Call], ids: list[str], seconds: float, rounds: int
) -> dict[str, Any]:
    """Requests with one query at half of the peak, through the service and in process."""
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for prefix, call in ways.items():
            peak = _good(load.closed_loop(call, ids, 1, SINGLE_CLIENTS, seconds, turn)).rate
            found.setdefault(f"{prefix}one_query_peak_per_second", []).append(peak)
            through, alone = (
                _good(load.open_loop(one, ids, peak / 2, SINGLE_CLIENTS, seconds, turn))
                for one in (call, local)
            )
            for name, percent in (("median", 50.0), ("p99", 99.0)):
                ms = through.percentile(percent)
                added = ms - alone.percentile(percent)
                found.setdefault(f"{prefix}added_ms_{name}", []).append(added)
                found.setdefault(f"{prefix}one_query_ms_{name}", []).append(ms)
    return {name: round(statistics.median(some), 3) for name, some in found.items()}


def _reload(
    server: load.Server, version: Path, call: Call, ids: list[str], reloads: int
) -> dict[str, Any]:
    """New versions, one after the other, under full load."""
    loads: list[Load] = []
    asking = threading.Event()
    asking.set()

    def work() -> None:
        while asking.is_set():
            loads.append(load.closed_loop(call, ids, BATCH, CALLERS, 5.0, len(loads)))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(_BEFORE_SECONDS)
    windows = [_replace(server, version, turn) for turn in range(reloads)]
    asking.clear()
    thread.join()
    begun, latencies = (
        np.concatenate([getattr(one, field) for one in loads]) for field in ("started", "latencies")
    )
    ended = begun + latencies
    during = np.any([(ended >= start) & (begun <= end) for start, end in windows], axis=0)
    early = (begun >= begun[0] + 1.0) & (ended < windows[0][0])
    before_ms, during_ms = (
        1000.0 * float(np.percentile(latencies[some], 99)) for some in (early, during)
    )
    return {
        "failed_during_reload": sum(one.failed for one in loads),
        "p99_ratio_during_reload": round(during_ms / before_ms, 2),
        "reloads": reloads,
        "reload_seconds": round(statistics.median(end - start for start, end in windows), 2),
        "requests_during_reload": int(during.sum()),
        "p99_ms_before_reload": round(before_ms, 2),
        "p99_ms_during_reload": round(during_ms, 2),
    }


def _replace(server: load.Server, version: Path, turn: int) -> tuple[float, float]:
    """Copies a version to the next number; from when to when the service was busy with it."""
    time.sleep(_BETWEEN_SECONDS)
    number = int(version.name) + turn + 1
    begun = time.perf_counter()
    aside = version.parent / ".arriving"
    shutil.copytree(version, aside)
    aside.rename(version.parent / str(number))
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = version.parent.name
    with grpc.insecure_channel(server.grpc) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        while True:
            rows = stub.GetModelStatus(request).model_version_status
            states = {row.version: row.state for row in rows}
            if states.get(number) == _AVAILABLE and states.get(number - 1, _END) == _END:
                return begun, time.perf_counter()
            time.sleep(0.05)


def _good(one: Load) -> Load:
    if one.failed:
        raise RuntimeError(f"{one.failed} requests failed; the figures would say nothing.")
    return one
