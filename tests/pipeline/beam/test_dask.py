"""The same bytes from a cluster of processes, of which one worker is killed."""

import os
import signal
import threading
import time

import pytest
from prepared import digest, write_log_with_items

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
    return write_log_with_items(log, tmp_path_factory.mktemp("source"), rows_a_group=100)


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
