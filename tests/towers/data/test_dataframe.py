import attributed
import attributes
import numpy as np
import pandas as pd
import pytest

from pipeline.contract import hashing, schema
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from towers.data.dataframe import from_dataframe
from towers.data.interactions import open_data


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
        ("log.csv", "must be one of pandas, got str: read a file by pd.read_csv"),
        (pd.DataFrame([[1, 2, 3]], columns=["u", "i", "u"]), "one column 'u', got several"),
        ({"u": [], "i": []}, "must have rows"),
        ({"u": [1, None], "i": [1, 2]}, "an id in every row"),
        ({"u": [1.5], "i": [1]}, "text or integers"),
    ],
)
def test_wrong_frames_are_errors(df, text):
    with pytest.raises(ValueError, match=text):
        from_dataframe(pd.DataFrame(df) if isinstance(df, dict) else df, user="u", item="i")


@pytest.mark.parametrize(
    "times", [pd.to_datetime(["2020-01-01", None]), [1.0, np.nan], [1.0, np.inf]]
)
def test_a_missing_time_is_an_error(times):
    df = pd.DataFrame({"u": [1, 1], "i": [2, 3], "t": times})
    with pytest.raises(ValueError, match="column 't' must have a time in every row, got 1 rows"):
        from_dataframe(df, user="u", item="i", timestamp="t")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0, pd.NA])
def test_a_weight_that_prepare_takes_for_bad_is_an_error(wrong):
    """A negative one would train away from what was chosen, without a word."""
    df = pd.DataFrame({"u": [1, 1], "i": [2, 3], "w": pd.array([0.0, wrong], "Float64")})
    with pytest.raises(ValueError, match="column 'w' must have a weight of 0 or more in every row"):
        from_dataframe(df, user="u", item="i", weight="w")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A log with ratings and times, and tables of both sides, in pandas and as Parquet files."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(5)
    rows = 700
    log = pd.DataFrame(
        {
            "user_id": [attributed.USERS[n] for n in rng.integers(0, 28, rows)],
            "item_id": [attributes.ITEMS[n] for n in rng.integers(0, 45, rows)],
            "when": pd.Timestamp("2026-01-01") + pd.to_timedelta(rng.integers(0, 60, rows), "D"),
            "stars": rng.integers(1, 6, rows),
        }
    )
    tables = {
        "users": pd.DataFrame(attributed.make_users()),
        "items": attributes.as_table(attributes.make_items()).to_pandas(),
    }
    log.to_parquet(folder / "log.parquet")
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    return folder, log, tables


@pytest.mark.parametrize(
    "split",
    [
        {"split": "global_time", "test_from": "2026-02-10", "validation_ratio": 0.1},
        pytest.param({"split": "time"}, marks=pytest.mark.long),
        pytest.param({"split": "leave_last_out", "validation_ratio": 0.1}, marks=pytest.mark.long),
        pytest.param({"split": "random", "validation_ratio": 0.1}, marks=pytest.mark.long),
    ],
    ids=lambda split: split["split"],
)
def test_is_what_prepare_writes(shop, split):
    folder, log, tables = shop
    kinds = dict(pair.split("=") for pair in attributes.FLAGS)
    output = folder / split["split"]
    config = PrepareConfig(
        source=str(folder / "log.parquet"),
        output=str(output),
        timestamp_column="when",
        rating_column="stars",
        rating_threshold=3,
        user_features=str(folder / "users.parquet"),
        item_features=str(folder / "items.parquet"),
        item_feature_kinds=attributes.FLAGS,
        **split,
    )
    prepare(config, [])
    written = open_data(output)
    data = from_dataframe(
        log,
        user="user_id",
        item="item_id",
        timestamp="when",
        rating="stars",
        rating_threshold=3,
        user_features=tables["users"],
        item_features=tables["items"],
        item_feature_kinds=kinds,
        **split,
    )
    for part in schema.SPLITS:
        assert data.num_rows(part) == written.num_rows(part)
        assert sorted(raw_pairs(data, part)) == sorted(raw_pairs(written, part))
        if split["split"] != "random":
            times = data.arrays(part)["timestamp"]
            assert sorted(times) == sorted(written.arrays(part)["timestamp"])
    if split["split"] == "global_time":
        moment = int(pd.Timestamp("2026-02-10").timestamp())
        assert data.arrays("test")["timestamp"].min() == moment
        assert data.arrays("validation")["timestamp"].max() < moment
    for side in schema.SIDES:
        mine, theirs = data.features(side), written.features(side)
        assert [s.name for s in mine.specs] == [s.name for s in theirs.specs]
        assert mine.specs == theirs.specs
        assert mine.table.to_pydict() == theirs.table.to_pydict()
        assert mine.cold.to_pydict() == theirs.cold.to_pydict()
        assert len(mine.cold) > 0
        assert {n: v.to_pylist() for n, v in mine.values.items()} == {
            n: v.to_pylist() for n, v in theirs.values.items()
        }


