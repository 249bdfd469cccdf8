"""Logs of interactions for jobs of streaming frequencies, and what a snapshot holds."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import hashing, schema
from pipeline.counts.settings import FrequenciesConfig
from pipeline.streaming.estimator import STATE

HEADER = "item_id,timestamp\n"
GOOD = "".join(f"i{n % 7},{1000 + 10 * n}\n" for n in range(30))

SIZES = {"num_buckets": 41, "num_hashes": 3, "alpha": 0.05}
BY_ROWS = {"batch_size": 64}
BY_TIME = {"step_seconds": 60, "allowed_lateness_seconds": 150}


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
    """The manifest and the arrays of the newest snapshot."""
    path = schema.snapshot_directories(output)[-1]
    manifest = schema.read_manifest(path, "streaming_frequency")
    return manifest, {name: np.load(path / f"{name}.npy") for name in STATE.names}


def state_of(output):
    """Every bit of a snapshot that a later run or a trainer reads."""
    manifest, state = newest(output)
    path = schema.snapshot_directories(output)[-1] / "pending.npy"
    pending = path.read_bytes() if path.exists() else b""
    details = {name: manifest.details[name] for name in ("step", "rows", "origin", "newest")}
    return details, {name: array.tobytes() for name, array in state.items()}, pending


def by_rows(rows, size):
    """(step, fingerprint) where rows in the order of time, then of the source, decide."""
    in_order = sorted(rows, key=lambda row: row[1])  # stable
    return [(i // size + 1, hashing.fingerprint(item)) for i, (item, _) in enumerate(in_order)]


def by_time(rows, seconds, lateness):
    """(step, fingerprint) of the rows that are applied, and how many are pending."""
    first = min(time // seconds for _, time in rows)
    last = (max(time for _, time in rows) - lateness) // seconds
    applied = [
        (time // seconds - first + 1, item) for item, time in rows if time // seconds <= last
    ]
    return [(t, hashing.fingerprint(item)) for t, item in applied], len(rows) - len(applied)
