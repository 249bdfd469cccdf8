"""`twotower frequencies`: exact counts, carried on from day to day, against collections.Counter."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import digest, kill_once_there

import twotower
from pipeline.contract import hashing, schema
from pipeline.contract.files import checksum
from pipeline.counts import merge
from pipeline.counts.job import count
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read import readers

HEADER = b"user_id,item_id,timestamp\n"


def run(source, out, *arguments, **settings):
    settings = {"partitions": 3} | settings
    config = FrequenciesConfig(source=str(source), output=str(out), **settings)
    return count(config, list(arguments))


def table(directory):
    paths = sorted(Path(directory).glob("candidate_frequencies-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths])


def counted(directory):
    found = table(directory)
    return dict(zip(found["raw_id"].to_pylist(), found["count"].to_pylist(), strict=True))


def shards(directory):
    return {name: value for name, value in digest(directory).items() if "frequencies" in name}


def write(path, items):
    """A CSV log with one row for each item; its path."""
    rows = [f"u{number},{item},0\n" for number, item in enumerate(items)]
    path.write_bytes(HEADER + "".join(rows).encode())
    return path


@pytest.fixture(scope="module")
def source(log, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "log.parquet"
    pq.write_table(log, path, row_group_size=250)
    return path


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    run(source, out)
    return out


def test_every_row_counts(log, expected):
    items = Counter(log["item_id"].to_pylist())
    found = table(expected)
    assert counted(expected) == items
    prints = found["fingerprint"].to_pylist()
    assert prints == [hashing.fingerprint(raw) for raw in found["raw_id"].to_pylist()]
    assert prints == sorted(prints)
    for row, log_q in zip(found["raw_id"].to_pylist(), found["log_q"].to_pylist(), strict=True):
        assert log_q == pytest.approx(math.log(items[row] / len(log)), rel=1e-14)
    assert [field.type for field in found.schema] == [
        pa.string(),
        pa.int64(),
        pa.float64(),
        pa.float64(),
    ]


def test_the_manifest_describes_what_is_there(log, source, expected):
    manifest = schema.read_manifest(expected, "frequencies")
    items = Counter(log["item_id"].to_pylist())
    sizes = {"read": 3000, "rows": 3000, "items": len(items), "new_items": len(items)}
    assert manifest.counts == sizes | dict.fromkeys(
        ["bad", "below_threshold", "previous_rows", "previous_items", "forgotten_items"], 0
    )
    content = {"bytes": source.stat().st_size, "checksum": checksum(source)}
    assert manifest.details["inputs"] == [{"file": "log.parquet"} | content]
    summary = manifest.details["summary"]
    most = sorted(items.items(), key=lambda pair: (-pair[1], pair[0].encode()))[:20]
    assert [(one["raw_id"], one["count"]) for one in summary["most_frequent"]] == most
    assert (summary["ids"], summary["rows"], manifest.details["total"]) == (len(items), 3000, 3000)
    assert summary["head"]["share_of_rows"] == most[0][1] / 3000
    files = {path.name for path in expected.iterdir()} - {"_manifest.json"}
    assert len(pd.read_parquet(expected)) == manifest.counts["items"]
    assert set(manifest.files) == files == {*shards(expected), "_dead_letters.jsonl"}
    assert sum(one.get("rows", 0) for one in manifest.files.values()) == len(items)


def test_threshold_and_users_decide_which_rows_count(log, source, tmp_path):
    manifest = run(source, tmp_path / "out", rating_threshold=4, user_column="user_id")
    rows = [row for row in log.to_pylist() if row["rating"] >= 4]
    assert counted(tmp_path / "out") == Counter(row["item_id"] for row in rows)
    assert manifest.counts["below_threshold"] == 3000 - len(rows) > 0


def test_key_ranges_do_not_matter(source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 20)
    run(source, tmp_path / "out", partitions=29)
    assert digest(tmp_path / "out") == digest(expected)


@pytest.mark.long
def test_shards_are_ranges_of_one_table(expected, source, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "ITEMS_PER_SHARD", 2)  # so small that some shards are empty
    manifest = run(source, tmp_path / "out")
    names = manifest.files_of(schema.FREQUENCIES)
    assert names == [schema.frequencies_name(n, 40) for n in range(40)]
    assert 0 in [manifest.files[name]["rows"] for name in names]
    assert table(tmp_path / "out").equals(table(expected))
    summary = schema.read_manifest(expected, "frequencies").details["summary"]
    assert manifest.details["summary"] == summary
    monkeypatch.setattr(merge, "ITEMS_PER_SHARD", 50)
    run(write(tmp_path / "day.csv", ["i1"]), tmp_path / "two", previous=str(tmp_path / "out"))
    assert counted(tmp_path / "two") == counted(expected) | {"i1": counted(expected)["i1"] + 1}


@pytest.mark.long
@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_workers_do_not_matter(source, expected, tmp_path, mode):
    run(source, tmp_path / "out", f"--direct_running_mode={mode}", "--direct_num_workers=2")
    assert digest(tmp_path / "out") == digest(expected)


# --- from day to day -------------------------------------------------------------------------


@pytest.mark.long
def test_without_decay_days_add_up_to_the_whole_log(log, expected, tmp_path):
    previous = ""
    for day, first in enumerate((0, 700, 1900)):
        part = log.slice(first, (700, 1200, 1100)[day])
        pq.write_table(part, tmp_path / f"day{day}.parquet")
        manifest = run(
            tmp_path / f"day{day}.parquet", tmp_path / f"{day}", previous=previous, partitions=5
        )
        previous = str(tmp_path / f"{day}")
    assert shards(previous) == shards(expected)
    whole = schema.read_manifest(expected, "frequencies")
    assert manifest.details["summary"] == whole.details["summary"]
    assert (manifest.counts["rows"], manifest.counts["previous_rows"]) == (1100, 1900)
    assert [one["file"] for one in manifest.details["inputs"]] == [
        "day0.parquet",
        "day1.parquet",
        "day2.parquet",
    ]


def test_decay_in_closed_form(log, tmp_path):
    days = [Counter(log.slice(n * 40, 40)["item_id"].to_pylist()) for n in range(3)]
    previous = {}
    for day, items in enumerate(days):
        write(tmp_path / f"{day}.csv", list(items.elements()))
        manifest = run(tmp_path / f"{day}.csv", tmp_path / f"{day}", **previous)
        previous = {"previous": str(tmp_path / f"{day}"), "decay": 0.5}
    assert counted(tmp_path / "2") == {
        item: 0.25 * days[0][item] + 0.5 * days[1][item] + days[2][item]
        for item in days[0] + days[1] + days[2]
    }
    assert manifest.details["total"] == 40 * 1.75
    probabilities = [math.exp(log_q) for log_q in table(tmp_path / "2")["log_q"].to_pylist()]
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    known = set(days[0] + days[1])
    assert manifest.counts["new_items"] == len(set(days[2]) - known) > 0
    assert manifest.counts["previous_items"] == len(known)
    assert set(known) - set(days[2])  # absent on the last day, and still there


def test_a_count_that_decays_to_nothing_is_forgotten(tmp_path):
    """1e-400 is not a float, 1e-310 / 1e15 neither; their log_q would be -inf."""
    ids = np.array([3, 5, 8, 9]), [b"a", b"b", b"c", b"d"]
    previous = [(ids, np.array([1e-200, 1.0, 1e-100, 1e-110]))]
    today = {"ids": [(ids[0][1:2], [b"b"])], "counts": [(ids[0][1:2], np.array([2]))]}
    found = (0, today | {"previous": previous})
    name = merge._merge_range(found, decay=1e-200, out=tmp_path)
    merged = pq.read_table(tmp_path / f"{name}.parquet")
    assert merged["raw_id"].to_pylist() == [b"b", b"c"]
    assert merged["count"].to_pylist() == [2 + 1e-200, 1e-100 * 1e-200]
    sizes = json.loads((tmp_path / f"{name}.json").read_text())
    assert (sizes["previous_items"], sizes["forgotten_items"], sizes["items"]) == (4, 2, 2)
    assert np.log(merged["count"].to_numpy() / 1e15).min() > -np.inf


def test_the_output_may_take_the_place_of_the_earlier_run(tmp_path):
    write(tmp_path / "0.csv", ["a", "b"])
    write(tmp_path / "1.csv", ["b"])
    out = tmp_path / "out"
    run(tmp_path / "0.csv", out)
    run(tmp_path / "1.csv", out, previous=str(out), overwrite=True)
    assert counted(out) == {"a": 1, "b": 2}


def test_a_file_counts_once(tmp_path):
    write(tmp_path / "day0.csv", ["a", "b"])
    run(tmp_path / "day0.csv", tmp_path / "0")
    write(tmp_path / "day1.csv", ["b"])
    run(tmp_path / "day1.csv", tmp_path / "1", previous=str(tmp_path / "0"))
    again = write(tmp_path / "copy.csv", ["a", "b"])  # another name, two runs ago
    with pytest.raises(ValueError, match=r"copy.csv would be counted twice.* day0.csv in an earl"):
        run(again, tmp_path / "2", previous=str(tmp_path / "1"))
    with pytest.raises(
        ValueError, match=r"day0.csv would .*copy.csv in this run; .*--allow_repeated"
    ):
        run(tmp_path / "*.csv", tmp_path / "2")
    settings = {"previous": str(tmp_path / "1"), "allow_repeated_files": True}
    run(again, tmp_path / "2", **settings)
    assert counted(tmp_path / "2") == {"a": 2, "b": 3}


def test_files_without_rows_may_repeat(tmp_path):
    (tmp_path / "day0.csv").write_bytes(HEADER)
    (tmp_path / "day1.csv").write_bytes(HEADER)
    write(tmp_path / "day2.csv", ["a"])
    with pytest.raises(ValueError, match=r"day0.csv holds no rows, as do 1 other"):
        run(tmp_path / "*.csv", tmp_path / "out")
    manifest = run(tmp_path / "*.csv", tmp_path / "out", allow_empty_files=True)
    assert [one["file"] for one in manifest.details["inputs"]] == ["day2.csv"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rating_threshold": 2.0}, "rating_threshold 3.0, this run has 2.0"),
        ({}, "rating_column 'rating', this run has ''"),
        ({"rating_threshold": 3.0, "item_column": "user_id"}, "item_column 'item_id'"),
        ({"rating_threshold": 3.0, "user_column": "user_id"}, "user_column ''"),
    ],
)
def test_counts_of_two_meanings_do_not_mix(source, tmp_path_factory, tmp_path, settings, named):
    earlier = tmp_path_factory.getbasetemp() / "rated"
    if not earlier.exists():
        run(source, earlier, rating_threshold=3.0)
    with pytest.raises(ValueError, match="mix two meanings") as error:
        run(source, tmp_path / "out", previous=str(earlier), **settings)
    assert named in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_that_is_none(source, expected, tmp_path):
    with pytest.raises(ValueError, match="no finished frequencies data"):
        run(source, tmp_path / "out", previous=str(tmp_path / "nowhere"))
    damaged = tmp_path / "damaged"
    write(tmp_path / "day.csv", ["a"])
    run(tmp_path / "day.csv", damaged)
    with open(damaged / schema.frequencies_name(), "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"00001.parquet is missing or not what its manifest says"):
        run(source, tmp_path / "out", previous=str(damaged))
    with pytest.raises(ValueError, match="already exists"):
        run(source, damaged)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_tensorflow_dataset_is_known_by_its_files(tmp_path):
    from pipeline.job import prepare
    from pipeline.prepare.settings import PrepareConfig

    write(tmp_path / "log.csv", ["a", "b", "a"])
    prepared = PrepareConfig(source=str(tmp_path / "log.csv"), output=str(tmp_path / "prepared"))
    prepare(prepared)
    source = f"tfds:{tmp_path / 'prepared'}"
    manifest = run(source, tmp_path / "out", item_column="candidate_id")
    assert counted(tmp_path / "out") == {"0": 2, "1": 1}
    assert {one["checksum"] for one in manifest.details["inputs"]} == {
        checksum(path) for path in (tmp_path / "prepared").glob("*.tfrecord-*")
    }
    with pytest.raises(ValueError, match="counted twice"):
        run(source, tmp_path / "2", item_column="candidate_id", previous=str(tmp_path / "out"))


# --- bad input and accidents -----------------------------------------------------------------


def test_from_the_command_line(tmp_path, capsys, caplog):
    content = write(tmp_path / "log.csv", ["tea"] * 6 + ["milk"] * 3 + ["jam"]).read_bytes()
    (tmp_path / "log.csv").write_bytes(content + b"u1,,3\nu1,x\n")
    arguments = ["frequencies", "--source", str(tmp_path / "log.csv"), "--output"]
    out = tmp_path / "out"
    assert twotower.main([*arguments, str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert "2 of 12 rows" in error
    assert "\n" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out.dead_letters.jsonl"]
    assert twotower.main([*arguments, str(out), "--max_bad_share", "0.2"]) == 0
    assert counted(out) == {"tea": 6, "milk": 3, "jam": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]
    letters = [json.loads(line) for line in (out / "_dead_letters.jsonl").open()]
    assert [(one["row"], one["reason"]) for one in letters] == [
        (11, "item_id is missing"),
        (12, "expected 3 columns, found 2"),
    ]
    for text in (
        "12 rows read: 10 counted, 2 bad",
        "3 items, 3 of them new",
        "items, head: 1 (33.33%) have 60.00% of the rows, 6 or more each",
        "items seen once: 1 (33.33%) with 10.00% of the rows",
        "items, tail: 1 (33.33%) share the last 20% of the rows",
        "most frequent: tea (6), milk (3), jam (1)",
    ):
        assert text in caplog.text
    assert twotower.main([*arguments, str(out), "--decay", "0.5"]) == 2
    assert "--decay needs --previous" in capsys.readouterr().err


def test_no_row_above_the_threshold(source, tmp_path):
    with pytest.raises(ValueError, match=r"no row of .* is left"):
        run(source, tmp_path / "out", rating_threshold=6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["rows", "previous"])
def test_a_runner_that_loses_rows_is_found_out(source, expected, tmp_path, monkeypatch, lost):
    """A block less on its way, in the log or in the earlier counts, and there is no output."""
    name = {"rows": "_count_block", "previous": "_load_previous"}[lost]
    whole = getattr(merge, name)

    def rows(part, block):
        return whole(part, block[1:])

    def previous(path, partitions):
        return list(whole(path, partitions))[1:]

    monkeypatch.setattr(merge, name, locals()[lost])
    write(tmp_path / "day.csv", ["i1", "i2"])
    with pytest.raises(RuntimeError, match=r"nothing is written\. Please report"):
        run(tmp_path / "day.csv", tmp_path / "out", previous=str(expected))
    assert [path.name for path in tmp_path.iterdir()] == ["day.csv"]


@pytest.mark.long
def test_a_killed_job_leaves_nothing_that_looks_finished(source, expected, tmp_path):
    """SIGKILL when the first file of the output is written; the next run then succeeds."""
    out = tmp_path / "out"
    stop = (
        "import sys, time, twotower\n"
        "from pipeline.counts import merge\n"
        "def stop(table, path, write=merge.write_table):\n"
        "    write(table, path); time.sleep(600 * (path.parent.name == 'out'))\n"
        "merge.write_table = stop\n"
        "sys.exit(twotower.main(sys.argv[1:]))\n"
    )
    arguments = ["frequencies", "--source", source, "--output", out]
    kill_once_there(stop, arguments, tmp_path / "out.partial", "out/*.parquet")
    assert not out.exists()
    with pytest.raises(ValueError, match="no finished frequencies data"):
        schema.read_manifest(out, "frequencies")
    run(source, out)
    assert digest(out) == digest(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
