import itertools
import json
import os

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.live import without_queries
from pipeline.contract import schema
from towers.data.dataframe import from_dataframe
from towers.data.epochs import epoch_dataset, step_rows
from towers.data.interactions import Positives, open_data
from towers.legacy_keras import tf_keras


def rows_of(dataset):
    return [
        (int(q), int(c))
        for batch in dataset
        for q, c in zip(batch["query_id"].numpy(), batch["candidate_id"].numpy(), strict=True)
    ]


def test_prepared_directory_gives_what_was_written(data, prepared):
    opened = open_data(prepared)
    assert opened.num_queries == data.num_queries
    assert opened.candidate_vocabulary.raw_ids.equals(data.candidate_vocabulary.raw_ids)
    np.testing.assert_array_equal(
        opened.query_vocabulary.fingerprints, data.query_vocabulary.fingerprints
    )
    np.testing.assert_array_equal(opened.train_counts, data.train_counts)
    for split in schema.SPLITS:
        for name, values in data.arrays(split).items():
            np.testing.assert_array_equal(opened.arrays(split)[name], values)


def test_timestamps_and_weights_are_kept(pairs, make_prepared):
    df = pairs.assign(at=np.arange(len(pairs)), w=np.linspace(0, 1, len(pairs)))
    data = from_dataframe(df, user="user_id", item="item_id", timestamp="at", weight="w")
    opened = open_data(make_prepared(data))
    assert set(opened.arrays("test")) == {"query_id", "candidate_id", "timestamp", "weight"}
    for name, values in data.arrays("train").items():
        np.testing.assert_array_equal(opened.arrays("train")[name], values)
        assert opened.arrays("train")[name].dtype == values.dtype
    batch = next(iter(opened.train(8)))
    assert set(batch) == {"query_id", "candidate_id", "weight"}


def test_shards_are_decoded_once(data, make_prepared):
    directory = make_prepared(data)
    first = open_data(directory).arrays("train")["query_id"]
    assert isinstance(first, np.memmap)
    decoded = os.stat(first.filename)
    again = open_data(directory).arrays("train")["query_id"]
    np.testing.assert_array_equal(first, again)
    now = os.stat(again.filename)
    assert (now.st_ino, now.st_mtime_ns) == (decoded.st_ino, decoded.st_mtime_ns)


def test_other_shards_are_decoded_anew(data, pairs, make_prepared):
    directory = make_prepared(data)
    open_data(directory)
    other = make_prepared(
        from_dataframe(pairs, user="user_id", item="item_id", validation_ratio=0.2, seed=11),
        "other",
    )
    os.rename(directory / ".arrays", other / ".arrays")
    cached = open_data(directory).arrays("train")["candidate_id"]
    assert not np.array_equal(open_data(other).arrays("train")["candidate_id"], cached)


def test_a_directory_that_cannot_be_written_is_decoded_elsewhere(
    data, make_prepared, tmp_path, monkeypatch
):
    directory = make_prepared(data)
    (directory / ".arrays").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = open_data(directory)
    assert opened.num_rows("train") == data.num_rows("train")
    assert any((tmp_path / "cache" / "twotower" / "arrays").iterdir())


