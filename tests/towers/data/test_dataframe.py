import numpy as np
import pandas as pd
import pytest

from pipeline.contract import hashing, schema
from towers.data.dataframe import from_dataframe


def raw_pairs(data, split):
    arrays = data.arrays(split)
    queries = data.query_vocabulary.raw_ids.to_pylist()
    candidates = data.candidate_vocabulary.raw_ids.to_pylist()
    return [
        (queries[q], candidates[c])
        for q, c in zip(arrays["query_id"], arrays["candidate_id"], strict=True)
    ]


def test_split_and_order_follow_the_rule(pairs):
    data = from_dataframe(
        pairs, user="user_id", item="item_id", train_ratio=0.7, validation_ratio=0.2, seed=4
    )
    users, items = pairs["user_id"].astype(str), pairs["item_id"]
    prints = [
        np.array([hashing.fingerprint(value) for value in column]) for column in (users, items)
    ]
    codes = hashing.split_codes(
        prints[0], hashing.row_hash(4, "split", *prints), train_ratio=0.7, validation_ratio=0.2
    )
    order = np.argsort(hashing.row_hash(4, "order", *prints))
    for code, split in enumerate(schema.SPLITS):
        expected = [(users[row], items[row]) for row in order if codes[row] == code]
        assert raw_pairs(data, split) == expected


def test_dense_ids_go_by_count_then_raw_id():
    df = pd.DataFrame({"u": ["b", "a", "a", "c", "c"], "i": [10, 9, 10, 9, 7]})
    data = from_dataframe(df, user="u", item="i", train_ratio=1.0)
    assert data.query_vocabulary.raw_ids.to_pylist() == ["a", "c", "b"]
    assert data.candidate_vocabulary.raw_ids.to_pylist() == ["10", "9", "7"]  # text, not numbers
    assert data.candidate_vocabulary.counts.tolist() == [2, 2, 1]
    assert data.train_counts.tolist() == [2, 2, 1]
    assert data.num_rows("test") == 0


def test_the_earliest_of_equal_pairs_stays():
    df = pd.DataFrame(
        {
            "u": [1, 1, 1],
            "i": [2, 2, 3],
            "w": [0.1, 0.2, 0.3],
            "t": pd.to_datetime(["2020-01-03", "2020-01-02", "2020-01-01"]),
        }
    )
    data = from_dataframe(df, user="u", item="i", timestamp="t", weight="w", train_ratio=1.0)
    train = data.arrays("train")
    kept = dict(zip(train["candidate_id"].tolist(), train["weight"].tolist(), strict=True))
    assert kept[0] == pytest.approx(0.2)
    assert sorted(train["timestamp"].tolist()) == [1577836800, 1577923200]


def test_does_not_depend_on_the_order_of_rows(pairs):
    shuffled = pairs.sample(frac=1, random_state=1)
    one, two = (from_dataframe(df, user="user_id", item="item_id") for df in (pairs, shuffled))
    assert one.fingerprint == two.fingerprint
    for split in ("train", "test"):
        np.testing.assert_array_equal(
            one.arrays(split)["candidate_id"], two.arrays(split)["candidate_id"]
        )


@pytest.mark.parametrize(
    ("df", "text"),
    [
        ({"user": [1], "i": [1]}, "must have a column 'u'"),
        ({"u": [], "i": []}, "must have rows"),
        ({"u": [1, None], "i": [1, 2]}, "an id in every row"),
        ({"u": [1.5], "i": [1]}, "text or integers"),
    ],
)
def test_wrong_frames_are_errors(df, text):
    with pytest.raises(ValueError, match=text):
        from_dataframe(pd.DataFrame(df), user="u", item="i")


@pytest.mark.parametrize("times", [pd.to_datetime(["2020-01-01", None]), [1.0, np.nan]])
def test_a_missing_time_is_an_error(times):
    df = pd.DataFrame({"u": [1, 1], "i": [2, 3], "t": times})
    with pytest.raises(ValueError, match="column 't' must have a time in every row, got 1 rows"):
        from_dataframe(df, user="u", item="i", timestamp="t")
