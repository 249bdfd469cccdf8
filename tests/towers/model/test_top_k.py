"""Answers in data frames: against scores by hand, and who is not known."""

import numpy as np
import pandas as pd
import pytest

import towers
from towers.data.interactions import open_data

ITEMS = pd.DataFrame(
    {"item": ["tea", "milk", "rye", "oat"], "title": ["Tea", "Milk", "Rye bread", "Oats"]}
)
LOG = pd.DataFrame(
    {"user": ["ann", "ann", "bob", "bob", "cid"], "item": ["tea", "milk", "rye", "tea", "milk"]}
)
NAMES = {"user": "user", "item": "item", "train_ratio": 1.0}
KINDS = {"item_features": ITEMS, "item_feature_kinds": {"title": "text"}}


@pytest.fixture(scope="module")
def reader():
    """A model that reads a history and titles; oats have no interactions."""
    data = towers.from_dataframe(LOG, **NAMES, **KINDS)
    settings = {"candidate_inputs": ("id", "title"), "query_inputs": ("id", "history")}
    return towers.TwoTower(data, dim=4, tower="features", temperature=0.5, **settings)


def scores_of(model, user):
    """Candidate → score by hand."""
    query = model.query_embeddings().numpy()[model.data.encode_queries([user])[0]]
    known = model.candidate_embeddings().numpy() @ query
    cold = model.candidate_tower.embed_cold().numpy() @ query
    names = model.data.decode_candidates(range(model.data.num_candidates))
    names += model.candidate_tower.cold_ids.to_pylist()
    return dict(zip(names, [*known, *cold], strict=True))


def test_every_candidate_with_rank_score_and_title(reader):
    answer = reader.recommend(["bob", "ann"])
    assert list(answer.columns) == ["query_id", "rank", "candidate_id", "score", "title"]
    assert answer["query_id"].tolist() == ["bob"] * 4 + ["ann"] * 4
    assert answer["rank"].tolist() == [1, 2, 3, 4] * 2
    titles = dict(zip(ITEMS["item"], ITEMS["title"], strict=True))
    assert answer["title"].tolist() == [titles[item] for item in answer["candidate_id"]]
    for user in ("ann", "bob"):
        expected = scores_of(reader, user)
        rows = answer[answer["query_id"] == user]
        assert rows["candidate_id"].tolist() == sorted(expected, key=expected.get, reverse=True)
        np.testing.assert_allclose(
            rows["score"], sorted(expected.values(), reverse=True), rtol=1e-5, atol=1e-6
        )


def test_what_is_seen_is_left_out(reader):
    answer = reader.recommend(["ann", "bob"], k=4, exclude_seen=True)
    left = answer.groupby("query_id")["candidate_id"].agg(set).to_dict()
    assert left == {"ann": {"rye", "oat"}, "bob": {"milk", "oat"}}


def test_someone_new_is_known_by_a_history(reader):
    answer = reader.recommend(history=[["tea", "milk"], ["rye", "never heard of"]], k=4)
    assert answer["query_id"].tolist() == [0] * 4 + [1] * 4
    unseen = reader.recommend(history=[["tea", "oat"]], k=4, exclude_seen=True)
    assert set(unseen["candidate_id"]) == {"milk", "rye"}
    # A history in place of the stored one changes the answer of a known id.
    other = reader.recommend(["ann"], history=[["rye"]], k=4)
    assert other["score"].tolist() != reader.recommend(["ann"], k=4)["score"].tolist()
    one_by_one = [reader.recommend(history=[h], k=4) for h in (["tea", "milk"], ["rye"])]
    np.testing.assert_allclose(
        answer["score"], pd.concat(one_by_one)["score"], rtol=1e-5, atol=1e-6
    )