def test_attributes_are_part_of_the_fingerprint(pairs):
    items = pd.DataFrame({"item_id": ["i1", "i2"], "kind": ["a", "b"]})
    names = {"user": "user_id", "item": "item_id"}
    one, two = (
        from_dataframe(pairs, item_features=table, **names).fingerprint
        for table in (items, items.assign(kind=["a", "c"]))
    )
    assert len({one, two, from_dataframe(pairs, **names).fingerprint}) == 3


LOG = pd.DataFrame(
    {
        "u": ["a", "a", "b"],
        "i": ["x", "y", "x"],
        "t": pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-03"]),
        "text": ["2026-01-01"] * 3,
        "r": [1, 2, 3],
    }
)
BY_TIME = {"split": "global_time", "timestamp": "t"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rating": "r"}, "rating and rating_threshold need each other"),
        ({"rating": "r", "rating_threshold": 9}, "rows with r of at least 9, got none"),
        ({"rating": "text", "rating_threshold": 1}, "'text' must hold numbers"),
        ({"rating": "stars", "rating_threshold": 1}, "must have a column 'stars'"),
        ({"timestamp": "text"}, "convert it by pd.to_datetime"),
        ({"split": "time"}, "needs times: name their column"),
        ({"split": "given"}, "is for files"),
        ({"split": "weekly"}, "split must be one of"),
        (BY_TIME, "need each other"),
        (BY_TIME | {"test_from": "soon"}, "must be a date such as 2026-01-01"),
        (BY_TIME | {"test_from": "2027-01-01"}, "no row is at or after test_from 2027-01-01"),
        (BY_TIME | {"test_from": "2025-01-01"}, "no row is before .* 2026-01-01 to 2026-01-03"),
        ({"item_features": pd.DataFrame({"id": [1]})}, "item_features must have a column 'i'"),
        (
            {"item_features": pd.DataFrame({"i": ["x"], "k": ["a"]}).set_index("i")},
            r"must have a column 'i', got \['k'\]: make one of the index by reset_index",
        ),
        ({"item_features": pd.DataFrame({"i": [], "k": []})}, "item_features must have rows"),
        ({"item_features": pd.DataFrame({"i": ["x"]})}, "a column beside the id 'i'"),
        ({"item_features": pd.DataFrame({"i": ["x", "x"], "k": [1, 2]})}, "got 'x' twice"),
        ({"item_features": pd.DataFrame({"i": ["x", None], "k": [1, 2]})}, "i is missing in row 1"),
        ({"item_features": pd.DataFrame({"i": ["x"], "k": [{"a": 1}]})}, "which has no kind"),
        (
            {
                "item_features": pd.DataFrame({"i": ["x"], "k": ["a"]}),
                "item_feature_kinds": {"k": "numeric"},
            },
            "item_features: k is not a number in row 0",
        ),
        (
            {"item_features": pd.DataFrame({"i": ["7"], "k": ["a"]})},
            "item_features must have ids of the log, such as 'x', got none, but such as '7'",
        ),
        ({"item_feature_kinds": ["k=text"]}, "give a dict such as"),
        ({"train_ratio": "0.8"}, "train_ratio must be a number, got '0.8'"),
        ({"item_feature_kinds": {"k": "text"}}, "item_feature_kinds needs item_features"),
    ],
)
def test_wrong_settings_are_errors(options, text):
    with pytest.raises(ValueError, match=text) as caught:
        from_dataframe(LOG, user="u", item="i", **options)
    assert "\n" not in str(caught.value)
