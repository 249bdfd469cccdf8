"""The rules of preparation, each against a plain loop over rows."""

import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import digest, examples, raw_pairs, vocabulary

from pipeline.beam.blocks import ROW, drop_duplicates
from pipeline.contract import hashing, schema
from pipeline.contract.files import checksum
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig


def run(log, tmp_path, **settings):
    pq.write_table(log, tmp_path / "log.parquet")
    config = PrepareConfig(
        source=str(tmp_path / "log.parquet"), output=str(tmp_path / "out"), **settings
    )
    return prepare(config), tmp_path / "out"


def distinct(log):
    """(user, item) → the earliest time, in the order of the log where times are equal."""
    first = {}
    for row in log.to_pylist():
        pair = (row["user_id"], row["item_id"])
        first[pair] = min(first.get(pair, row["timestamp"]), row["timestamp"])
    return first


def k_core(pairs, min_user, min_item):
    """One row at a time, until nothing changes."""
    pairs = set(pairs)
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = {(u, i) for u, i in pairs if users[u] >= min_user and items[i] >= min_item}
        if kept == pairs:
            return pairs
        pairs = kept


@pytest.mark.parametrize(("min_user", "min_item"), [(1, 1), (3, 1), (1, 4), (5, 5), (7, 8)])
def test_k_core_to_a_fixed_point(log, tmp_path, min_user, min_item):
    manifest, out = run(
        log, tmp_path, min_user_interactions=min_user, min_item_interactions=min_item
    )
    expected = k_core(distinct(log), min_user, min_item)
    assert set(raw_pairs(out, "train")) | set(raw_pairs(out, "test")) == expected
    counts = manifest.counts
    assert counts["read"] == counts["rows"] + counts["duplicates"] + counts["k_core"]
    assert counts["rows"] == len(expected)


def test_a_k_core_that_needs_many_passes(tmp_path):
    # A path u0-i0-u1-i1-… falls apart from its ends, one row a round; the square stays.
    path = [(f"u{n // 2 + n % 2}", f"i{n // 2}") for n in range(41)]
    square = [(u, i) for u in ("a", "b") for i in ("x", "y")]
    users, items = zip(*path, *square, strict=True)
    log = pa.table({"user_id": users, "item_id": items})
    _, out = run(log, tmp_path, min_user_interactions=2, min_item_interactions=2)
    assert set(raw_pairs(out, "train")) | set(raw_pairs(out, "test")) == set(square)


def test_the_earliest_duplicate_stays(tmp_path):
    log = pa.table(
        {"user_id": ["a"] * 4, "item_id": ["x", "y", "x", "y"], "timestamp": [5, 7, 3, 9]}
    )
    _, out = run(log, tmp_path, train_ratio=1.0)
    items = vocabulary(out, "candidate")
    rows = examples(out, "train", "candidate_id", "timestamp")
    assert {items[int(c)]: t for c, t in rows} == {"x": 3, "y": 7}


@pytest.mark.parametrize("duplicates", ["first", "sum", "max"])
def test_weights_of_repeated_pairs(log, tmp_path, duplicates):
    weights = np.random.default_rng(3).uniform(0, 9, len(log)).astype(np.float32)
    log, files = log.append_column("w", pa.array(weights)), []
    for partitions in (1, 5):
        settings = {"duplicates": duplicates, "partitions": partitions, "overwrite": True}
        _, out = run(log, tmp_path, weight_column="w", train_ratio=1.0, **settings)
        files.append(digest(out))
    assert files[0] == files[1]
    found = defaultdict(list)
    for row in sorted(log.to_pylist(), key=lambda row: row["timestamp"]):
        found[row["user_id"], row["item_id"]].append(row["w"])
    combine = {"first": lambda w: w[0], "sum": sum, "max": max}[duplicates]
    users, items = vocabulary(out, "query"), vocabulary(out, "candidate")
    rows = examples(out, "train", "query_id", "candidate_id", "weight")
    got = {(users[int(q)], items[int(c)]): w for q, c, w in rows}
    assert got == pytest.approx({pair: combine(w) for pair, w in found.items()}, rel=1e-6)
    assert max(map(len, found.values())) > 1


def test_weights_of_another_split_do_not_count():
    rows = np.zeros(3, ROW)
    rows["weight"], rows["split"], rows["order"] = [1, 2, 4], [0, 2, 0], [0, 1, 2]
    assert [drop_duplicates(rows, how)["weight"].tolist() for how in ("sum", "max")] == [[5], [4]]


def test_combining_weights_needs_weights():
    with pytest.raises(ValueError, match="needs --weight_column"):
        PrepareConfig(source="log", output="out", duplicates="sum")


