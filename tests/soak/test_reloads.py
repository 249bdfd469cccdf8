"""Minutes of load over many reloads: nothing fails, and memory stays where it is."""

import http.client
import itertools
import json
import shutil
import threading
import time

import numpy as np
import pytest

from benchmarks import load
from benchmarks.service import synthetic_bundle
from serving.publish.publish import publish

pytestmark = pytest.mark.soak

SECONDS, RELOADS = 300, 20
CANDIDATES, QUERIES, DIMENSIONS = 40_000, 20_000, 64


def retrieving(server):
    """Asks `:retrieve`, with filters, over a new connection each time."""

    def call(ids):
        connection = http.client.HTTPConnection(*server.rest, timeout=30)
        body = {"query_ids": ids, "k": 20, "exclude_seen": True, "exclude": ["candidate 1"]}
        try:
            connection.request("POST", "/v1/models/model:retrieve", json.dumps(body))
            answer = connection.getresponse()
            results = json.loads(answer.read())["results"]
        finally:
            connection.close()
        assert answer.status == 200
        assert [len(one["candidates"]) for one in results] == [20] * len(ids)

    return call


def status(server):
    connection = http.client.HTTPConnection(*server.rest, timeout=30)
    connection.request("GET", "/v1/models/model")
    rows = json.loads(connection.getresponse().read())["model_version_status"]
    connection.close()
    return {int(row["version"]): row["state"] for row in rows}


def test_memory_is_flat_over_reloads_at_half_load(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = (
        rng.normal(size=(rows, DIMENSIONS)).astype(np.float32) for rows in (CANDIDATES, QUERIES)
    )
    models = tmp_path / "models"
    version = publish(synthetic_bundle(tmp_path, vectors, queries), models, name="model")
    ids = [f"query {row}" for row in range(QUERIES)]
    with (
        load.served(models, "--prune_versions", "2", "--poll_seconds", "0.2") as server,
        load.by_grpc(server, "model") as by_grpc,
        load.by_rest(server, "model") as by_rest,
    ):
        ways = [by_grpc, by_rest, retrieving(server)]
        turns = itertools.count()

        def call(some):
            ways[next(turns) % len(ways)](some)

        peak = load.closed_loop(call, ids, 1, 8, 10.0)
        assert peak.failed == 0
        resident, done = [], []

        def work():
            done.append(load.open_loop(call, ids, peak.rate / 2, 16, SECONDS))

        thread = threading.Thread(target=work)
        start = time.monotonic()
        thread.start()
        source = shutil.copytree(version, tmp_path / "source")
        for number in range(2, RELOADS + 2):
            shutil.copytree(source, version.parent / ".arriving").rename(
                version.parent / str(number)
            )
            while (states := status(server)).get(number) != "AVAILABLE" or states.get(
                number - 1, "END"
            ) != "END":
                assert states.get(number) != "END", states
                time.sleep(0.1)
            time.sleep(max(0.0, start + (number - 1) * SECONDS / RELOADS - time.monotonic()))
            resident.append(load.resident_bytes(server.pid) / 1e6)
            print(f"reload {number - 1}: {resident[-1]:.0f} MB", flush=True)
        thread.join()
    [seen] = done
    print(f"{len(seen.latencies)} requests, p99 {seen.percentile(99):.1f} ms")
    assert seen.failed == 0
    assert len(seen.latencies) > 0.99 * peak.rate / 2 * SECONDS
    # What the allocators keep levels off in the first reloads; a leak would go on.
    early, late = np.mean(resident[5:10]), np.mean(resident[-5:])
    assert late < 1.05 * early, resident
