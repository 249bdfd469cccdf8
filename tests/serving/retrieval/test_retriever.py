import json
import os
import subprocess
import sys

import numpy as np
import pytest

from serving.retrieval.requests import RetrieveResult
from serving.retrieval.retriever import Retriever
from serving.retrieval.search import Hits, IndexSearch


@pytest.fixture(scope="module")
def sample(small):
    return small.sample


@pytest.mark.parametrize("index", ["default", "exact", "scann"])
@pytest.mark.parametrize("k", [1, 10, 40, 41, 300, 1000])
def test_top_k_is_brute_force(retriever, sample, index, k):
    results = retriever.top_k(sample.query_ids, k, index=index)
    for query, result in enumerate(results):
        best = sample.best(query)[:k]
        assert result.query_id == sample.query_ids[query]
        assert result.known
        assert result.candidate_ids == [sample.candidate_ids[row] for row in best]
        expected = sample.vectors[best] @ sample.queries[query]
        np.testing.assert_allclose(result.scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", ["exact", "scann"])
@pytest.mark.parametrize("k", [5, 40, 120])
def test_seen_candidates_are_left_out_and_k_remain(retriever, sample, index, k):
    results = retriever.top_k(sample.query_ids, k, index=index, exclude_seen=True)
    for query, result in enumerate(results):
        expected = sample.best_ids(query, sample.seen[query])[:k]
        assert result.candidate_ids == expected
    lengths = [len(result.candidate_ids) for result in results]
    assert lengths[1] == k  # it has seen more than the index returns
    assert lengths[2] == 3  # all that it has not seen


@pytest.mark.parametrize("index", ["exact", "scann"])
def test_excluded_candidates_are_left_out_for_every_query(retriever, sample, index):
    exclude = [*sample.best_ids(0)[:3], "unheard of", *sample.best_ids(0)[:3]]
    rows = sample.best(0)[:3]
    results = retriever.top_k(sample.query_ids, 40, index=index, exclude=exclude)
    for query, result in enumerate(results):
        assert result.candidate_ids == sample.best_ids(query, rows)[:40]
    both = retriever.top_k(["query 1"], 10, exclude=exclude, exclude_seen=True)
    assert both[0].candidate_ids == sample.best_ids(1, [*rows, *sample.seen[1]])[:10]


def test_excluding_everything_leaves_nothing(retriever, sample):
    [result] = retriever.top_k(["query 0"], 5, exclude=sample.candidate_ids)
    assert result == RetrieveResult("query 0", True, [], [])


@pytest.mark.parametrize("index", ["exact", "scann"])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_an_unknown_query_has_no_results(retriever, index, exclude_seen):
    queries = ["nobody", "query 0", ""]
    results = retriever.top_k(queries, 5, index=index, exclude_seen=exclude_seen)
    assert [result.known for result in results] == [False, True, False]
    assert results[0] == RetrieveResult("nobody", False, [], [])
    assert len(results[1].candidate_ids) == 5


def test_history_is_what_the_query_had_in_training(retriever, sample):
    assert retriever.history("query 0") == []
    assert retriever.history("query 5") == [sample.candidate_ids[row] for row in sample.seen[5]]
    assert retriever.history("nobody") == []


def test_no_queries_have_no_results(retriever):
    assert retriever.top_k([], 5) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"query_ids": ["query 0"], "k": 0},
            "k: Input should be greater than or equal to 1, got 0",
        ),
        (
            {"query_ids": ["query 0"], "k": -3},
            "k: Input should be greater than or equal to 1, got -3",
        ),
        (
            {"query_ids": "query 0", "k": 5},
            "query_ids: Input should be a valid list, got 'query 0'",
        ),
        ({"query_ids": [7], "k": 5}, "query_ids.0: Input should be a valid string"),
        (
            {"query_ids": ["query 0"], "k": 5, "exclude": "a"},
            "exclude: Input should be a valid list",
        ),
        ({"query_ids": ["query 0"], "k": 5, "index": "fast"}, "index: Input should be 'default'"),
    ],
)
def test_a_wrong_argument_is_named(retriever, arguments, message):
    with pytest.raises(ValueError, match=message):
        retriever.top_k(**arguments)


