"""What feature towers know of ids: attributes, n-grams, histories, against plain Python."""

import attributed as source
import attributes
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from pipeline.contract import schema
from towers.data.attributes import (
    MAX_CODES,
    Features,
    columns_of,
    raw_values,
    read_column,
    text_codes,
)
from towers.data.dataframe import from_dataframe
from towers.data.history import History
from towers.data.interactions import open_data
from towers.data.ragged import Lists, first_values
from towers.encoders.feature_tower import FeatureSource

BUCKETS = 1000


@pytest.fixture(scope="module")
def attributed_data(attributed):
    return open_data(attributed)


def bucket(term):
    return int(tf.strings.to_hash_bucket_fast(term, BUCKETS)) + 1


def python_codes(text):
    words = [f" {word} " for word in text.lower().split()]
    groups = [word[n : n + 3] for word in words for n in range(len(word) - 2)]
    return [bucket(term) for term in [*words, *groups]][:MAX_CODES]


def read(columns, arrays, ids):
    source = FeatureSource.of(np.ones(max(ids) + 1, bool), arrays).as_tensors(tf.constant)
    return source.inputs(tf.constant(ids, tf.int64), columns)["columns"]


def test_columns_of_both_kinds_of_ids(attributed_data):
    """By dense id, and of items without interactions: what the table says, row by row."""
    features = attributed_data.features("candidate")
    columns, arrays = columns_of(features, BUCKETS)
    vocabulary = attributed_data.candidate_vocabulary.raw_ids.to_pylist()
    assert features.cold[schema.RAW_ID].to_pylist() == sorted(attributes.COLD)
    rows = attributes.make_items()
    known = len(vocabulary)
    for ids, first in ((vocabulary, 0), (sorted(attributes.COLD), known)):
        found = read(columns, arrays, range(first, first + len(ids)))
        expected, _ = attributes.expected_features(rows, ids)
        for column in columns:
            cells = [row[column.name] for row in expected]
            got = found[column.name].numpy()
            if column.kind == "text":
                cells = [python_codes(text) for text in cells]
            if column.kind in ("multi", "text"):
                for codes, cell in zip(got, cells, strict=True):
                    kept = cell[: column.width]
                    assert codes.tolist() == kept + [0] * (column.width - len(kept))
            elif column.kind == "numeric":
                present = [row[f"{column.name}:present"] for row in expected]
                np.testing.assert_allclose(got[:, 0], np.clip(cells, -5, 5), atol=1e-6)
                assert got[:, 1].tolist() == present
            else:
                assert got.tolist() == cells
    assert [column.kind for column in columns] == [
        *("numeric", "categorical", "categorical", "categorical", "multi", "text")
    ]


def test_sides_without_attributes_have_none(data):
    features = data.features("query")
    assert features.specs == ()
    assert len(features.cold) == 0


def test_files_of_other_runs_are_refused(attributed, tmp_path):
    import shutil

    mixed = shutil.copytree(attributed, tmp_path / "mixed")
    name = next(path for path in mixed.iterdir() if path.name.startswith("candidate_features-"))
    table = pq.read_table(name)
    pq.write_table(table.take(pa.array(np.arange(len(table))[::-1])), name)
    data = open_data(mixed)
    with pytest.raises(ValueError, match="was changed since its preparation, or is of another"):
        data.features("candidate")
    vocabulary = next(mixed.glob("query_vocabulary-*"))
    vocabulary.write_bytes(next(mixed.glob("candidate_vocabulary-*")).read_bytes())
    with pytest.raises(ValueError, match=f"{vocabulary.name} was changed"):
        open_data(mixed)


def test_text_codes():
    texts = ["Green  TEA", "", "ÄÖ 漢字", "a", " ".join(f"word{n}" for n in range(200))]
    lists = text_codes(texts, BUCKETS)
    for row, text in enumerate(texts):
        found = lists.values[lists.offsets[row] : lists.offsets[row + 1]].tolist()
        assert found == python_codes(text)
    assert np.diff(lists.offsets).max() == MAX_CODES
    assert lists.values.min() >= 0
    assert lists.values.max() <= BUCKETS
    by_hand = [bucket(term) for term in (" green ", " tea ")]
    assert lists.values[:2].tolist() == by_hand


def test_lists():
    lists = Lists.of(np.array([5, 6, 7, 8, 9]), np.array([3, 0, 1, 0, 1]))
    tensors = Lists(*map(tf.constant, lists))
    found = first_values(tensors, tf.constant([[0, 1], [2, 4]], tf.int64), 2)
    assert found.numpy().tolist() == [[[5, 6], [0, 0]], [[8, 0], [9, 0]]]
    nothing = Lists(*map(tf.constant, Lists.of(np.array([], int), np.array([0, 0]))))
    assert first_values(nothing, tf.constant([1], tf.int64), 2).numpy().tolist() == [[0, 0]]


def interactions(seed=0, rows=300):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "u": rng.integers(0, 12, rows),
            "i": rng.integers(0, 40, rows),
            "t": rng.integers(0, 6, rows),
        }
    )
    return frame.drop_duplicates(["u", "i"])


