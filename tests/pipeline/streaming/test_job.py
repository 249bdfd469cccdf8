"""The job of streaming frequencies: equal bits however it is divided, stopped or killed."""

import dataclasses
import json
import time

import numpy as np
import pytest
from paper_recursion import Paper
from prepared import digest
from streaming_log import (
    BY_ROWS,
    BY_TIME,
    GOOD,
    HEADER,
    SIZES,
    by_rows,
    by_time,
    config_for,
    make_rows,
    newest,
    state_of,
    write,
    write_parts,
)

import twotower
from pipeline.beam.options import beam_options
from pipeline.beam.staging import Staging
from pipeline.contract import hashing, schema
from pipeline.read import readers
from pipeline.read.discover import find_pieces
from pipeline.streaming import estimator, steps
from pipeline.streaming.job import estimate

# --- the result -----------------------------------------------------------------------------


def test_rows_decide_the_step(tmp_path, monkeypatch):
    """In the order of time over all files; where times are equal, of files and rows."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", 50)
    rows = make_rows(jitter=2000)
    source = write_parts(tmp_path / "log", rows, 3)
    manifest = estimate(config_for(source, tmp_path / "out", **BY_ROWS, partitions=7))
    _, state = newest(tmp_path / "out")
    Paper.over(by_rows(rows, 64), **SIZES).check(state)
    assert manifest.details["step"] == -(-len(rows) // 64)
    assert manifest.details["rows_per_step"] == 64


def test_event_time_decides_the_step(tmp_path, parts, expected):
    rows = make_rows()
    manifest = estimate(config_for(parts, tmp_path / "out", **BY_TIME, partitions=64))
    assert state_of(tmp_path / "out") == expected
    events, num_pending = by_time(rows, 60, 150)
    _, state = newest(tmp_path / "out")
    Paper.over(events, **SIZES).check(state)
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
    _, state = newest(tmp_path / "out")
    Paper.over(by_rows([(item, 0) for item, _ in rows], 64), **SIZES).check(state)


@pytest.mark.parametrize("times", ["equal", "long tail"])
def test_no_worker_puts_the_whole_log_in_order(tmp_path, times):
    """One item, whatever its times: every range of the order has its share of the rows."""
    values = {"equal": [7] * 2000, "long tail": [n**4 for n in range(2000)]}
    source = write(tmp_path / "log.parquet", [("x", time) for time in values[times]])
    config = config_for(source, tmp_path / "out", **BY_ROWS, partitions=8)
    with Staging(config.output, False, beam_options([])) as staging:
        events = steps.stage_events(find_pieces(config), config, staging)
        ordered = steps.order_events(events, 8, staging)
        for files in (events, ordered):
            sizes = [len(np.load(path)) for path in files]
            assert sum(sizes) == 2000
            assert max(sizes) <= 2 * 2000 / 8


@pytest.mark.long
def test_threads_do_not_matter(tmp_path, parts, expected):
    flags = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    estimate(config_for(parts, tmp_path / "out", **BY_TIME), flags)
    assert state_of(tmp_path / "out") == expected


@pytest.mark.long
@pytest.mark.parametrize("mode", [BY_ROWS, BY_TIME], ids=["rows", "time"])
def test_workers_do_not_matter(tmp_path, parts, mode):
    estimate(config_for(parts, tmp_path / "one", **mode))
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    estimate(config_for(parts, tmp_path / "two", **mode), flags)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


@pytest.mark.long
@pytest.mark.clock  # ports
def test_a_cluster_gives_the_same_bytes(tmp_path, parts):
    distributed = pytest.importorskip("distributed")
    estimate(config_for(parts, tmp_path / "one", **BY_ROWS))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        flags = ["--runner=DaskRunner", f"--dask_client_address={cluster.scheduler_address}"]
        estimate(config_for(parts, tmp_path / "two", **BY_ROWS), flags)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


# --- one run after the other ----------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(BY_ROWS, id="rows"),
        pytest.param({"step_seconds": 60}, id="time", marks=pytest.mark.long),
    ],
)
def test_restarting_from_a_snapshot_equals_no_restart(tmp_path, mode):
    """The files end inside steps; `test_watch` has the same with lateness."""
    rows = make_rows(jitter=0)
    source = write_parts(tmp_path / "log", rows, 2)
    estimate(config_for(source, tmp_path / "whole", **mode))
    for number in range(2):
        previous = str(tmp_path / "out") if number else ""
        part = source / f"part-{number}.parquet"
        config = config_for(part, tmp_path / "out", previous=previous, **mode)
        manifest = estimate(dataclasses.replace(config, partitions=number + 1))
    assert state_of(tmp_path / "out") == state_of(tmp_path / "whole")
    assert (manifest.counts["late"], manifest.counts["pending"]) == (0, 0)
    assert len(manifest.details["consumed"]) == 2
    if mode != BY_ROWS:
        Paper.over(by_time(rows, 60, 0)[0], **SIZES).check(newest(tmp_path / "out")[1])


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
    expected = sorted([hashing.fingerprint(item), period, rows] for item, period, rows in pending)
    assert found.tolist() == expected
    assert manifest.counts["pending"] == sum(rows for *_, rows in pending)
    events = [(t, hashing.fingerprint(item)) for t, item in applied]
    Paper.over(events, **SIZES).check(newest(tmp_path / "out")[1])


def test_late_rows_are_counted_and_dropped(tmp_path):
    mode = {"step_seconds": 10, "allowed_lateness_seconds": 20}
    write(tmp_path / "1.parquet", [("a", 1005), ("b", 1012), ("c", 1034), ("a", 1033)])
    # W = 1014: step 1 and 2 are applied. Period 101 is step 2: its row is not late.
    write(tmp_path / "2.parquet", [("d", 1013), ("b", 1009), ("b", 1000), ("e", 1061)])
    estimate(config_for(tmp_path / "1.parquet", tmp_path / "out", **mode))
    config = config_for(tmp_path / "2.parquet", tmp_path / "out", **mode, previous=tmp_path / "out")
    with pytest.raises(ValueError, match="lateness_seconds 20, got 0: rows that it would still"):
        estimate(dataclasses.replace(config, allowed_lateness_seconds=0))
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
    events = [(t, hashing.fingerprint(item)) for t, item in applied]
    Paper.over(events, **SIZES).check(newest(tmp_path / "out")[1])


def test_a_time_in_the_future_does_not_move_the_stream(tmp_path):
    now = int(time.time())
    times = [now - 30, now - 20, now + 5_000_000_000, now + 86_400 + 900, now + 80_000]
    write(tmp_path / "1.parquet", [("a", time) for time in times])
    mode = {"step_seconds": 10, "max_bad_share": 1}
    manifest = estimate(config_for(tmp_path / "1.parquet", tmp_path / "out", **mode))
    assert manifest.details["newest"] == now + 80_000
    assert (manifest.counts["bad"], manifest.counts["applied"]) == (2, 3)
    letters = (tmp_path / "out" / "00000001" / "dead_letters.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in letters] == [3, 4]
    assert {json.loads(line)["reason"] for line in letters} == {"timestamp is in the future"}


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        ({}, "--previous, else"),
        ({"watch": True, "max_polls": 1}, "--previous and another --output"),
    ],
)
def test_more_late_rows_than_the_share_is_an_error(tmp_path, mode, remedy):
    late = [("c", 1015), ("d", 1025), ("e", 50_001)]
    for number, rows in enumerate(([("z", 1000)], [("a", 1005), ("b", 50_000)], late), 1):
        write(tmp_path / f"{number}.parquet", rows)
    out, mode = tmp_path / "out", mode | {"step_seconds": 10}
    estimate(config_for(tmp_path / "1.parquet", out, step_seconds=10))
    estimate(config_for(tmp_path / "2.parquet", out, step_seconds=10, previous=out))
    source = tmp_path / ("*.parquet" if "watch" in mode else "3.parquet")
    with pytest.raises(ValueError, match=r"2 of 3 rows are late, .* 1970-01-01T13:53:20") as error:
        estimate(config_for(source, out, **mode, previous=out))
    assert remedy in str(error.value)
    assert len(schema.snapshot_directories(out)) == 2
    (tmp_path / "2.parquet").unlink()  # as the error says
    other = tmp_path / "other" if "watch" in mode else out
    manifest = estimate(config_for(source, other, **mode, previous=out / "00000001"))
    assert (manifest.counts["applied"], manifest.counts["late"]) == (3, 0)


# --- bad input ------------------------------------------------------------------------------


def test_bad_rows_go_to_the_dead_letters(tmp_path):
    bad = ",1100\n" + "i1,noon\n" + "i1\n"
    (tmp_path / "log.csv").write_text(HEADER + GOOD + bad)
    manifest = estimate(
        config_for(tmp_path / "log.csv", tmp_path / "out", **BY_TIME, max_bad_share=0.1)
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
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"log.csv"}
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
    original = estimator.Estimator.by_range

    def without_one_key(self, block):
        yield from list(original(self, block))[1:]

    with monkeypatch.context() as patch:
        patch.setattr(estimator.Estimator, "by_range", without_one_key)
        with pytest.raises(RuntimeError, match="the hash arrays counted"):
            estimate(config_for(source, tmp_path / "out", **BY_ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_stage_others", lambda key, rows, out: None)  # late and pending ones
        with pytest.raises(RuntimeError, match=r"200 rows went in, \d+ came out"):
            estimate(config_for(source, tmp_path / "out", **BY_TIME))
    assert not (tmp_path / "out").exists()


# --- the command ----------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    source = write(tmp_path / "log.parquet", make_rows(200))
    arguments = ["frequencies", "--source", str(source), "--output", str(tmp_path / "out")]
    assert twotower.main([*arguments, "--streaming", "--num_buckets", "64"]) == 0
    assert newest(tmp_path / "out")[1]["weight"].shape == (5, 64)
    assert twotower.main([*arguments, "--streaming", "--num_buckets", "64"]) == 2
    error = capsys.readouterr().err.strip()
    assert "already holds snapshots" in error
    assert "\n" not in error
    assert twotower.main([*arguments, "--watch", "--streaming"]) == 2
    assert "--watch needs --step_seconds" in capsys.readouterr().err
