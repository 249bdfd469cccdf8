"""Examples of a report: whom they show, what these chose last, and what is a hit."""

import numpy as np
import pandas as pd
import pytest

from towers.data.dataframe import from_dataframe
from towers.evaluation.examples import examples
from towers.metrics.held_out import HeldOut
from towers.model.top_k import candidate_titles

CHOSEN = 12  # train rows of the most active user


@pytest.fixture(scope="module")
def data():
    """Eight users; user n has n + 5 train rows, the last on the latest day, and two of test."""
    rows = [(f"u{user}", f"i{user + day}", day) for user in range(8) for day in range(user + 5)]
    rows += [(f"u{user}", f"i{item}", 99) for user in range(8) for item in (20, 21)]
    log = pd.DataFrame(rows, columns=["user", "item", "when"])
    log["when"] *= 86_400
    log = log.sample(frac=1.0, random_state=1)
    names = [(f"i{n}", f"No. {n}") for n in range(22)]
    columns: dict = {"user": "user", "item": "item", "timestamp": "when"}
    split: dict = {"split": "global_time", "test_from": "1970-03-01"}
    kinds = {"name": "text"}
    items = pd.DataFrame(names, columns=["item", "name"])
    return from_dataframe(log, **columns, **split, item_features=items, item_feature_kinds=kinds)


def test_the_middle_of_each_quarter(data):
    held_out = HeldOut(data, "test")
    scores = np.eye(data.num_candidates, dtype=np.float32)
    wanted = data.encode_candidates(["i20", "i3"])
    queries = np.full((data.num_queries, data.num_candidates), -1.0, np.float32)
    queries[:, wanted] = [2.0, 1.0]
    ranking = held_out.rank(queries, scores, 2)
    found = examples(data, "test", held_out, ranking, candidate_titles(data, "name"))
    assert [query["query_id"] for query in found] == ["u1", "u3", "u5", "u7"]
    last = found[-1]
    assert last["num_chosen"] == CHOSEN
    assert [item["id"] for item in last["chosen"]] == [f"i{n}" for n in range(18, 8, -1)]
    assert last["chosen"][0] == {"id": "i18", "title": "No. 18"}
    assert sorted(item["id"] for item in last["held_out"]) == ["i20", "i21"]
    assert last["num_held_out"] == 2
    assert last["recommended"] == [
        {"id": "i20", "title": "No. 20", "hit": True},
        {"id": "i3", "title": "No. 3", "hit": False},
    ]
    untitled = examples(data, "test", held_out, ranking, candidate_titles(data))
    assert untitled[0]["recommended"][0] == {"id": "i20", "title": None, "hit": True}


def test_a_title_column_that_is_not_there(data):
    with pytest.raises(ValueError, match="title_column must be among name, got titel"):
        candidate_titles(data, "titel")
