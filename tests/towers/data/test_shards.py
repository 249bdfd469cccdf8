import os
import subprocess
import sys

import numpy as np
import pytest

from towers.data.interactions import open_data

# Decodes where no file may be larger than a few bytes: real EFBIG, and SIGBUS without care.
FULL = """
import resource, sys
from pathlib import Path
import towers.data.shards
from pipeline import schema

root = Path(sys.argv[1])
manifest = schema.read_manifest(root, "prepared")
original = towers.data.shards._cache_roots

def cache_roots(path):
    for place, cache in enumerate(original(path)):
        if place == 1 and sys.argv[2] == "one":  # only the first place is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, -1))
        yield cache

towers.data.shards._cache_roots = cache_roots
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
try:
    arrays = towers.data.shards.load_split(root, manifest, "train")
except ValueError as error:
    print("ERROR", error)
else:
    print("ROWS", len(arrays["query_id"]))
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


@pytest.mark.parametrize(
    ("full", "text"),
    [("one", "ROWS {rows}"), pytest.param("all", "or make room", marks=pytest.mark.long)],
)
def test_a_full_disk_is_left_for_the_next_place(data, make_prepared, tmp_path, full, text):
    directory = make_prepared(data)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(directory), full],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert text.format(rows=data.num_rows("train")) in done.stdout
    assert list((directory / ".arrays").iterdir()) == []  # nothing half decoded


@pytest.mark.long
def test_a_disk_that_fills_up_under_mapped_files_kills_nobody(data, make_prepared, tmp_path):
    directory = make_prepared(data)
    (directory / ".arrays").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(directory / ".arrays")]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    script = FULL.replace("resource.setrlimit", "0 and resource.setrlimit")
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(directory), "all"],
            capture_output=True,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
    finally:
        subprocess.run(["umount", "-l", str(directory / ".arrays")], check=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"ROWS {data.num_rows('train')}" in done.stdout
