"""Directories of snapshots: which one a run goes on from, and what is refused."""

import errno
import fcntl
import shutil

import fsspec
import pytest
from streaming_log import BY_ROWS, config_for, make_rows, newest, write

from pipeline.contract import schema
from pipeline.streaming.job import estimate
from pipeline.streaming.snapshots import keep_newest, only_writer


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A snapshot of other rows, by rows."""
    directory = tmp_path_factory.mktemp("snapshot")
    source = write(directory / "log.parquet", make_rows(100, seed=1))
    estimate(config_for(source, directory / "out", **BY_ROWS))
    return directory / "out" / "00000001"


def test_what_an_output_already_holds(tmp_path, snapshot):
    one = snapshot.parents[1] / "log.parquet"
    two = write(tmp_path / "2.parquet", make_rows(200, seed=2))
    out = tmp_path / "out"
    shutil.copytree(snapshot.parent, out)
    with pytest.raises(ValueError, match=r"already holds snapshots: --previous .* --overwrite"):
        estimate(config_for(two, out, **BY_ROWS))
    with pytest.raises(ValueError, match="would be counted twice: its content is that of"):
        estimate(config_for(one, out, **BY_ROWS, previous=str(out)))
    again = config_for(one, out, **BY_ROWS, previous=str(out), allow_repeated_files=True)
    assert estimate(again).details["rows"] == 200
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
        ({"item_column": "product"}, "item_column item_id, got product"),
        ({"timestamp_column": "when"}, "timestamp_column timestamp, got when"),
        ({"timestamp_format": "ms"}, "timestamp_format s, got ms"),
        ({"rating_threshold": 4}, "rating_threshold None, got 4"),
    ],
)
def test_a_stream_keeps_its_settings(tmp_path, snapshot, changed, message):
    source = tmp_path / "log.csv"
    source.write_text("item_id,timestamp,product,when,rating\na,1,b,2,5\n")
    config = config_for(source, tmp_path / "out", **(BY_ROWS | changed), previous=snapshot)
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


def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="No locks available"), only_writer(str(tmp_path / "out")):
        pass


def test_an_upload_that_was_killed_takes_no_place_among_the_newest_snapshots():
    store = fsspec.filesystem("memory")
    for number in (1, 2):
        store.pipe_file(f"/shop/{number:08d}/{schema.MANIFEST}", b"{}")
    store.pipe_file("/shop/00000003/run-0/last_step.npy", b"")
    keep_newest("memory://shop", 1)
    assert store.glob("/shop/*/*.json") == [f"/shop/00000002/{schema.MANIFEST}"]