def test_dense_ids_by_count_then_raw_id(log, tmp_path):
    _, out = run(log, tmp_path)
    for side, place in (("query", 0), ("candidate", 1)):
        counts = Counter(pair[place] for pair in distinct(log))
        expected = sorted(counts, key=lambda raw: (-counts[raw], raw.encode()))
        assert vocabulary(out, side) == expected
        table = pq.read_table(out / schema.vocabulary_name(side))
        assert table["count"].to_pylist() == [counts[raw] for raw in expected]
        assert table["fingerprint"].to_pylist() == [hashing.fingerprint(raw) for raw in expected]


def test_train_counts_are_those_of_the_train_split(log, tmp_path):
    manifest, out = run(log, tmp_path, train_ratio=0.3)
    counts = Counter(int(c) for _, c in examples(out, "train"))
    table = pq.read_table(out / schema.train_counts_name())
    assert table["count"].to_pylist() == [counts[n] for n in range(len(table))]
    zeros = table["count"].to_pylist().count(0)
    assert manifest.counts["candidates_without_train_rows"] == zeros > 0


def by_user(pairs):
    found = defaultdict(list)
    for user, item in pairs:
        found[user].append(item)
    return found


@pytest.mark.parametrize(("train_ratio", "validation_ratio"), [(0.8, 0.0), (0.8, 0.1), (0.5, 0.5)])
def test_random_split_cuts_each_users_rows_in_hash_order(
    log, tmp_path, train_ratio, validation_ratio
):
    _, out = run(log, tmp_path, train_ratio=train_ratio, validation_ratio=validation_ratio)
    found = {split: by_user(raw_pairs(out, split)) for split in schema.SPLITS}
    for user, items in by_user(distinct(log)).items():

        def place(item, user=user):
            one = [np.array([hashing.fingerprint(raw)]) for raw in (user, item)]
            return int(hashing.row_hash(10, "split", *one)[0])

        ordered = sorted(items, key=place)
        known = max(1, round(train_ratio * len(items)))
        train = known - min(round(validation_ratio * known), known - 1)
        assert set(found["train"][user]) == set(ordered[:train])
        assert set(found["validation"][user]) == set(ordered[train:known])
        assert set(found["test"][user]) == set(ordered[known:])


def test_time_split_and_leave_last_out_by_hand(tmp_path):
    log = pa.table(
        {
            "user_id": ["a"] * 5 + ["b"] + ["c"] * 2,
            "item_id": ["v", "w", "x", "y", "z", "v", "w", "x"],
            "timestamp": [50, 10, 40, 20, 30, 1, 9, 9],
        }
    )
    _, out = run(log, tmp_path, split="time", train_ratio=0.6)
    assert sorted(raw_pairs(out, "test")) == [("a", "v"), ("a", "x"), ("c", "x")]
    _, out = run(log, tmp_path, split="leave_last_out", overwrite=True)
    assert sorted(raw_pairs(out, "test")) == [("a", "v"), ("c", "x")]
    assert raw_pairs(out, "validation") == []
    _, out = run(log, tmp_path, split="leave_last_out", validation_ratio=0.1, overwrite=True)
    assert sorted(raw_pairs(out, "test")) == [("a", "v"), ("c", "x")]
    assert raw_pairs(out, "validation") == [("a", "x")]
    assert ("b", "v") in raw_pairs(out, "train")


def test_rows_are_in_the_order_of_their_hash_across_shards(log, tmp_path):
    _, out = run(log, tmp_path, rows_per_shard=300)
    assert len(list(out.glob("interactions-train.tfrecord-*"))) > 2
    hashes = [
        int(hashing.row_hash(10, "order", *(np.array([hashing.fingerprint(r)]) for r in pair))[0])
        for pair in raw_pairs(out, "train")
    ]
    assert hashes == sorted(hashes)


def test_tfds_opens_the_directory(log, tmp_path):
    import tensorflow_datasets as tfds

    manifest, out = run(log, tmp_path, rows_per_shard=500)
    builder = tfds.builder_from_directory(str(out))
    for split in ("train", "test"):
        assert builder.info.splits[split].num_examples == manifest.counts[split]
        rows = [
            (int(row["query_id"]), int(row["candidate_id"]))
            for row in tfds.as_numpy(builder.as_dataset(split=split))
        ]
        assert sorted(rows) == sorted(map(tuple, examples(out, split).astype(int).tolist()))


def test_more_shards_than_rows(tmp_path):
    log = pa.table({"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"]})
    manifest, out = run(log, tmp_path, rows_per_shard=1)
    assert len(raw_pairs(out, "train")) == manifest.counts["train"]
    assert schema.read_manifest(out, "prepared") == manifest


def test_manifest_holds_every_file_and_its_checksum(log, tmp_path):
    manifest, out = run(log, tmp_path)
    files = {p.name for p in out.iterdir()} - {schema.MANIFEST}
    assert set(manifest.files) == files
    for name, described in manifest.files.items():
        assert described["checksum"] == checksum(out / name)
    assert "output" not in json.loads((out / schema.MANIFEST).read_text())["configuration"]
