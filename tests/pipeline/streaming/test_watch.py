"""Watching a directory: equal bits however files arrive and whatever ends the watch."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import digest
from streaming_log import (
    BY_TIME,
    GOOD,
    HEADER,
    SIZES,
    config_for,
    make_rows,
    state_of,
    write,
    write_parts,
)

from pipeline.contract import schema
from pipeline.streaming import job, steps
from pipeline.streaming.job import estimate


def watched(source, output, **settings):
    return config_for(source, output, watch=True, poll_seconds=0.01, **(BY_TIME | settings))


def test_watching_equals_one_run(tmp_path, parts, expected, monkeypatch, caplog):
    """Files come between two looks, more than one at a time or none; some are not complete."""
    caplog.set_level("INFO", "pipeline")
    source = tmp_path / "log"
    source.mkdir()
    arrivals = iter([[0], [], [1, 2], []])

    def arrive(*_):
        for number in next(arrivals):
            shutil.copy(parts / f"part-{number}.parquet", source)

    for name in (".part-9.parquet", "part-9.parquet.partial", "part-9.csv.tmp", "notes.txt"):
        (source / name).write_bytes(b"not yet")
    monkeypatch.setattr(job, "_sleep", arrive)
    manifest = estimate(watched(source, tmp_path / "out", max_polls=5))
    assert state_of(tmp_path / "out") == expected
    names = [Path(one["file"]).name for one in manifest.details["consumed"]]
    assert names == [f"part-{number}.parquet" for number in range(3)]
    looks = [text for text in caplog.messages if "look" in text]
    assert [text.split(": ")[2].split()[0] for text in looks] == ["0", "1", "0", "2", "0"]
    assert len(schema.snapshot_directories(tmp_path / "out")) == 2


def test_archives_are_read_whole(tmp_path):
    source = tmp_path / "log"
    source.mkdir()
    lines = GOOD.splitlines(keepends=True)
    with zipfile.ZipFile(source / "log.csv.zip", "w") as archive:
        for number in range(2):
            archive.writestr(f"{number}.csv", HEADER + "".join(lines[number::2]))
    manifest = estimate(watched(source, tmp_path / "out", max_polls=1))
    assert manifest.counts["read"] == len(lines)
    assert len(manifest.details["consumed"]) == 1


def test_a_watch_that_begins_again_goes_on(tmp_path, parts, expected):
    source = tmp_path / "log"
    source.mkdir()
    for numbers in ([0], [1, 2]):
        for number in numbers:
            shutil.copy(parts / f"part-{number}.parquet", source)
        config = watched(source, tmp_path / "out", max_polls=1, keep_snapshots=1)
        manifest = estimate(config)
    assert state_of(tmp_path / "out") == expected
    assert [p.name for p in schema.snapshot_directories(tmp_path / "out")] == ["00000002"]
    assert estimate(config) == manifest  # nothing new


def test_a_watch_may_begin_at_a_snapshot_of_another_output(tmp_path, parts, expected):
    estimate(config_for(parts / "part-0.parquet", tmp_path / "seed", **BY_TIME))
    config = watched(parts, tmp_path / "out", max_polls=1, previous=str(tmp_path / "seed"))
    assert len(estimate(config).details["consumed"]) == 3
    estimate(config)  # from its own snapshot, not from the seed once more
    assert state_of(tmp_path / "out") == expected


def test_nothing_to_watch_yet(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        estimate(watched(tmp_path / "nothing", tmp_path / "out", max_polls=1))
    assert not (tmp_path / "out").exists()
    assert estimate(watched(tmp_path / "*.parquet", tmp_path / "out", max_polls=2)) is None


def test_a_file_that_changes_after_it_was_read_is_an_error(tmp_path, caplog):
    source = write_parts(tmp_path / "log", make_rows(), 2)
    estimate(watched(source, tmp_path / "out", max_polls=1))
    before = state_of(tmp_path / "out")
    (source / "copy.parquet").write_bytes((source / "part-0.parquet").read_bytes())
    estimate(watched(source, tmp_path / "out", max_polls=2))
    assert caplog.text.count("copy.parquet is left out: its content is that of") == 1
    write(source / "part-1.parquet", make_rows(100, seed=5))
    with pytest.raises(ValueError, match=r"part-1.parquet has changed since it was read"):
        estimate(watched(source, tmp_path / "out", max_polls=1))
    assert state_of(tmp_path / "out") == before


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    source = write_parts(tmp_path / "log", make_rows(200), 2)
    original = steps.stage_events

    def stage_and_append(*arguments):
        staged = original(*arguments)
        with open(source / "part-1.parquet", "ab") as file:
            file.write(b"more")
        return staged

    monkeypatch.setattr(steps, "stage_events", stage_and_append)
    with pytest.raises(ValueError, match=r"part-1.parquet changed while it was read"):
        estimate(watched(source, tmp_path / "out", max_polls=1))
    assert not (tmp_path / "out").exists()


def test_a_bad_look_ends_the_watch_and_leaves_the_snapshot(tmp_path):
    source = write_parts(tmp_path / "log", make_rows(), 2)
    settings = {"max_polls": 1, "keep_snapshots": 1}
    estimate(watched(source, tmp_path / "out", **settings))
    before = digest(tmp_path / "out")
    (source / "bad.csv").write_text(HEADER + ",1\n" * 5 + GOOD)
    with pytest.raises(ValueError, match="5 of 35 rows"):
        estimate(watched(source, tmp_path / "out", **settings))
    left = digest(tmp_path / "out")
    assert left.pop("00000002.dead_letters.jsonl")
    assert left == before
    other = pa.table({"item_id": [1], "timestamp": ["noon"]})
    (source / "bad.csv").unlink()
    pq.write_table(other, source / "other.parquet")
    write(source / "a.parquet", make_rows(30, seed=3))
    with pytest.raises(ValueError, match="the schema changes: column 'item_id' is numbers"):
        estimate(watched(source, tmp_path / "out", **settings))


def test_a_look_may_find_files_without_rows(tmp_path):
    source = tmp_path / "log"
    source.mkdir()
    (source / "1.csv").write_text(HEADER + GOOD)
    settings = {"max_polls": 1, "keep_snapshots": 5}
    estimate(watched(source, tmp_path / "out", **settings))
    before = state_of(tmp_path / "out")
    (source / "2.csv").write_text(HEADER)
    with pytest.raises(ValueError, match="holds no rows"):
        estimate(watched(source, tmp_path / "out", **settings))
    columns = pa.schema({"item_id": pa.string(), "timestamp": pa.int64()})
    pq.ParquetWriter(source / "3.parquet", columns).close()  # not even a row group
    manifest = estimate(watched(source, tmp_path / "out", **settings, allow_empty_files=True))
    assert len(manifest.details["consumed"]) == 3
    assert state_of(tmp_path / "out") == before
    pq.ParquetWriter(source / "4.parquet", columns, compression="gzip").close()
    with pytest.raises(ValueError, match=r"4.parquet holds no rows"):
        estimate(watched(source, tmp_path / "out", **settings, allow_repeated_files=True))


def test_dead_letters_outlive_their_snapshot(tmp_path):
    source = tmp_path / "log"
    source.mkdir()
    for number in range(2):
        bad = f",{number}\n" if number < 1 else ""
        (source / f"{number}.csv").write_text(HEADER + bad + f"x{number},1\n" + GOOD)
        settings = {"max_polls": 1, "keep_snapshots": 1, "max_bad_share": 0.1}
        estimate(watched(source, tmp_path / "out", **settings))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000001.dead_letters.jsonl", "00000002"]


def test_a_signal_ends_the_watch_between_two_jobs(tmp_path, monkeypatch):
    source = write_parts(tmp_path / "log", make_rows(300), 2)
    original, calls = job.write_snapshot, []

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(job, "write_snapshot", signalled)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    manifest = estimate(watched(source, tmp_path / "out"))  # no max_polls: the signal ends it
    assert len(calls) == 1
    assert len(manifest.details["consumed"]) == 2  # the job that was under way is complete
    assert [signal.getsignal(number) for number in numbers] == before


# A watch whose workers wait after the first file that a stage has written.
SLOW = """
import sys, time, twotower
from pipeline.streaming import steps
stage = sys.argv.pop(1)
def wait(directory, *a, f=steps.write_block):
    r = f(directory, *a)
    if directory.name == stage:
        print("waiting", flush=True); time.sleep(60)
    return r
