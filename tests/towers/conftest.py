"""Small data sets: a checkerboard, random pairs, and a prepared directory written by hand."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from attributed import prepare_attributed

from pipeline.contract import schema
from pipeline.contract.files import describe_files
from towers.data.dataframe import from_dataframe
from towers.training.settings import TrainConfig
from towers.training.train import train


def random_pairs(num_queries=60, num_candidates=50, rows=1500, seed=0):
    """Pairs with popular candidates; no pair twice."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, num_queries, rows)
    items = (num_candidates * rng.random(rows) ** 2).astype(int)
    df = pd.DataFrame({"user_id": users, "item_id": [f"i{item}" for item in items]})
    return df.drop_duplicates(ignore_index=True)


def write_prepared(directory, data, num_shards=2):
    """What `twotower prepare` writes, from a RetrievalData."""
    directory.mkdir()
    counts, rows = {}, {}
    columns = list(data.arrays("train"))
    for split in schema.SPLITS:
        arrays = data.arrays(split)
        counts[split] = len(arrays[schema.QUERY_ID])
        if counts[split] == 0:
            continue
        shards = np.array_split(np.arange(counts[split]), num_shards)
        for number, shard in enumerate(shards):
            name = schema.shard_name(split, number, num_shards)
            rows[name] = len(shard)
            with tf.io.TFRecordWriter(str(directory / name)) as writer:
                for row in shard:
                    writer.write(_example({c: arrays[c][row] for c in columns}))
    _write_tables(directory, data)
    manifest = schema.Manifest(
        kind="prepared",
        source="test",
        configuration={},
        counts=counts,
        files=describe_files(directory, rows),
        details={"columns": columns},
    )
    manifest.write(directory)
    return directory


def _example(values):
    features = {}
    for name, value in values.items():
        if name == schema.WEIGHT:
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        else:
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def _write_tables(directory, data):
    """Vocabularies and train counts, in two shards each."""
    for side in schema.SIDES:
        vocabulary = getattr(data, f"{side}_vocabulary")
        table = pa.table(
            {
                schema.RAW_ID: vocabulary.raw_ids,
                schema.FINGERPRINT: vocabulary.fingerprints,
                schema.COUNT: vocabulary.counts,
            }
        )
        _write_halves(table, lambda n, side=side: directory / schema.vocabulary_name(side, n, 2))
    counts = pa.table({schema.COUNT: data.train_counts})
    _write_halves(counts, lambda n: directory / schema.train_counts_name(n, 2))


def _write_halves(table, path):
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), path(0))
    pq.write_table(table.slice(half), path(1))


@pytest.fixture(scope="session")
def pairs():
    return random_pairs()


@pytest.fixture(scope="session")
def data(pairs):
    """Random pairs with a validation part."""
    return from_dataframe(pairs, user="user_id", item="item_id", validation_ratio=0.2)


@pytest.fixture(scope="session")
def prepared(data, tmp_path_factory):
    """The same as a prepared directory."""
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared", data)


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory):
    """The settings of a finished run of two epochs, and what its training returned: to be read."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        data=str(prepared),
        run=str(run),
        dim=8,
        batch_size=32,
        epochs=2,
        l2=1e-4,
        temperature=0.5,
        jit_compile=False,
    )
    return config, train(config)


@pytest.fixture(scope="session")
def attributed(tmp_path_factory):
    """A prepared directory with attributes of users and items, see `tests/support/attributed`."""
    return prepare_attributed(tmp_path_factory.mktemp("attributed"))


@pytest.fixture
def make_prepared(tmp_path):
    """(data) → a prepared directory of its own."""
    return lambda data, name="prepared": write_prepared(tmp_path / name, data)


@pytest.fixture(scope="session")
def checkerboard():
    """Even queries chose even candidates, odd ones odd: one pair of each query is held out."""
    pairs = [(q, c) for q in range(20) for c in range(20) if q % 2 == c % 2]
    df = pd.DataFrame(pairs, columns=["user_id", "item_id"])
    return from_dataframe(df, user="user_id", item="item_id", train_ratio=0.9)
