"""Reads prepared data back without any of the code under test, and kills a job that makes it."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf


def write_log_with_items(log, folder, *, rows_a_group):
    """Writes a log of interactions, and beside it the attributes of its items: the log's path."""
    path = folder / "log.parquet"
    pq.write_table(log, path, row_group_size=rows_a_group)
    items = sorted(set(log["item_id"].to_pylist()))
    attributes = {"item_id": items, "price": [len(item) / 3 for item in items], "kind": items}
    pq.write_table(pa.table(attributes), path.with_name("items.parquet"), row_group_size=20)
    return path


def digest(directory):
    """name → checksum of every file, so that two directories can be compared."""
    root = Path(directory)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def kill_once_there(script, arguments, directory, pattern):
    """SIGKILL for all processes of a command as soon as a file of that pattern is there.

    Args:
      script: Python, which slows the command down so that there is a moment to kill in.
      arguments: of the command.
    """
    job = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(Path(directory).glob(pattern)):
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def examples(directory, split, *columns):
    """The rows of a split, in their order: float64 [n, len(columns)]."""
    names = columns or ("query_id", "candidate_id")
    rows = []
    for path in sorted(Path(directory).glob(f"interactions-{split}.tfrecord-*")):
        for record in tf.data.TFRecordDataset(str(path)):
            feature = tf.train.Example.FromString(record.numpy()).features.feature
            rows.append(
                [(*feature[n].int64_list.value, *feature[n].float_list.value)[0] for n in names]
            )
    return np.array(rows, np.float64).reshape(-1, len(names))


def vocabulary(directory, side):
    """The raw ids of a side in dense-id order."""
    paths = sorted(Path(directory).glob(f"{side}_vocabulary-*.parquet"))
    return [raw for path in paths for raw in pq.read_table(path)["raw_id"].to_pylist()]


def raw_pairs(directory, split):
    """The (raw user, raw item) pairs of a split, in their order."""
    users, items = vocabulary(directory, "query"), vocabulary(directory, "candidate")
    return [(users[int(q)], items[int(c)]) for q, c in examples(directory, split)]
