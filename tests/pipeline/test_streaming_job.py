"""The job of streaming frequencies: equal bits however it is divided, stopped or killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paper_recursion import Paper
from prepared import digest

import twotower
from pipeline import (
    batches,
    event_order,
    micro_batch,
    row_steps,
    schema,
    streaming_frequency,
    watch,
)
from pipeline.beam_options import beam_options
from pipeline.config import FrequenciesConfig
from pipeline.snapshots import only_writer
from pipeline.sources import find_pieces
from pipeline.staging import Staging
from pipeline.streaming_job import estimate

SIZES = {"num_buckets": 41, "num_hashes": 3, "alpha": 0.05}
BY_ROWS = {"batch_size": 64}
BY_TIME = {"step_seconds": 60, "allowed_lateness_seconds": 150}
MODES = pytest.mark.parametrize("mode", [BY_ROWS, BY_TIME], ids=["rows", "time"])


def config_for(source, output, **settings):
    fields = {"streaming": True, "partitions": 3} | SIZES | settings
    return FrequenciesConfig(source=str(source), output=str(output), **fields)


def make_rows(num_rows=900, seed=0, jitter=100, seconds=3000):
    """(item, timestamp) with popular items, equal times, and rows up to `jitter` s too early."""
    rng = np.random.default_rng(seed)
    times = 1_000_007 + np.sort(rng.integers(0, seconds, num_rows))
    times -= rng.integers(0, jitter + 1, num_rows)
    items = [f"ü{int(30 * place**2)}" for place in rng.random(num_rows)]
    return list(zip(items, times.tolist(), strict=True))


def write(path, rows, row_group_size=70, columns=("item_id", "timestamp")):
    items, times = zip(*rows, strict=True)
    table = pa.table({"item_id": pa.array(items), "timestamp": times}).select(list(columns))
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_parts(directory, rows, parts):
    """The rows in several files, in their order."""
    directory.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(rows)), parts)):
        write(directory / f"part-{number}.parquet", [rows[i] for i in part])
    return directory


def newest(output):
    """The manifest, a and b of the newest snapshot."""
    path = schema.snapshot_directories(output)[-1]
    manifest = schema.read_manifest(path, "streaming_frequency")
    return manifest, np.load(path / "last_step.npy"), np.load(path / "interval.npy")


def state_of(output):
    """Every bit of a snapshot that a later run or a trainer reads."""
    manifest, last_step, interval = newest(output)
    path = schema.snapshot_directories(output)[-1] / "pending.npy"
    pending = path.read_bytes() if path.exists() else b""
    details = {name: manifest.details[name] for name in ("step", "rows", "origin", "newest")}
    return details, last_step.tobytes(), interval.tobytes(), pending


def by_rows(rows, size):
    """(step, fingerprint) where rows in the order of time, then of the source, decide."""
    in_order = sorted(rows, key=lambda row: row[1])  # stable
    return [(i // size + 1, schema.fingerprint(item)) for i, (item, _) in enumerate(in_order)]


def by_time(rows, seconds, lateness):
    """(step, fingerprint) of the rows that are applied, and how many are pending."""
    first = min(time // seconds for _, time in rows)
    last = (max(time for _, time in rows) - lateness) // seconds
    applied = [
        (time // seconds - first + 1, item) for item, time in rows if time // seconds <= last
    ]
    return [(t, schema.fingerprint(item)) for t, item in applied], len(rows) - len(applied)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A log in three files; rows of one file may be older than the last ones of another."""
    return write_parts(tmp_path_factory.mktemp("source") / "log", make_rows(), 3)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A snapshot of other rows, by rows."""
    directory = tmp_path_factory.mktemp("snapshot")
    source = write(directory / "log.parquet", make_rows(100, seed=1))
    estimate(config_for(source, directory / "out", **BY_ROWS))
    return directory / "out" / "00000001"


@pytest.fixture(scope="module")
def expected(parts, tmp_path_factory):
    """The state after one run over all three files, by event time."""
    out = tmp_path_factory.mktemp("expected") / "out"
    estimate(config_for(parts, out, **BY_TIME))
    return state_of(out)


# --- the result -----------------------------------------------------------------------------


@pytest.mark.parametrize(("partitions", "block_rows"), [(1, 37), (64, 10**6)])
def test_rows_decide_the_step(tmp_path, monkeypatch, partitions, block_rows):
    """In the order of time over all files; where times are equal, of files and rows."""
    monkeypatch.setattr(batches, "BLOCK_ROWS", block_rows)
    rows = make_rows(jitter=2000)
    source = write_parts(tmp_path / "log", rows, 3)
    manifest = estimate(config_for(source, tmp_path / "out", **BY_ROWS, partitions=partitions))
    _, *state = newest(tmp_path / "out")
    Paper.over(by_rows(rows, 64), **SIZES).check(*state)
    assert manifest.details["step"] == -(-len(rows) // 64)
    assert manifest.details["rows_per_step"] == 64


def test_event_time_decides_the_step(tmp_path, parts, expected):
    rows = make_rows()
    manifest = estimate(config_for(parts, tmp_path / "out", **BY_TIME, partitions=64))
    assert state_of(tmp_path / "out") == expected
    events, num_pending = by_time(rows, 60, 150)
    _, *state = newest(tmp_path / "out")
    Paper.over(events, **SIZES).check(*state)
    assert num_pending > 10
    assert manifest.counts["pending"] == num_pending
    assert manifest.counts["applied"] == manifest.details["rows"] == len(events)
    step = max(t for t, _ in events)
    assert manifest.details["step"] == step
    assert manifest.details["rows_per_step"] == len(events) / step


def test_without_times_the_source_is_the_order(tmp_path):
    rows = make_rows(300, jitter=2000)
    write(tmp_path / "log.parquet", rows, columns=["item_id"])
    estimate(config_for(tmp_path / "log.parquet", tmp_path / "out", **BY_ROWS))
    _, *state = newest(tmp_path / "out")
    Paper.over(by_rows([(item, 0) for item, _ in rows], 64), **SIZES).check(*state)


@pytest.mark.parametrize("times", ["equal", "long tail"])
def test_no_worker_puts_the_whole_log_in_order(tmp_path, times):
    """One item, whatever its times: every range of the order has its share of the rows."""
    values = {"equal": [7] * 2000, "long tail": [n**4 for n in range(2000)]}
    source = write(tmp_path / "log.parquet", [("x", time) for time in values[times]])
    config = config_for(source, tmp_path / "out", **BY_ROWS, partitions=8)
    with Staging(config.output, overwrite=False) as staging:
        options = beam_options([])
        events = event_order.stage_events(find_pieces(config), config, options, staging)
        ordered = event_order.order_events(events, 8, options, staging)
        for files in (events, ordered):
            sizes = [len(np.load(path)) for path in files]
            assert sum(sizes) == 2000
            assert max(sizes) <= 2 * 2000 / 8


def test_one_item_at_one_time(tmp_path):
    """No cut of the time axis and no range of buckets divides these rows."""
    write(tmp_path / "log.parquet", [("x", 5)] * 500)
    estimate(config_for(tmp_path / "log.parquet", tmp_path / "out", **BY_ROWS))
    _, last_step, interval = newest(tmp_path / "out")
    assert last_step.max() == 8
    np.testing.assert_allclose(interval, 1, rtol=1e-15)  # every step holds it


def test_threads_do_not_matter(tmp_path, parts, expected):
    flags = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    estimate(config_for(parts, tmp_path / "out", **BY_TIME), flags)
    assert state_of(tmp_path / "out") == expected


@pytest.mark.long
@MODES
@pytest.mark.parametrize("workers", ["multi_threading", "multi_processing"])
def test_workers_do_not_matter(tmp_path, parts, mode, workers):
    estimate(config_for(parts, tmp_path / "one", **mode))
    flags = [f"--direct_running_mode={workers}", "--direct_num_workers=2"]
    estimate(config_for(parts, tmp_path / "two", **mode), flags)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


@pytest.mark.long
@MODES
def test_a_cluster_gives_the_same_bytes(tmp_path, parts, mode):
    distributed = pytest.importorskip("distributed")
    estimate(config_for(parts, tmp_path / "one", **mode))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        flags = ["--runner=DaskRunner", f"--dask_client_address={cluster.scheduler_address}"]
        estimate(config_for(parts, tmp_path / "two", **mode), flags)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


# --- one run after the other ----------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(BY_ROWS, id="rows"),
        pytest.param(BY_TIME, id="lateness", marks=pytest.mark.long),  # as the watches below
        pytest.param({"step_seconds": 60}, id="time"),
    ],
)
def test_restarting_from_a_snapshot_equals_no_restart(tmp_path, mode):
    """The files end inside steps; with lateness, rows of older steps come with the next file."""
    rows = make_rows(jitter=100 if mode is BY_TIME else 0)
    source = write_parts(tmp_path / "log", rows, 2)
    estimate(config_for(source, tmp_path / "whole", **mode))
    for number in range(2):
        previous = str(tmp_path / "out") if number else ""
        part = source / f"part-{number}.parquet"
        config = config_for(part, tmp_path / "out", previous=previous, **mode)
        manifest = estimate(dataclasses.replace(config, partitions=number + 1))
    assert state_of(tmp_path / "out") == state_of(tmp_path / "whole")
    assert manifest.counts["late"] == 0
    assert (manifest.counts["pending"] > 0) is (mode is BY_TIME)
    assert len(manifest.details["consumed"]) == 2
    if mode == {"step_seconds": 60}:  # no row waits: every run ends inside a step
        Paper.over(by_time(rows, 60, 0)[0], **SIZES).check(*newest(tmp_path / "out")[1:])


@pytest.mark.parametrize(
    ("second", "origin", "step", "applied", "pending"),
    [
        # (1141 - 100) // 10 is period 104; an even older row is in the first step
        (
            [("c", 985), ("a", 1141), ("b", 1069)],
            98,
            7,
            [(1, "c")],
            [("a", 105, 2), ("a", 114, 1), ("b", 106, 2)],
        ),
        # period 110; the first step is that of a row that waited
        ([("a", 1200)], 105, 6, [(1, "a"), (2, "b")], [("a", 120, 1)]),
    ],
)
def test_a_run_that_lies_within_the_lateness_applies_nothing(
    tmp_path, second, origin, step, applied, pending
):
    mode = {"step_seconds": 10, "allowed_lateness_seconds": 100}
    write(tmp_path / "1.parquet", [("a", 1050), ("b", 1060), ("a", 1050)])
    write(tmp_path / "2.parquet", second)
    manifest = estimate(config_for(tmp_path / "1.parquet", tmp_path / "out", **mode))
    assert (manifest.details["step"], manifest.details["origin"]) == (0, None)
    assert (manifest.counts["applied"], manifest.counts["pending"]) == (0, 3)
    config = config_for(tmp_path / "2.parquet", tmp_path / "out", **mode, previous=tmp_path / "out")
    manifest = estimate(config)
    assert (manifest.details["step"], manifest.details["origin"]) == (step, origin)
    found = np.load(tmp_path / "out" / "00000002" / "pending.npy")
    expected = sorted([schema.fingerprint(item), period, rows] for item, period, rows in pending)
    assert found.tolist() == expected
    assert manifest.counts["pending"] == sum(rows for *_, rows in pending)
    events = [(t, schema.fingerprint(item)) for t, item in applied]
    Paper.over(events, **SIZES).check(*newest(tmp_path / "out")[1:])


def test_late_rows_are_counted_and_dropped(tmp_path):
    mode = {"step_seconds": 10, "allowed_lateness_seconds": 20}
    write(tmp_path / "1.parquet", [("a", 1005), ("b", 1012), ("c", 1034), ("a", 1033)])
    # W = 1014: step 1 and 2 are applied. Period 101 is step 2: its row is not late.
    write(tmp_path / "2.parquet", [("d", 1013), ("b", 1009), ("b", 1000), ("e", 1061)])
    estimate(config_for(tmp_path / "1.parquet", tmp_path / "out", **mode))
    config = config_for(tmp_path / "2.parquet", tmp_path / "out", **mode, previous=tmp_path / "out")
    manifest = estimate(config)
    names = ("read", "applied", "late", "pending")
    assert [manifest.counts[name] for name in names] == [4, 3, 2, 1]
    assert manifest.details["late"] == {str(tmp_path / "2.parquet"): 2}
    # Period 104 is step 5, the last one; a run of older rows does not take the stream back.
    write(tmp_path / "3.parquet", [("f", 1045), ("g", 1043)])
    mode = {"step_seconds": 10, "allowed_lateness_seconds": 60}
    config = config_for(tmp_path / "3.parquet", tmp_path / "out", **mode, previous=tmp_path / "out")
    manifest = estimate(config)
    assert (manifest.details["step"], manifest.details["newest"]) == (5, 1061)
    assert [manifest.counts[name] for name in names] == [2, 2, 0, 1]
    applied = [(1, "a"), (2, "b"), (2, "d"), (4, "c"), (4, "a"), (5, "f"), (5, "g")]
    events = [(t, schema.fingerprint(item)) for t, item in applied]
    Paper.over(events, **SIZES).check(*newest(tmp_path / "out")[1:])


# --- bad input ------------------------------------------------------------------------------

HEADER = "item_id,timestamp\n"
GOOD = "".join(f"i{n % 7},{1000 + 10 * n}\n" for n in range(30))


@MODES
def test_bad_rows_go_to_the_dead_letters(tmp_path, mode):
    bad = ",1100\n" + "i1,noon\n" + "i1\n"
    (tmp_path / "log.csv").write_text(HEADER + GOOD + bad)
    manifest = estimate(
        config_for(tmp_path / "log.csv", tmp_path / "out", **mode, max_bad_share=0.1)
    )
    counts = manifest.counts
    assert (counts["read"], counts["bad"]) == (33, 3)
    assert counts["applied"] + counts["pending"] == 30
    letters = (tmp_path / "out" / "00000001" / "dead_letters.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in letters] == [31, 32, 33]
    assert "dead_letters.jsonl" in manifest.files


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (HEADER + GOOD + ",1\n", {}, r"1 of 31 rows of .* are bad, more than --max_bad_share"),
        (HEADER, {}, "holds no rows"),
        ("", {}, "is empty"),
        ("item,timestamp\na,1\n", {}, "has no column 'item_id'"),
        (HEADER + "a,1\n", {"timestamp_column": "t"}, "has no column 't'"),
    ],
)
def test_bad_sources_leave_nothing(tmp_path, content, settings, message):
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        estimate(config_for(tmp_path / "log.csv", tmp_path / "out", **BY_TIME, **settings))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"log.csv", ".lock"}
    assert left <= {"00000001.dead_letters.jsonl"}
    assert schema.snapshot_directories(tmp_path / "out") == []


def test_a_threshold_drops_rows(tmp_path):
    rows = "".join(f"i{n},{1000 + n},{n % 5}\n" for n in range(50))
    (tmp_path / "log.csv").write_text("item_id,timestamp,rating\n" + rows)
    config = config_for(tmp_path / "log.csv", tmp_path / "out", **BY_TIME, rating_threshold=2)
    counts = estimate(config).counts
    assert counts["below_threshold"] == 20
    assert counts["applied"] + counts["pending"] == 30
    config = config_for(tmp_path / "log.csv", tmp_path / "none", **BY_TIME, rating_threshold=9)
    with pytest.raises(ValueError, match=r"no row of .* is left"):
        estimate(config)
    assert not (tmp_path / "none").exists()


def test_rows_that_get_lost_are_our_error(tmp_path, monkeypatch):
    source = write(tmp_path / "log.parquet", make_rows(200))
    original = streaming_frequency.Estimator.by_range

    def without_one_key(self, block):
        yield from list(original(self, block))[1:]

    with monkeypatch.context() as patch:
        patch.setattr(streaming_frequency.Estimator, "by_range", without_one_key)
        with pytest.raises(RuntimeError, match="the hash arrays counted"):
            estimate(config_for(source, tmp_path / "out", **BY_ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(row_steps, "_stage_late", lambda piece, sizes, out: str(piece))
        estimate(config_for(source, tmp_path / "out", step_seconds=60))
        late = write(tmp_path / "late.parquet", make_rows(50, seconds=10))
        config = config_for(late, tmp_path / "out", step_seconds=60, previous=tmp_path / "out")
        with pytest.raises(RuntimeError, match="50 rows went in, 0 came out"):
            estimate(config)
    assert len(schema.snapshot_directories(tmp_path / "out")) == 1


# --- snapshots ------------------------------------------------------------------------------


def test_what_an_output_already_holds(tmp_path):
    one = write(tmp_path / "1.parquet", make_rows(200))
    two = write(tmp_path / "2.parquet", make_rows(200, seed=1))
    out = tmp_path / "out"
    estimate(config_for(one, out, **BY_ROWS))
    with pytest.raises(ValueError, match=r"already holds snapshots: --previous .* --overwrite"):
        estimate(config_for(two, out, **BY_ROWS))
    with pytest.raises(ValueError, match="would be counted twice: its content is that of"):
        estimate(config_for(one, out, **BY_ROWS, previous=str(out)))
    again = config_for(one, out, **BY_ROWS, previous=str(out), allow_repeated_files=True)
    assert estimate(again).details["rows"] == 400
    estimate(config_for(two, out, **BY_ROWS, overwrite=True))
    assert [path.name for path in schema.snapshot_directories(out)] == ["00000003"]
    assert newest(out)[0].details["rows"] == 200


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 0.1}, "made with alpha 0.05, got 0.1"),
        ({"num_buckets": 42}, "num_buckets 41, got 42"),
        ({"num_hashes": 2}, "num_hashes 3, got 2"),
        ({"batch_size": 32}, "batch_size 64, got 32"),
        ({"step_seconds": 60}, "step_seconds 0, got 60"),
    ],
)
def test_a_stream_keeps_its_settings(tmp_path, parts, snapshot, changed, message):
    config = config_for(parts, tmp_path / "out", **(BY_ROWS | changed), previous=snapshot)
    with pytest.raises(ValueError, match=message):
        estimate(config)
    assert not (tmp_path / "out").exists()


def test_what_is_no_snapshot(tmp_path, parts, snapshot):
    with pytest.raises(ValueError, match="no finished streaming_frequency data"):
        estimate(config_for(parts, tmp_path / "out", **BY_ROWS, previous=tmp_path / "nothing"))
    schema.Manifest("prepared", "s", {}, {}, {}).write(tmp_path)
    with pytest.raises(ValueError, match="'prepared' directory"):
        estimate(config_for(parts, tmp_path / "out", **BY_ROWS, previous=tmp_path))
    with pytest.raises(ValueError, match="is no directory of snapshots"):
        estimate(config_for(parts, tmp_path, **BY_ROWS))
    shutil.copytree(snapshot, tmp_path / "damaged")
    (tmp_path / "damaged" / "interval.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"interval.npy is missing or damaged"):
        estimate(config_for(parts, tmp_path / "out", **BY_ROWS, previous=tmp_path / "damaged"))


def test_one_writer_at_a_time(tmp_path, parts):
    with only_writer(str(tmp_path / "out")), pytest.raises(ValueError, match="another run writes"):
        estimate(config_for(parts, tmp_path / "out", **BY_ROWS))


# --- watching -------------------------------------------------------------------------------


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
    monkeypatch.setattr(watch, "_sleep", arrive)
    manifest = estimate(watched(source, tmp_path / "out", max_polls=5))
    assert state_of(tmp_path / "out") == expected
    names = [Path(one["file"]).name for one in manifest.details["consumed"]]
    assert names == [f"part-{number}.parquet" for number in range(3)]
    looks = [text for text in caplog.messages if "look" in text]
    assert [text.split(": ")[2].split()[0] for text in looks] == ["0", "1", "0", "2", "0"]
    assert len(schema.snapshot_directories(tmp_path / "out")) == 2


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
    original = micro_batch.stage_events

    def stage_and_append(*arguments):
        staged = original(*arguments)
        with open(source / "part-1.parquet", "ab") as file:
            file.write(b"more")
        return staged

    monkeypatch.setattr(micro_batch, "stage_events", stage_and_append)
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
    assert names == [".lock", "00000001.dead_letters.jsonl", "00000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_watch_between_two_jobs(tmp_path, monkeypatch, number):
    source = write_parts(tmp_path / "log", make_rows(300), 2)
    original, calls = watch.write_snapshot, []

    def signalled(*arguments):
        os.kill(os.getpid(), number)
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(watch, "write_snapshot", signalled)
    before = signal.getsignal(number)
    manifest = estimate(watched(source, tmp_path / "out"))  # no max_polls: the signal ends it
    assert len(calls) == 1
    assert len(manifest.details["consumed"]) == 2  # the job that was under way is complete
    assert signal.getsignal(number) is before


# A watch whose workers wait after the first file that a stage has written.
SLOW = """
import sys, time, twotower
from pipeline import event_order, micro_batch, row_steps
room = {"events": event_order, "applied": row_steps}[sys.argv.pop(1)]
def wait(*a, f=room.write_block):
    r = f(*a); print("waiting", flush=True); time.sleep(60); return r