def test_changed_and_missing_files_are_errors(data, make_prepared):
    directory = make_prepared(data)
    shard = next(directory.glob("*-train.tfrecord-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="was changed since its preparation"):
        open_data(directory)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing from its preparation"):
        open_data(directory)
    assert list((directory / ".arrays").iterdir()) == []
    shard.write_bytes(content)
    next(directory.glob("query_vocabulary*")).unlink()
    with pytest.raises(ValueError, match=r"query_vocabulary.* is missing"):
        open_data(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished prepared data"):
        open_data(directory)


def test_newer_format_is_an_error(data, make_prepared):
    directory = make_prepared(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"format_version": "9.0"}))
    with pytest.raises(ValueError, match="update twotower"):
        open_data(directory)


def test_an_epoch_is_every_row_once_with_a_short_last_batch(data):
    dataset = data.train(64, seed=1)
    sizes = [len(batch["query_id"]) for batch in dataset]
    rows = data.num_rows("train")
    assert sizes == [64] * (rows // 64) + [rows % 64]
    assert dataset.cardinality() == len(sizes) == data.steps_per_epoch(64)
    train = data.arrays("train")
    expected = sorted(zip(train["query_id"], train["candidate_id"], strict=True))
    assert sorted(rows_of(data.train(64, seed=1))) == expected


def order_of(num_rows, batch_size, *, seed, epoch):
    steps = -(-num_rows // batch_size)
    of_step = [
        step_rows(num_rows, batch_size, seed=seed, step=epoch * steps + place)
        for place in range(steps)
    ]
    return np.concatenate(of_step)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 63, 64, 65, 1000])
def test_an_epoch_is_a_permutation(num_rows):
    orders = [order_of(num_rows, 64, seed=3, epoch=epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    assert num_rows < 4 or not np.array_equal(orders[0], orders[1])


def test_rows_of_a_batch_meet_again_as_often_as_by_chance():
    num_rows, size, epochs, met = 20_000, 1000, 10, 0
    orders = [order_of(num_rows, size, seed=7, epoch=epoch) for epoch in range(epochs)]
    batch_of = [np.argsort(order) // size for order in orders]  # by row
    for one, other in itertools.combinations(batch_of, 2):
        both = np.bincount(one * (num_rows // size) + other)  # rows that share both batches
        met += (both * (both - 1)).sum() // 2
    by_chance = num_rows * (size - 1) / 2 * (size - 1) / (num_rows - 1)  # for two epochs
    assert met / by_chance / (epochs * (epochs - 1) / 2) == pytest.approx(1, abs=0.01)
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03


def test_mapped_columns_are_read_where_they_lie(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="c")
    rows = epoch_dataset({"id": mapped, "copied": np.arange(100)}, 32, seed=1)
    mapped += 1000
    for batch in rows:
        np.testing.assert_array_equal(batch["id"], batch["copied"] + 1000)
    assert np.load(tmp_path / "ids.npy").max() == 99


def test_order_is_a_function_of_seed_and_epoch(data):
    one, two = data.train(64, seed=1), data.train(64, seed=1)
    first, second = rows_of(one), rows_of(one)
    assert first != second
    assert [rows_of(two), rows_of(two)] == [first, second]
    assert rows_of(data.train(64, seed=2)) != first
    train = data.arrays("train")
    order = order_of(data.num_rows("train"), 64, seed=1, epoch=1)
    assert second == list(zip(train["query_id"][order], train["candidate_id"][order], strict=True))


def test_an_epoch_ends_without_waiting_for_the_thread_of_tf_data(data):
    """An iterator that is dropped before its end waits for that thread's sleep, up to a minute."""
    assert data.train(8).options().autotune.enabled is False


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("steps", [0, 3])
def test_first_step_goes_on_where_it_says(data, epochs, steps):
    whole = data.train(64)
    expected = [rows_of(whole) for _ in range(epochs + 2)][epochs:]
    first_step = epochs * data.steps_per_epoch(64) + steps
    rest = data.train(64, first_step=first_step)
    assert rows_of(rest) == expected[0][64 * steps :]
    assert rows_of(rest) == expected[1]
    known = rest.cardinality().numpy() >= 0
    assert known == (steps == 0)


def test_keras_meets_every_epoch_once(data):
    met = []

    class Recorder(tf_keras.Model):
        def train_step(self, inputs):
            return {"loss": 0.0}

        def make_train_function(self, force=False):
            def step(iterator):
                batch = next(iterator)
                met.extend(rows_of([batch]))
                return {"loss": 0.0}

            self.train_function = step
            return step

    model = Recorder()
    model.compile()
    model.fit(data.train(64, seed=5), epochs=3, verbose=0)
    dataset = data.train(64, seed=5)
    assert met == [row for _ in range(3) for row in rows_of(dataset)]


def test_positives_are_the_rows_of_each_query(data):
    found = data.positives("train", "validation")
    arrays = [data.arrays(split) for split in ("train", "validation")]
    for query in range(data.num_queries):
        expected = np.concatenate([a["candidate_id"][a["query_id"] == query] for a in arrays])
        np.testing.assert_array_equal(found.of(query), np.sort(expected))


def test_positives_of_queries_without_rows():
    found = Positives(np.array([3, 1]), np.array([5, 4]), 5)
    assert found.sizes.tolist() == [0, 1, 0, 1, 0]
    assert found.of(0).tolist() == []


def test_wrong_arguments_are_errors(data):
    with pytest.raises(ValueError, match="split must be one of"):
        data.arrays("tset")
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, .*got 8.5"):
        data.train(8.5)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        data.train(0)
    with pytest.raises(ValueError, match="at least 0"):
        data.train(4, seed=-1)
    with pytest.raises(ValueError, match=r"without decimals, got 1\.5, 0"):
        data.train(4, seed=1.5)


def test_unseen_queries_have_test_rows_alone(data):
    unseen = np.array([3, 7, 11])
    without = without_queries(data, unseen)
    for split in schema.SPLITS:
        gone = np.isin(data.arrays(split)["query_id"], unseen) & (split != "test")
        for name, values in data.arrays(split).items():
            np.testing.assert_array_equal(without.arrays(split)[name], values[~gone])
    assert without.positives("train", "validation").sizes[unseen].sum() == 0
    train = without.arrays("train")["candidate_id"]
    np.testing.assert_array_equal(
        without.train_counts, np.bincount(train, minlength=data.num_candidates)
    )
    assert data.positives("train").sizes[unseen].all()  # which stays as it was


@pytest.mark.long
def test_the_attributes_of_some_ids_stay_with_them(attributed):
    data = open_data(attributed)
    queries = np.arange(data.num_queries) % 3 > 0
    candidates = np.arange(data.num_candidates) % 2 > 0
    some = data.restricted(queries, candidates)
    for side, kept in (("query", queries), ("candidate", candidates)):
        rows = pa.array(np.flatnonzero(kept))
        assert some.features(side).table == data.features(side).table.take(rows)
        raw_ids = getattr(data, f"{side}_vocabulary").raw_ids.take(rows)
        assert getattr(some, f"{side}_vocabulary").raw_ids == raw_ids
    whole = data.arrays("train")
    stay = queries[whole["query_id"]] & candidates[whole["candidate_id"]]
    for side in ("query", "candidate"):
        before, after = (getattr(d, f"{side}_vocabulary").raw_ids for d in (data, some))
        expected = before.take(pa.array(whole[f"{side}_id"][stay]))
        assert after.take(pa.array(some.arrays("train")[f"{side}_id"])) == expected
