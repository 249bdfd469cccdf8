"""`twotower items` on a large base, seen from a running service; see `benchmarks.freshness`."""

from __future__ import annotations

import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import load
from benchmarks.live_corpus import draw_columns, raw_values

ROWS = 1_000
_CLIENTS = 4
_GIVE_UP_SECONDS = 120.0
_LOAD_SECONDS = re.compile(rb"^twotower_version_load_seconds_sum\{.*\} (\S+)$", re.MULTILINE)
_ITEMS = """
import sys, time
from serving.publish.items import change_items
from serving.publish.settings import ItemsConfig
start = time.perf_counter()
change_items(ItemsConfig(models=sys.argv[1], name=sys.argv[2], add=sys.argv[3]))
print(start, time.perf_counter() - start)
"""


def publish_under_service(models: Path, name: str, ids: list[str], repeats: int) -> dict[str, Any]:
    """Adds 1,000 candidates beside a service, without load and under it.

    Args:
      models: directory of all models; new versions stay there.
      name: of the model.
      ids: raw ids of queries.
      repeats: how often, each.

    Returns:
      items_seconds, found_after_seconds, reload_ms_with_base without load, and `under_load` the
      same with the number of answered and failed requests.
    """
    with load.served(models) as server, load.by_grpc(server, name) as call:
        call(ids[:1])
        quiet = _median([_added(server, models, name, turn) for turn in range(repeats)])
        loads: list[load.Load] = []
        asking = threading.Event()
        asking.set()

        def work() -> None:
            while asking.is_set():
                loads.append(load.closed_loop(call, ids, 1, _CLIENTS, 1.0, len(loads)))

        thread = threading.Thread(target=work)
        thread.start()
        loaded = [_added(server, models, name, repeats + turn) for turn in range(repeats)]
        asking.clear()
        thread.join()
    answered = sum(len(one.latencies) for one in loads)
    failed = sum(one.failed for one in loads)
    return quiet | {"under_load": _median(loaded) | {"answered": answered, "failed": failed}}


def _added(server: load.Server, models: Path, name: str, turn: int) -> dict[str, float]:
    """What one call of `items` takes, and what follows from it in the service."""
    rng = np.random.default_rng([4, turn])
    columns = draw_columns(rng, ROWS)
    rows = [{"candidate_id": f"new {turn} {n}"} | raw_values(columns, n) for n in range(ROWS)]
    file = models.parent / "added.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    before = _load_seconds(server)
    words = [sys.executable, "-c", _ITEMS, str(models), name, str(file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        found = _found_at(server, name, rows[-1]["candidate_id"])
        output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError("`items` failed.")
    start, seconds = map(float, output.split("\n")[-2].split())
    return {
        "items_seconds": seconds,
        "found_after_seconds": found - start,
        "reload_ms_with_base": 1000 * (_load_seconds(server) - before),
    }


def _found_at(server: load.Server, name: str, candidate_id: str) -> float:
    """When the service first gives a candidate, by the clock that processes share."""
    body = json.dumps({"query_ids": ["query 0"], "allow": [candidate_id], "k": 1})
    end = time.perf_counter() + _GIVE_UP_SECONDS
    while time.perf_counter() < end:
        answer = json.loads(_asked(server, "POST", f"/v1/models/{name}:retrieve", body))
        if answer["results"][0]["candidates"]:
            return time.perf_counter()
        time.sleep(0.02)
    raise RuntimeError(f"{candidate_id!r} was not found within {_GIVE_UP_SECONDS:g} seconds.")


def _load_seconds(server: load.Server) -> float:
    """What loading versions has taken the service in all."""
    found = _LOAD_SECONDS.search(_asked(server, "GET", "/monitoring/prometheus/metrics"))
    return float(found[1]) if found else 0.0


def _asked(server: load.Server, method: str, path: str, body: str | None = None) -> bytes:
    connection = http.client.HTTPConnection(*server.rest, timeout=30.0)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {content[:200]!r}")
    return content


def _median(rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {
        name: round(statistics.median(figures[name] for figures in rounds), 3) for name in rounds[0]
    }
