"""The same bytes as in one process from real clusters of Flink and Spark (`make test-cluster`)."""

import itertools
import threading
import time

import pytest
from clusters import Cluster
from prepared import digest, write_log_with_items
from streaming_log import BY_ROWS, config_for

from pipeline.counts.job import count
from pipeline.counts.settings import FrequenciesConfig
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.streaming.job import estimate

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def flink(tmp_path_factory):
    with Cluster("flink", tmp_path_factory.mktemp("flink")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def source(log, tmp_path_factory):
    return write_log_with_items(log, tmp_path_factory.mktemp("source"), rows_a_group=500)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(settings(source, out))
    return digest(out)


def settings(source, out):
    features = str(source.with_name("items.parquet"))
    few = {"min_user_interactions": 3, "min_item_interactions": 3, "rows_per_shard": 500}
    return PrepareConfig(source=str(source), output=str(out), item_features=features, **few)


def lose_a_task_manager(cluster, rows, hit):
    """Kills one that is at work when blocks of rows lie there, starts another; `hit` gets the job.

    Tried again where the pipeline ended meanwhile. A task manager has one slot, and a job needs
    both: whichever is killed, it ran a part.
    """
    for number in itertools.count(1):
        while not (any(rows.glob("*.npy")) and (jobs := running_jobs(cluster))):
            time.sleep(0.02)
        cluster.kill(f"task-manager-{number}")
        cluster.start_task_manager(f"task-manager-{number + 2}")
        while not (failed := [job for job in jobs if failures(cluster, job)]) and any(
            cluster.rest(f"/jobs/{job}")["state"] != "FINISHED" for job in jobs
        ):
            time.sleep(0.1)
        if failed:
            hit += failed
            return


def failures(cluster, job):
    """What a job lost, after which it started again."""
    return cluster.rest(f"/jobs/{job}/exceptions")["exceptionHistory"]["entries"]


def running_jobs(cluster):
    jobs = cluster.rest("/jobs/overview")["jobs"]
    return [job["jid"] for job in jobs if job["tasks"]["running"]]


def test_prepare_on_flink_where_a_task_manager_is_killed(flink, source, expected, tmp_path):
    hit, rows = [], tmp_path / "out.partial" / "rows"
    killer = threading.Thread(target=lose_a_task_manager, args=(flink, rows, hit), daemon=True)
    killer.start()
    prepare(settings(source, tmp_path / "out"), [*flink.flags(), "--parallelism=2"])
    killer.join(60)
    assert digest(tmp_path / "out") == expected
    (job,) = hit
    assert failures(flink, job)
    assert flink.rest(f"/jobs/{job}")["state"] == "FINISHED"
    flink.wait_for_the_workers_to_end()


def test_frequencies_on_flink(flink, source, tmp_path):
    paths = [tmp_path / "here", tmp_path / "there"]
    for path, flags in zip(paths, ([], [*flink.flags(), "--parallelism=2"]), strict=True):
        count(FrequenciesConfig(source=str(source), output=str(path)), flags)
    assert digest(paths[1]) == digest(paths[0])


def test_streaming_frequencies_on_flink(flink, parts, tmp_path):
    paths = [tmp_path / "here", tmp_path / "there"]
    for path, flags in zip(paths, ([], [*flink.flags(), "--parallelism=2"]), strict=True):
        estimate(config_for(parts, path, **BY_ROWS), flags)
    assert digest(paths[1]) == digest(paths[0])


def test_prepare_on_spark(source, expected, tmp_path):
    with Cluster("spark", tmp_path) as spark:
        prepare(settings(source, tmp_path / "out"), spark.flags())
        spark.wait_for_the_workers_to_end()
    assert digest(tmp_path / "out") == expected