room.write_block = wait
sys.exit(twotower.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", [pytest.param("events", marks=pytest.mark.long), "applied"])
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
        cwd=Path(schema.__file__).parents[1],
        text=True,
    )
    while "waiting" not in job.stdout.readline():
        assert job.poll() is None, "the job ended before it could be killed"
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert (tmp_path / "out" / "00000002.partial").exists()
    kept = {name: sum_ for name, sum_ in digest(tmp_path / "out").items() if "partial" not in name}
    assert kept == before
    estimate(config)
    assert state_of(tmp_path / "out") == expected
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".lock", "00000001", "00000002"]


# --- the command ----------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    source = write(tmp_path / "log.parquet", make_rows(200))
    arguments = ["frequencies", "--source", str(source), "--output", str(tmp_path / "out")]
    assert twotower.main([*arguments, "--streaming", "--num_buckets", "64"]) == 0
    assert newest(tmp_path / "out")[1].shape == (5, 64)
    assert twotower.main([*arguments, "--streaming", "--num_buckets", "64"]) == 2
    error = capsys.readouterr().err.strip()
    assert "already holds snapshots" in error
    assert "\n" not in error
    assert twotower.main([*arguments, "--watch", "--streaming"]) == 2
    assert "--watch needs --step_seconds" in capsys.readouterr().err