def test_seen_lists_are_needed_to_exclude_seen(tree):
    with pytest.raises(ValueError, match="exclude_seen needs seen lists"):
        tree.top_k(["query 0"], 5, exclude_seen=True)
    assert tree.history("query 0") == []


def test_a_tree_index_gives_k_results_with_filters_and_after_close(clustered):
    retriever, sample = Retriever.load(clustered.models), clustered.sample
    barred = sample.best(0)[:15]
    exclude = [sample.candidate_ids[row] for row in barred]
    for _ in range(2):
        [result] = retriever.top_k(["query 0"], 20, index="scann", exclude=exclude)
        assert result.candidate_ids == sample.best_ids(0, barred)[:20]
        results = retriever.top_k(sample.query_ids, 20, index="scann")
        assert {len(set(result.candidate_ids)) for result in results} == {20}
        retriever.close()


@pytest.mark.parametrize("index", ["exact", "scann"])
def test_where_an_index_finds_too_few_the_rest_is_searched_exactly(
    retriever, small, monkeypatch, index
):
    run = IndexSearch._run

    def run_for_three(self, *arguments):
        rows, scores = run(self, *arguments)
        rows[:, 3:], scores[:, 3:] = -1, 0.0
        return Hits(rows, scores)

    monkeypatch.setattr(IndexSearch, "_run", run_for_three)
    [result] = retriever.top_k(["query 4"], 9, index=index)
    assert result.candidate_ids == small.sample.best_ids(4)[:9]


def test_a_retriever_that_is_warmed_up_has_read_its_tables(small):
    retriever = Retriever.load(small.models)
    retriever.warm_up()
    read = vars(retriever.corpus) | vars(retriever.corpus._base)
    assert {"encoded_ids", "query_row", "popularity"} <= set(read)
    assert {"_lookup", "_fields", "_lists"} <= set(vars(retriever.corpus.encoded_ids))
    assert retriever.corpus.query_ids(2) == ["query 0", "query 1"]
    signatures = retriever.index("exact").model.signatures
    assert signatures.keys() >= {"serving_default", "query_embedding"}


FRESH = """
import json, sys
sys.modules["scann"] = None
from serving.retrieval.requests import RetrieveResult
from serving.retrieval.retriever import Retriever
blocked = Retriever.load(sys.argv[1])
answer = {"exact": blocked.top_k(["query 3"], 7, index="exact")}
answer["loaded"] = sorted({name.split(".")[0] for name in sys.modules if sys.modules[name]})
try:
    blocked.top_k(["query 3"], 7, index="scann")
except ValueError as error:
    answer["error"] = str(error)
answer["default"] = blocked.top_k(["query 3"], 7)
answer["default_index"] = blocked.default_index
del sys.modules["scann"]
answer["scann"] = Retriever.load(sys.argv[1]).top_k(["query 3"], 7, index="scann")
print(json.dumps(answer))
"""


@pytest.mark.long
def test_a_fresh_process_answers_with_and_without_scann(small):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("TF_USE_LEGACY_KERAS", None)  # the trainer's tests set it
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(small.models)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    for index in ("exact", "default", "scann"):
        assert answer[index][0][2] == small.sample.best_ids(3)[:7]
    # TensorFlow itself imports Keras 3, so that cannot be asked for.
    trainers = {"towers", "samplers", "tf_keras", "tensorflow_recommenders", "apache_beam"}
    assert not (trainers | {"scann"}) & set(answer["loaded"])
    assert "index 'scann' needs the package scann" in answer["error"]
    assert answer["default_index"] == "exact"
