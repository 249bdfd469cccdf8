"""The same bytes as in one process from real clusters of Flink and Spark (`make test-cluster`)."""

import itertools
import shutil
import threading
import time

import pytest
from clusters import Cluster, until
from prepared import digest, write_log_with_items
from streaming_log import BY_ROWS, BY_TIME, config_for, write

from pipeline.contract import schema
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


def test_an_unbounded_stream_on_flink_that_is_killed_and_stopped(flink, parts, tmp_path):
    """Every row counts once, as in one run over all files, over a kill and over a savepoint."""
    source, out = tmp_path / "incoming", tmp_path / "out"
    source.mkdir()
    arrive(parts / "part-0.parquet", source)
    job, stream = follow(flink, source, out)
    until(lambda: schema.snapshot_directories(out))
    before = checkpoints(flink, job)
    until(lambda: checkpoints(flink, job) > before + 1)
    number = max(int(name[13:]) for name in flink.processes if name.startswith("task-manager"))
    flink.kill(f"task-manager-{number}")
    flink.start_task_manager(f"task-manager-{number + 1}")
    until(lambda: failures(flink, job))
    arrive(parts / "part-1.parquet", source)
    there = len(schema.snapshot_directories(out))
    until(lambda: len(schema.snapshot_directories(out)) > there)
    where = (tmp_path / "savepoints").as_uri()
    fields = {"target-directory": where, "cancel-job": True}
    asked = flink.rest(f"/jobs/{job}/savepoints", "POST", **fields)["request-id"]
    savepoint = f"/jobs/{job}/savepoints/{asked}"
    until(lambda: flink.rest(savepoint)["status"]["id"] == "COMPLETED")
    stream.join(60)
    assert not stream.is_alive()
    arrive(parts / "part-2.parquet", source)
    place = flink.rest(savepoint)["operation"]["location"]
    job, stream = follow(flink, source, out, f"--savepoint_path={place}")
    bounded = estimate(config_for(parts, tmp_path / "one", step_seconds=60))
    origin, newest = (bounded.details[name] for name in ("origin", "newest"))
    later = write(tmp_path / "later.parquet", [("later", newest + 3600)])
    arrive(later, source)  # all windows before are complete
    step = (newest // 60 // 7 + 1) * 7 - origin
    until(lambda: (out / f"{step:08d}" / schema.MANIFEST).exists())
    assert schema.read_snapshot(out / f"{step:08d}").counts["applied"] == bounded.counts["applied"]
    for file in schema.STREAMING_LAST_STEP, schema.STREAMING_INTERVAL, schema.STREAMING_WEIGHT:
        expected = (tmp_path / "one" / "00000001" / file).read_bytes()
        assert (out / f"{step:08d}" / file).read_bytes() == expected
    flink.rest(f"/jobs/{job}?mode=cancel", "PATCH")
    stream.join(60)
    assert not stream.is_alive()


def follow(flink, source, out, *flags):
    """Starts an unbounded stream; its job and the thread that waits for its end."""
    settings = {"unbounded": True, "poll_seconds": 0.2, "snapshot_steps": 7, "keep_snapshots": 99}
    config = config_for(source, out, **settings, **BY_TIME)
    flags = [*flink.flags(), "--parallelism=2", "--", "--checkpointing_interval=500", *flags]
    stream = threading.Thread(target=estimate, args=(config, flags), daemon=True)
    stream.start()
    until(lambda: running_jobs(flink) or not stream.is_alive())
    (job,) = running_jobs(flink)
    return job, stream


def arrive(file, directory):
    """A file comes whole, as a stream asks for."""
    shutil.copy(file, directory / f".{file.name}")
    (directory / f".{file.name}").rename(directory / file.name)


def checkpoints(cluster, job):
    """How many of a job are complete."""
    return cluster.rest(f"/jobs/{job}/checkpoints")["counts"]["completed"]


def test_prepare_on_spark(source, expected, tmp_path):
    with Cluster("spark", tmp_path) as spark:
        prepare(settings(source, tmp_path / "out"), spark.flags())
        spark.wait_for_the_workers_to_end()
    assert digest(tmp_path / "out") == expected
