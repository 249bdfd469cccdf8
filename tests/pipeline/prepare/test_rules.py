"""The rules of preparation, each against a plain loop over rows."""

import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lost_elements import watched
from prepared import examples, raw_pairs, vocabulary

from pipeline.beam.blocks import ROW, drop_duplicates, partition_of
from pipeline.contract import hashing, schema
from pipeline.contract.files import checksum
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.split import assign_splits


def run(log, tmp_path, **settings):
    pq.write_table(log, tmp_path / "log.parquet")
    paths = {"source": str(tmp_path / "log.parquet"), "output": str(tmp_path / "out")}
    config = PrepareConfig(**paths, **({"partitions": 3} | settings))
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


@pytest.fixture(scope="module")
def prepared(log, tmp_path_factory):
    """The manifest and the directory of a log in several shards a split."""
    settings = {"train_ratio": 0.5, "validation_ratio": 0.5, "rows_per_shard": 300}
    return run(log, tmp_path_factory.mktemp("prepared"), **settings)


def test_k_core_to_a_fixed_point(log, tmp_path):
    manifest, out = run(log, tmp_path, min_user_interactions=4, min_item_interactions=8)
    expected = k_core(distinct(log), 4, 8)
    assert 0 < len(expected) != len(k_core(distinct(log), 8, 4))
    assert set(raw_pairs(out, "train")) | set(raw_pairs(out, "test")) == expected
    counts = manifest.counts
    assert counts["read"] == counts["rows"] + counts["duplicates"] + counts["k_core"]
    assert counts["rows"] == len(expected)


def test_a_k_core_that_needs_many_passes(tmp_path):
    # A path u0-i0-u1-i1-… falls apart from its ends, one row a round; the square stays.
    path = [(f"u{n // 2 + n % 2}", f"i{n // 2}") for n in range(15)]
    square = [(u, i) for u in ("a", "b") for i in ("x", "y")]
    users, items = zip(*path, *square, strict=True)
    log = pa.table({"user_id": users, "item_id": items})
    manifest, _ = run(log, tmp_path, min_user_interactions=2, min_item_interactions=2, dry_run=True)
    assert (manifest.counts["rows"], manifest.counts["k_core"]) == (len(square), len(path))


@pytest.mark.long
def test_rows_of_a_frequent_item_never_meet(tmp_path):
    users = [f"u{n}" for n in range(200)]
    items = ["everywhere"] * 200 + [f"i{n % 40}" for n in range(200)]
    settings = {"partitions": 8, "rows_per_shard": 20, "min_item_interactions": 2}
    log = pa.table({"user_id": users * 2, "item_id": items})
    with watched() as steps:
        manifest, _ = run(log, tmp_path, **settings)
    of_users = partition_of(hashing.fingerprints(user.encode() for user in users), 8)
    largest_block = 2 * np.bincount(of_users).max()
    assert manifest.counts["rows"] == 400
    assert max(steps.rows.values()) == largest_block < 200


def test_weights_of_repeated_pairs(log, tmp_path):
    weights = np.random.default_rng(3).uniform(0, 9, len(log)).astype(np.float32)
    log = log.append_column("w", pa.array(weights))
    settings = {"duplicates": "sum", "weight_column": "w", "train_ratio": 1.0}
    _, out = run(log, tmp_path, **settings)
    found = defaultdict(list)
    for row in log.to_pylist():
        found[row["user_id"], row["item_id"]].append((row["w"], row["timestamp"]))
    users, items = vocabulary(out, "query"), vocabulary(out, "candidate")
    rows = examples(out, "train", "query_id", "candidate_id", "weight", "timestamp").tolist()
    got = {(users[int(q)], items[int(c)]): (w, t) for q, c, w, t in rows}
    assert set(got) == set(found)
    for pair, pairs in found.items():
        assert got[pair][0] == pytest.approx(sum(w for w, _ in pairs), rel=1e-6)
        assert got[pair][1] == min(time for _, time in pairs)  # the earliest row stays
    assert max(map(len, found.values())) > 1


@pytest.mark.parametrize(("duplicates", "combined"), [("first", 4), ("sum", 7), ("max", 4)])
def test_the_earliest_duplicate_stays(duplicates, combined):
    rows = np.zeros(5, ROW)
    rows["timestamp"], rows["order"] = [5, 7, 3, 9, 3], [0, 1, 2, 3, 4]
    rows["candidate"], rows["weight"] = [10, 20, 10, 20, 10], [1, 8, 4, 8, 2]
    for order in (range(5), (4, 0, 3, 2, 1)):
        kept = drop_duplicates(rows[list(order)], duplicates)
        assert kept["candidate"].tolist() == [10, 20]
        assert kept["timestamp"].tolist() == [3, 7]
        assert kept["order"].tolist() == [2, 1]
        assert kept["weight"].tolist() == [combined, 16 if duplicates == "sum" else 8]


def test_a_sum_of_weights_that_float32_cannot_hold_is_an_error(tmp_path):
    log = pa.table({"user_id": ["a", "a", "b"], "item_id": ["x"] * 3, "w": [3e38, 3e38, 1.0]})
    message = r"1 pair.s. of .* 3.4e\+38; divide 'w' by .* --duplicates max"
    with pytest.raises(ValueError, match=message):
        run(log, tmp_path, duplicates="sum", weight_column="w")
    assert run(log, tmp_path, duplicates="max", weight_column="w")[0].counts["rows"] == 2


