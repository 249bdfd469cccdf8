"""Prepared data with attributes of both sides, times, and ids without interactions."""

import attributes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig

USERS = [f"u{n}" for n in range(30)]  # u28 has test rows alone, u29 none
COLD_USERS = ["u29"]


def make_users(seed=7):
    rng = np.random.default_rng(seed)
    return [
        {
            "user_id": user,
            "age": None if n % 6 == 0 else float(rng.normal(40, 10)),
            "town": ["Ulm", "Bern", "Wien", None][rng.integers(4)],
        }
        for n, user in enumerate(USERS)
    ]


def write_log(directory, seed=3):
    """Train, validation and test files; times repeat within a user."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    for name, items, rows in (
        ("train", attributes.TRAIN, 500),
        ("validation", attributes.TRAIN, 40),
        ("test", attributes.ITEMS[30:50], 120),
    ):
        users = [USERS[n] for n in rng.integers(0, 29 if name == "test" else 28, rows)]
        chosen = [items[n] for n in rng.integers(0, len(items), rows)]
        chosen[: len(items)] = items  # each has a row
        times = rng.integers(0, 12, rows)
        table = pa.table({"user_id": users, "item_id": chosen, "timestamp": times})
        pq.write_table(table, directory / f"{name}.parquet")
    return str(directory)


def prepare_attributed(directory):
    """The directory of prepared data: items as in `attributes`, users as above."""
    pq.write_table(attributes.as_table(attributes.make_items()), directory / "items.parquet")
    pq.write_table(pa.Table.from_pylist(make_users()), directory / "users.parquet")
    config = PrepareConfig(
        source=write_log(directory / "log"),
        output=str(directory / "prepared"),
        split="given",
        rows_per_shard=250,
        user_features=str(directory / "users.parquet"),
        item_features=str(directory / "items.parquet"),
        item_feature_kinds=attributes.FLAGS,
    )
    prepare(config, [])
    return directory / "prepared"