def test_lists_and_gaps_are_read_as_pandas_has_them(reader, attributed):
    """Parquet gives lists as arrays, and columns of text mark a gap by NaN."""
    histories = pd.Series([np.array(["tea", "milk"], object), np.array([], object), None])
    asked = ["ann", "bob", "bob"]
    for more in ({}, {"exclude_seen": True}):
        answer = reader.recommend(asked, history=histories, **more)
        lists = reader.recommend(asked, history=[["tea", "milk"], [], []], **more)
        pd.testing.assert_frame_equal(answer, lists)
    model = towers.TwoTower(open_data(attributed), tower="features", dim=4)
    plain = model.recommend(["u0"])
    for column in ("town", "age"):
        for gap in (None, np.nan, pd.NA):
            found = model.recommend(["u0"], attributes={column: [gap]})
            pd.testing.assert_frame_equal(found, plain)


def test_attributes_of_someone_new(attributed):
    model = towers.TwoTower(open_data(attributed), tower="features", dim=4)
    one, other = model.recommend(attributes={"town": ["Ulm", "Bern"]}, k=3).groupby("query_id")
    assert one[1]["score"].tolist() != other[1]["score"].tolist()
    aged = model.recommend(["u0"], attributes={"age": [80]}, k=3)
    assert aged["score"].tolist() != model.recommend(["u0"], k=3)["score"].tolist()
    assert len(model.recommend(["u29"], k=3)) == 3  # known by attributes alone


def test_integer_ids(pairs):
    data = towers.from_dataframe(pairs, user="user_id", item="item_id")
    answer = towers.TwoTower(data, dim=4).recommend([3, 4], k=2)
    assert answer["query_id"].tolist() == [3, 3, 4, 4]
    assert "title" not in answer


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "needs lists of one length"),
        ({"queries": "ann"}, r'recommend\(\["ann"\]\)'),
        ({"queries": []}, "needs lists of one length"),
        ({"history": ["tea", "milk"]}, "needs lists of one length"),
        ({"queries": ["ann"], "history": [["tea"], ["milk"]]}, "needs lists of one length"),
        ({"queries": ["ann", "nobody"]}, "does not know 1 of the queries, such as 'nobody'"),
        ({"history": [["never heard of"]]}, "does not know 1 of the queries, such as 0"),
        ({"queries": ["ann"], "attributes": {"town": ["Ulm"]}}, "does not read town, it reads"),
        ({"queries": ["ann"], "k": 0}, "k must be at least 1, without decimals, got 0"),
        ({"queries": ["ann"], "k": 2.0}, "k must be at least 1, without decimals, got 2.0"),
    ],
)
def test_wrong_questions(reader, asked, text):
    with pytest.raises(ValueError, match=text) as caught:
        reader.recommend(asked.pop("queries", None), **asked)
    assert "\n" not in str(caught.value)


def test_a_tower_of_ids_reads_no_history():
    model = towers.TwoTower(towers.from_dataframe(LOG, **NAMES), dim=4)
    with pytest.raises(ValueError, match=r"does not read history, .* train tower fism"):
        model.recommend(history=[["tea"]])
    assert set(model.recommend(["cid"], k=3)["candidate_id"]) == {"tea", "milk", "rye"}


def test_what_they_say_they_are(reader):
    data = towers.from_dataframe(LOG, **NAMES, **KINDS)
    assert repr(data) == (
        "RetrievalData of DataFrame:\n  3 queries, 3 candidates\n"
        "  rows: 5 train, 0 validation, 0 test\n  candidate attributes: title (text)"
    )
    text = repr(reader)
    assert text.startswith(
        "TwoTower(tower='features', dim=4, method='ssl_pop', temperature=0.5, cand"
    )
    assert "0 steps" in text


def test_ids_there_and_back():
    data = towers.from_dataframe(LOG, **NAMES)
    assert data.encode_queries(["bob", "nobody", "ann"]).tolist() == [1, -1, 0]
    assert data.decode_queries([1, 0]) == ["bob", "ann"]
    assert data.decode_candidates(data.encode_candidates(["rye", "tea"])) == ["rye", "tea"]
    assert data.encode_candidates([]).tolist() == []
    with pytest.raises((OverflowError, IndexError)):
        data.decode_candidates([-1])