def test_weights_of_another_split_do_not_count():
    rows = np.zeros(3, ROW)
    rows["weight"], rows["split"], rows["order"] = [1, 2, 4], [0, 2, 0], [0, 1, 2]
    kept = [drop_duplicates(rows, how) for how in ("sum", "max")]
    assert [block["weight"].tolist() for block in kept] == [[5], [4]]
    rows["split"] = [2, 1, 2]  # the earliest part keeps the pair
    assert drop_duplicates(rows)[["split", "weight"]].tolist() == [(1, 2)]


def test_combining_weights_needs_weights():
    with pytest.raises(ValueError, match="needs weight_column"):
        PrepareConfig(source="log", output="out", duplicates="sum")


def test_dense_ids_by_count_then_raw_id(log, prepared):
    _, out = prepared
    for side, place in (("query", 0), ("candidate", 1)):
        counts = Counter(pair[place] for pair in distinct(log))
        expected = sorted(counts, key=lambda raw: (-counts[raw], raw.encode()))
        assert vocabulary(out, side) == expected
        table = pq.read_table(out / schema.vocabulary_name(side))
        assert table["count"].to_pylist() == [counts[raw] for raw in expected]
        assert table["fingerprint"].to_pylist() == [hashing.fingerprint(raw) for raw in expected]


def test_train_counts_are_those_of_the_train_split(prepared):
    manifest, out = prepared
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


def test_random_split_cuts_each_users_rows_in_hash_order(log, prepared):
    _, out = prepared
    found = {split: by_user(raw_pairs(out, split)) for split in schema.SPLITS}
    for user, items in by_user(distinct(log)).items():

        def place(item, user=user):
            one = [np.array([hashing.fingerprint(raw)]) for raw in (user, item)]
            return int(hashing.row_hash(10, "split", *one)[0])

        ordered = sorted(items, key=place)
        known = max(1, round(0.5 * len(items)))
        train = known - min(round(0.5 * known), known - 1)
        assert set(found["train"][user]) == set(ordered[:train])
        assert set(found["validation"][user]) == set(ordered[train:known])
        assert set(found["test"][user]) == set(ordered[known:])


GLOBAL_30 = {"split": "global_time", "test_from": "1970-01-01T00:00:30"}


@pytest.mark.parametrize(
    ("settings", "validation", "test"),
    [
        ({"split": "time", "train_ratio": 0.6}, [], ["av", "ax", "cx"]),
        (GLOBAL_30, [], ["av", "ax", "az"]),
        (GLOBAL_30 | {"validation_ratio": 0.5}, ["ay", "cx"], ["av", "ax", "az"]),
        ({"split": "leave_last_out"}, [], ["av", "cx"]),
        ({"split": "leave_last_out", "validation_ratio": 0.1}, ["ax"], ["av", "cx"]),
    ],
)
def test_splits_by_time_by_hand(settings, validation, test):
    pairs = ["av", "aw", "ax", "ay", "az", "bv", "cw", "cx"]
    rows = np.zeros(len(pairs), ROW)
    rows["query"], rows["candidate"] = zip(*(map(ord, pair) for pair in pairs), strict=True)
    rows["timestamp"], rows["order"] = [50, 10, 40, 20, 30, 1, 9, 9], range(len(pairs))
    rows = assign_splits(rows[::-1], PrepareConfig(source="log", output="out", **settings))
    found = {split: [] for split in schema.SPLITS}
    for row in rows:
        found[schema.SPLITS[row["split"]]].append(chr(row["query"]) + chr(row["candidate"]))
    assert (sorted(found["validation"]), sorted(found["test"])) == (validation, test)
    assert sorted(found["train"] + validation + test) == pairs


def test_a_moment_divides_all_users(log, tmp_path):
    moment = "1970-01-13T01:00:00+01:00"  # 1,036,800 seconds, inside the log
    settings = {"split": "global_time", "test_from": moment, "validation_ratio": 0.2}
    manifest, out = run(log, tmp_path, **settings)
    first = distinct(log)
    later = {pair for pair, time in first.items() if time >= 1_036_800}
    train = set(raw_pairs(out, "train"))
    assert set(raw_pairs(out, "test")) == later
    assert train | set(raw_pairs(out, "validation")) == set(first) - later
    assert {user for user, _ in later} - {user for user, _ in train}, "a user of test alone"
    assert manifest.counts["candidates_without_train_rows"] > 0
    assert manifest.configuration["test_from"] == moment
    assert "test_from" not in PrepareConfig(source="log", output="out").recorded()


@pytest.mark.parametrize(
    ("date", "side"), [("1970-01-01", "before"), ("2030-01-01", "at or after")]
)
def test_a_moment_outside_the_log_is_an_error(log, tmp_path, date, side):
    with pytest.raises(ValueError, match=f"no row of .* is {side} --test_from {date}") as error:
        run(log, tmp_path, split="global_time", test_from=date)
    assert "1970-01-12 to 1970-01-13" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet"]


def test_rows_are_in_the_order_of_their_hash_across_shards(prepared):
    _, out = prepared
    assert len(list(out.glob("interactions-test.tfrecord-*"))) > 2
    hashes = [
        int(hashing.row_hash(10, "order", *(np.array([hashing.fingerprint(r)]) for r in pair))[0])
        for pair in raw_pairs(out, "test")
    ]
    assert hashes == sorted(hashes)


def test_tfds_opens_the_directory(prepared):
    import tensorflow_datasets as tfds

    manifest, out = prepared
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


def test_manifest_holds_every_file_and_its_checksum(prepared):
    manifest, out = prepared
    files = {p.name for p in out.iterdir()} - {schema.MANIFEST}
    assert set(manifest.files) == files
    for name, described in manifest.files.items():
        assert described["checksum"] == checksum(out / name)
    assert "output" not in json.loads((out / schema.MANIFEST).read_text())["configuration"]
