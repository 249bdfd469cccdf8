"""An unbounded stream of files: equal bits to one bounded run, and what becomes of bad files."""

import json
import re
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from object_store import running_store
from prepared import digest
from streaming_log import (
    BY_TIME,
    GOOD,
    HEADER,
    config_for,
    make_rows,
    newest,
    state_of,
    write,
    write_parts,
)

from pipeline.contract import schema, stores
from pipeline.streaming import incoming
from pipeline.streaming.job import estimate


def followed(source, output, **settings):
    settings = BY_TIME | {"max_polls": 1, "snapshot_steps": 7} | settings
    return config_for(source, output, unbounded=True, poll_seconds=0.01, **settings)


def arrays_of(output):
    return state_of(output)[1]


@pytest.fixture
def arrivals(monkeypatch):
    """Functions to call one before each look, the first of which sees what is there already."""
    calls, look = [], incoming.complete_files

    def arrive(config):
        if calls:
            calls.pop(0)()
        return look(config)

    monkeypatch.setattr(incoming, "complete_files", arrive)
    return calls


@pytest.mark.long
def test_following_equals_one_run(tmp_path, parts, arrivals):
    """Files come between looks; of those of one look the rows may be in any order."""
    source = tmp_path / "log"
    source.mkdir()
    for files in ([], [0], [], [2, 1], []):
        arrivals.append(
            lambda files=files: [shutil.copy(parts / f"part-{n}.parquet", source) for n in files]
        )
    estimate(config_for(parts, tmp_path / "one", step_seconds=60))
    manifest = estimate(followed(source, tmp_path / "out", max_polls=5))
    assert not arrivals
    assert arrays_of(tmp_path / "out") == arrays_of(tmp_path / "one")
    rows = make_rows()
    assert manifest.counts == {"applied": len(rows)}
    # Each snapshot on the way holds the rows until its step.
    snapshots = schema.snapshot_directories(tmp_path / "out")
    assert len(snapshots) == 9
    last, origin = (manifest.details[name] for name in ("step", "origin"))
    assert [int(path.name) for path in snapshots] == list(range(last - 56, last + 1, 7))
    middle = [row for row in rows if row[1] < (origin + last - 28) * 60]
    write(tmp_path / "middle.parquet", middle)
    estimate(config_for(tmp_path / "middle.parquet", tmp_path / "half", step_seconds=60))
    for file in schema.read_snapshot(snapshots[4]).files:
        half = (tmp_path / "half" / "00000001" / file).read_bytes()
        assert (snapshots[4] / file).read_bytes() == half


@pytest.mark.long
def test_the_watch_gives_the_same_estimates(tmp_path, parts, arrivals):
    """A job for each look, and one job: the same rows are applied, in time and late."""
    source, rows = tmp_path / "log", make_rows()
    source.mkdir()
    late = write(tmp_path / "late.parquet", [*rows[:5], *rows[-8:]])
    later = write(tmp_path / "later.parquet", [("later", rows[-1][1] + 3600)])
    looks = [[parts / f"part-{n}.parquet"] for n in range(3)] + [[late, later]]
    watched = config_for(source, tmp_path / "watched", watch=True, max_polls=1, **BY_TIME)
    for files in looks:
        for file in files:
            shutil.copy(file, source)
        estimate(watched)
    shutil.rmtree(source)
    source.mkdir()
    for files in looks:
        arrivals.append(lambda files=files: [shutil.copy(file, source) for file in files])
    estimate(followed(source, tmp_path / "out", max_polls=4))
    before_the_last = schema.snapshot_directories(tmp_path / "out")[-2]
    for name, array in newest(tmp_path / "watched")[1].items():
        assert (array == np.load(before_the_last / f"{name}.npy")).all()
    counts = [schema.read_snapshot(path).counts for path in (tmp_path / "watched").glob("0*")]
    assert sum(count["late"] for count in counts) == 5


@pytest.mark.long
def test_snapshots_and_bad_rows_in_a_store(tmp_path, parts, monkeypatch):
    """The same bytes as on the disk; only the newest snapshots stay."""
    source = tmp_path / "log"
    shutil.copytree(parts, source)
    (source / "bad.csv").write_text(HEADER + "i1,never\n")
    estimate(followed(source, tmp_path / "out", keep_snapshots=2))
    with running_store() as environment:
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("s3", use_listings_cache=False)
        store.mkdir("shop")
        estimate(followed(source, "s3://shop/stream", keep_snapshots=2))
        names = [path.name for path in schema.snapshot_directories(tmp_path / "out")]
        assert len(names) == 2
        assert sorted(store.glob("shop/stream/0*")) == [f"shop/stream/{name}" for name in names]
        for name in names:
            copy = stores.local_copy(f"s3://shop/stream/{name}")
            assert digest(copy) == digest(tmp_path / "out" / name)
        (letters,) = store.glob("shop/stream/dead_letters/*")
        (here,) = (tmp_path / "out" / "dead_letters").iterdir()
        assert store.cat_file(letters) == here.read_bytes()
        with pytest.raises(ValueError, match="s3://shop/stream already holds snapshots: go on fr"):
            estimate(followed(source, "s3://shop/stream"))


