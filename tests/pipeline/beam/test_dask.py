"""The same bytes from a cluster of processes, of which one worker is killed."""

import os
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import digest

from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig

distributed = pytest.importorskip("distributed")
SETTINGS = {"min_user_interactions": 3, "min_item_interactions": 3, "rows_per_shard": 60}


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def source(log, tmp_path_factory):
    """A log of interactions, and beside it the attributes of its items."""
    path = tmp_path_factory.mktemp("source") / "log.parquet"
    pq.write_table(log, path, row_group_size=100)
    items = sorted(set(log["item_id"].to_pylist()))
    attributes = {"item_id": items, "price": [len(one) / 3 for one in items], "kind": items}
    pq.write_table(pa.table(attributes), path.with_name("items.parquet"), row_group_size=20)
    return path


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(settings(source, out))
    return digest(out)


def settings(source, out, **others):
    features = str(source.with_name("items.parquet"))
    paths = {"source": str(source), "output": str(out), "item_features": features}
    return PrepareConfig(**paths, **SETTINGS, **others)


@pytest.mark.long
@pytest.mark.clock  # ports
def test_the_same_bytes_from_a_cluster_of_which_a_worker_is_killed(
    cluster, source, expected, tmp_path
):
    out, killed = tmp_path / "out", []

    def kill_one():
        rows = tmp_path / "out.partial" / "rows"
        deadline = time.monotonic() + 120
        while not any(rows.glob("*.npy")) and time.monotonic() < deadline:
            time.sleep(0.002)
        pid = next(iter(cluster.workers.values())).pid
        assert not out.exists()
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    flags = ["--runner=DaskRunner", f"--dask_client_address={cluster.scheduler_address}"]
    with distributed.Client(cluster) as client, distributed.get_task_stream(client) as stream:
        prepare(settings(source, out, partitions=4), flags)
    killer.join()
    assert killed
    assert digest(out) == expected
    assert len({task["worker"] for task in stream.data}) >= 2