steps.write_block = wait
sys.exit(twotower.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("stage", ["events", "applied"])
def test_a_killed_watch_loses_nothing(tmp_path, parts, expected, stage):
    source = tmp_path / "log"
    source.mkdir()
    shutil.copy(parts / "part-0.parquet", source)
    config = watched(source, tmp_path / "out", max_polls=1)
    estimate(config)
    before = digest(tmp_path / "out")
    for number in (1, 2):
        shutil.copy(parts / f"part-{number}.parquet", source)
    fields = SIZES | BY_TIME | {"source": source, "output": tmp_path / "out", "max_polls": 1}
    flags = [f"--{name}={value}" for name, value in fields.items()]
    job = subprocess.Popen(
        [sys.executable, "-c", SLOW, stage, "frequencies", "--streaming", "--watch", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(schema.__file__).parents[2],
        text=True,
    )
    while "waiting" not in job.stdout.readline():
        assert job.poll() is None, "the job ended before it could be killed"
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert (tmp_path / "out" / "00000002.partial").exists()
    gone = (".lock", "00000002.partial")  # with the next run
    kept = digest(tmp_path / "out").items()
    kept = {name: sum_ for name, sum_ in kept if not name.startswith(gone)}
    assert kept == before
    estimate(config)
    assert state_of(tmp_path / "out") == expected
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000001", "00000002"]