@pytest.mark.parametrize("timed", [True, False])
def test_history_against_a_loop(timed):
    data = from_dataframe(interactions(), user="u", item="i", timestamp="t" if timed else None)
    rows, length = data.arrays("train"), 5
    history = History(rows, data.num_queries, data.num_candidates, length)
    triples = list(
        zip(
            rows["query_id"].tolist(),
            rows["candidate_id"].tolist(),
            rows["timestamp"].tolist() if timed else range(len(rows["query_id"])),
            strict=True,
        )
    )

    def window(items):
        codes = [item + 1 for item in items[-length:]]
        return [0] * (length - len(codes)) + codes

    for query in range(data.num_queries):
        own = sorted((row for row in triples if row[0] == query), key=lambda row: row[2])
        assert history.last[query].tolist() == window([item for _, item, _ in own])
    queries, positives = (tf.constant(rows[n]) for n in ("query_id", "candidate_id"))
    seen = history.earlier(queries, positives).numpy()
    for (query, _, time), codes in zip(triples, seen, strict=True):
        own = sorted((row for row in triples if row[0] == query), key=lambda row: row[2])
        assert codes.tolist() == window([item for _, item, t in own if t < time])


@pytest.mark.parametrize("timed", [True, False])
def test_a_query_never_sees_the_candidate_that_it_is_trained_on(timed):
    data = from_dataframe(interactions(), user="u", item="i", timestamp="t" if timed else None)
    rows = data.arrays("train")
    history = History(rows, data.num_queries, data.num_candidates, 50)
    positives = rows["candidate_id"]
    seen = history.earlier(tf.constant(rows["query_id"]), tf.constant(positives)).numpy()
    assert not (seen == positives[:, None] + 1).any()
    assert (seen > 0).any()
    whole = history.of(tf.constant(rows["query_id"])).numpy()
    assert (whole == positives[:, None] + 1).any(axis=1).all()  # serving sees it


def test_pairs_that_are_no_train_rows_see_the_whole_history():
    data = from_dataframe(interactions(), user="u", item="i", timestamp="t")
    history = History(data.arrays("train"), data.num_queries, data.num_candidates, 5)
    test = data.arrays("test")
    queries, positives = tf.constant(test["query_id"]), tf.constant(test["candidate_id"])
    np.testing.assert_array_equal(history.earlier(queries, positives), history.of(queries))


def test_cold_queries_have_columns_alone(attributed_data):
    features = attributed_data.features("query")
    assert features.cold[schema.RAW_ID].to_pylist() == source.COLD_USERS
    columns, arrays = columns_of(features, BUCKETS)
    known = np.ones(29, bool), arrays, np.ones((29, 3), np.int32)
    both = FeatureSource.of(*known, num_cold=1).as_tensors(tf.constant)
    inputs = both.inputs(tf.constant([28, 29], tf.int64), columns)
    assert inputs["has_id"].numpy().tolist() == [True, False]
    assert inputs["history"].numpy().tolist() == [[1, 1, 1], [0, 0, 0]]
    for column in columns:
        expected = read_column(column, arrays[column.name], tf.constant([29]))
        np.testing.assert_array_equal(inputs["columns"][column.name][1:], expected)


def test_raw_values_are_those_of_the_table(attributed_data):
    features = attributed_data.features("candidate")
    names = ["tags", "price", "sub", "new"]
    got = raw_values(features, names).to_pylist()
    vocabulary = attributed_data.candidate_vocabulary.raw_ids.to_pylist()
    ids = vocabulary + features.cold[schema.RAW_ID].to_pylist()
    rows = {row["item_id"]: row for row in attributes.make_items()}
    assert len(got) == len(ids) > len(vocabulary)
    for item, values in zip(ids, got, strict=True):
        row = rows.get(item, dict.fromkeys(names))
        known = [tag for tag in row["tags"] or () if tag != "new tag"]
        assert values["tags"] == list(dict.fromkeys(known))
        assert values["sub"] == (None if row["sub"] is None else str(row["sub"]))
        assert values["new"] == (None if row["new"] is None else str(row["new"]).lower())
        assert values["price"] == (row["price"] and pytest.approx(row["price"], rel=1e-4))


def test_a_price_is_what_it_was_not_a_little_above():
    prices = np.array([20.0, 19.99, 1234.5, 0.01, 3.0])
    mean, std = float(prices.mean()), float(prices.std())
    scaled = pa.table({"price": pa.array((prices - mean) / std, pa.float32())})
    specs = (schema.FeatureSpec("price", "numeric", mean=mean, std=std),)
    got = raw_values(Features(specs, scaled, scaled.slice(5)), ["price"])
    assert got["price"].to_pylist() == prices.tolist()


@pytest.mark.parametrize("price_of_new", [None, 25.0])
def test_a_price_that_is_missing_is_not_the_mean_and_the_mean_is_not_missing(price_of_new):
    """All items of train have a price; `new` has rows in test alone, `cold` has none."""
    log = pd.DataFrame({"u": [*"abc", "a"], "i": ["low", "mean", "high", "new"], "t": [1, 2, 3, 9]})
    prices = {"low": 10.0, "mean": 20.0, "high": 30.0, "cold": None, "paid": 20.0}
    prices["new"] = price_of_new
    data = from_dataframe(
        log,
        user="u",
        item="i",
        timestamp="t",
        split="global_time",
        test_from="1970-01-01T00:00:05",
        item_features=pd.DataFrame({"i": list(prices), "price": list(prices.values())}),
    )
    features = data.features("candidate")
    ids = data.candidate_vocabulary.raw_ids.to_pylist() + features.cold[schema.RAW_ID].to_pylist()
    got = raw_values(features, ["price"])["price"].to_pylist()
    assert dict(zip(ids, got, strict=True)) == prices
    columns, arrays = columns_of(features, BUCKETS)
    found = read(columns, arrays, range(len(ids)))["price"].numpy()
    assert found[[ids.index(name) for name in ("cold", "mean")]].tolist() == [[0, 1]] * 2


def test_filter_columns_are_categories_lists_and_numbers(attributed_data):
    features = attributed_data.features("candidate")
    with pytest.raises(ValueError, match="must be among price, brand, sub, new, tags, got title"):
        raw_values(features, ["brand", "title"])
