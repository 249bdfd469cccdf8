import os
import resource
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from pipeline.contract import schema
from towers.data import shards
from towers.data.interactions import open_data

# A process of its own: without care the write to a mapped file ends in SIGBUS.
DECODE = """
import sys
from towers.data.interactions import open_data

print("ROWS", open_data(sys.argv[1]).num_rows("train"))
"""


def arrays_of(directory):
    return next((directory / ".arrays").glob("train-*"))


def test_a_shard_that_was_only_touched_is_as_good_as_ever(data, make_prepared):
    directory = make_prepared(data)
    open_data(directory)
    decoded = (arrays_of(directory) / "query_id.npy").stat().st_ino
    for shard in directory.glob("*-train.tfrecord-*"):
        os.utime(shard, (1, 1))
    for _ in range(2):
        opened = open_data(directory)
        np.testing.assert_array_equal(
            opened.arrays("train")["query_id"], data.arrays("train")["query_id"]
        )
    assert (arrays_of(directory) / "query_id.npy").stat().st_ino == decoded


def test_a_shard_that_changed_after_it_was_decoded_is_noticed(data, make_prepared):
    directory = make_prepared(data)
    open_data(directory)
    shard = next(directory.glob("*-train.tfrecord-*"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="was changed since its preparation"):
            open_data(directory)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing from its preparation"):
        open_data(directory)


@pytest.mark.parametrize("damage", ["cut", "edited", "gone"])
def test_damaged_arrays_are_decoded_again(data, make_prepared, damage):
    directory = make_prepared(data)
    open_data(directory)
    path = arrays_of(directory) / "query_id.npy"
    if damage == "cut":
        os.truncate(path, 300)
    elif damage == "edited":
        array = np.load(path)
        np.save(path, array + 1)
    else:
        path.unlink()
    opened = open_data(directory)
    np.testing.assert_array_equal(
        opened.arrays("train")["query_id"], data.arrays("train")["query_id"]
    )


@pytest.mark.parametrize("full", ["one", "all"])
def test_a_full_disk_is_left_for_the_next_place(data, make_prepared, tmp_path, monkeypatch, full):
    """No file may be larger than a few bytes: real EFBIG."""
    directory, roots, limit = make_prepared(data), shards._cache_roots, resource.RLIMIT_FSIZE
    manifest = schema.read_manifest(directory, "prepared")
    _, most = resource.getrlimit(limit)

    def cache_roots(path):
        for place, cache in enumerate(roots(path)):
            if place == 1 and full == "one":  # only the first place is full
                resource.setrlimit(limit, (most, most))
            yield cache

    monkeypatch.setattr(shards, "_cache_roots", cache_roots)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (200, most))
    try:
        rows = len(shards.load_split(directory, manifest, "train")["query_id"])
    except ValueError as error:
        rows = str(error)
    finally:
        resource.setrlimit(limit, before)
    assert rows == data.num_rows("train") if full == "one" else "or make room" in rows
    assert list((directory / ".arrays").iterdir()) == []  # nothing half decoded


@pytest.mark.long
def test_a_disk_that_fills_up_under_mapped_files_kills_nobody(data, make_prepared, tmp_path):
    directory = make_prepared(data)
    (directory / ".arrays").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(directory / ".arrays")]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        done = subprocess.run(
            [sys.executable, "-c", DECODE, str(directory)],
            capture_output=True,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
    finally:
        subprocess.run(["umount", "-l", str(directory / ".arrays")], check=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"ROWS {data.num_rows('train')}" in done.stdout