@pytest.mark.long
def test_rows_that_come_too_late_or_from_the_future_do_not_count(tmp_path, arrivals, caplog):
    caplog.set_level("INFO", "pipeline")
    source = tmp_path / "log"
    source.mkdir()
    rows = make_rows()
    # Rows up to 100 s old are in time by a lateness of 150 s, rows of the first minutes are not.
    later = [("ü1", max(time for _, time in rows) - 100), *rows[:5]]
    future = f"i1,{int(time.time()) + 7200}\n"
    arrivals += [
        lambda: write(source / "a.parquet", rows),
        lambda: write(source / "b.parquet", later),
        lambda: (source / "c.csv").write_text(HEADER + f"ü2,{later[0][1]}\n" * 200 + future),
    ]
    settings = {"max_polls": 4, "max_ahead_seconds": 3600}
    manifest = estimate(followed(source, tmp_path / "out", **settings))
    assert manifest.counts == {"applied": 901 + 200}
    counted = "'future_rows': 1, 'late_rows': 5, 'rows': 1101}"
    assert counted in next(text for text in caplog.messages if "has ended" in text)
    (letters,) = (tmp_path / "out" / "dead_letters").glob("*.jsonl")
    letter = json.loads(letters.read_text())
    assert letter["reason"] == "timestamp is in the future"
    assert letter["source"].endswith("c.csv")


BAD = {
    "broken.parquet": (b"PAR1 and no more", "is not a Parquet file"),
    "column.csv": (b"item_id,time\ni1,5\n", "has no column 'timestamp'"),
    "rows.csv": ((HEADER + "i1,never\n" * 3).encode(), "3 of 3 rows of .* are bad"),
}


@pytest.mark.long
def test_a_bad_file_is_set_aside_and_the_stream_goes_on(tmp_path, parts, caplog):
    source = tmp_path / "log"
    shutil.copytree(parts, source)
    for name, (content, _) in BAD.items():
        (source / name).write_bytes(content)
    estimate(config_for(parts, tmp_path / "one", step_seconds=60))
    estimate(followed(source, tmp_path / "out", max_polls=2))
    assert arrays_of(tmp_path / "out") == arrays_of(tmp_path / "one")
    lines = [path.read_text() for path in (tmp_path / "out" / "dead_letters").glob("*.jsonl")]
    assert len(lines) == len(BAD)
    for letter in map(json.loads, lines):
        assert re.search(BAD[Path(letter["source"]).name][1], letter["set_aside"])
        assert f"{letter['source']} is set aside: {letter['set_aside']}" in caplog.text


@pytest.mark.long
def test_a_file_that_changes_is_set_aside_and_one_that_goes_is_forgotten(tmp_path, arrivals):
    source = tmp_path / "log"
    source.mkdir()
    (source / "a.csv").write_text(HEADER + GOOD)
    arrivals += [
        lambda: None,
        lambda: (source / "a.csv").write_text(HEADER + 2 * GOOD),
        lambda: (source / "a.csv").unlink(),
        lambda: (source / "a.csv").write_text(HEADER + GOOD),  # a new file of that name
    ]
    settings = {"max_polls": 4, "allowed_lateness_seconds": 290}
    manifest = estimate(followed(source, tmp_path / "out", **settings))
    assert manifest.counts == {"applied": 2 * GOOD.count("\n")}
    (letters,) = (tmp_path / "out" / "dead_letters").glob("*.jsonl")
    assert "has changed since it was read" in letters.read_text()


@pytest.mark.long
def test_step_1_waits_for_the_watermark(tmp_path, arrivals):
    """Rows of a second look may be older than those of the first, by the lateness."""
    source = tmp_path / "log"
    source.mkdir()
    rows = make_rows(num_rows=200, seconds=300)
    parts = write_parts(tmp_path / "parts", sorted(rows, key=lambda row: -row[1]), 3)
    for number in range(3):
        arrivals.append(lambda number=number: shutil.copy(parts / f"part-{number}.parquet", source))
    estimate(config_for(parts, tmp_path / "one", step_seconds=60))
    settings = {"max_polls": 3, "allowed_lateness_seconds": 500}
    estimate(followed(source, tmp_path / "out", **settings))
    assert arrays_of(tmp_path / "out") == arrays_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_polls": 0}, "--unbounded needs a runner for streams"),
        ({"source": "nowhere"}, "nowhere does not exist; check --source"),
        ({"step_seconds": 0, "allowed_lateness_seconds": 0}, "needs --streaming and --step_secon"),
        ({"watch": True}, "--unbounded does not go with --watch"),
        ({"source": "tfds:movielens"}, "--watch and --unbounded need files"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, parts, settings, problem):
    settings = {"source": str(parts)} | settings
    with pytest.raises(ValueError, match=problem):
        estimate(followed(output=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_bounded_run_does_not_go_on_from_an_unbounded_one(tmp_path, parts):
    """Its snapshots know no files: their rows would be counted again."""
    out = tmp_path / "out"
    estimate(followed(parts, out))
    before = newest(out)[0]
    with pytest.raises(ValueError, match="was made with unbounded True, got False"):
        estimate(config_for(parts, out, previous=str(out), **BY_TIME))
    with pytest.raises(ValueError, match="already holds snapshots: go on from a savepoint"):
        estimate(followed(parts, out))
    assert newest(out)[0] == before
    assert np.isfinite(newest(out)[1]["interval"]).all()
