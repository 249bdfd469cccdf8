"""Random filters through a whole retriever, against a loop in NumPy float64."""

import shutil

import numpy as np
import pytest

from pipeline.contract import schema
from pipeline.contract.schema import read_manifest
from serving.retrieval import search
from serving.retrieval.corpus import Base, Corpus
from serving.retrieval.filters import Filters
from serving.retrieval.requests import RetrieveRequest, UnknownQuery
from serving.retrieval.retriever import Retriever
from serving.retrieval.search import IndexSearch
from serving.version.versions import RETRIEVAL, Version


def random_request(sample, seed, index):
    """Any mixture of filters; most of them leave something."""
    rng = np.random.default_rng(seed)
    size = len(sample.vectors)

    def some_ids(most):
        chosen = rng.choice(size, rng.integers(0, most), replace=False)
        return [sample.candidate_ids[row] for row in chosen] + ["unheard of"] * rng.integers(0, 3)

    allow = [None, None, some_ids(size), some_ids(40)][rng.integers(4)]
    where = [
        None,
        {"colour": ["red", "green"]},
        {"colour": ["red", "blue"], "sizes?": ["s"]},
        {"weight": {"min": 3, "max": 3.5}},
    ][rng.integers(4)]
    return RetrieveRequest(
        [*rng.choice(sample.query_ids, rng.integers(1, 8)), "nobody"],
        k=int(rng.choice([1, 5, 20, 40, 41, 200])),
        exclude_seen=bool(sample.seen is not None and rng.integers(2)),
        exclude=some_ids([1, 10, size][rng.integers(3)]),
        allow=allow,
        where=where,
        min_score=None if rng.integers(2) else float(rng.normal()),
        index=index,
        unknown_queries="empty",
    )


def passing(sample, request, query_id):
    """Rows that pass the filters, best first, and their scores: a loop, in float64."""
    query = sample.query_ids.index(query_id)
    scores = sample.vectors.astype(np.float64) @ sample.queries[query].astype(np.float64)
    seen = sample.seen[query] if request.exclude_seen else ()
    barred = {sample.candidate_ids[row] for row in seen} | set(request.exclude)
    where, rows = request.where or {}, []
    for row in np.argsort(-scores, kind="stable"):
        name = sample.candidate_ids[row]
        allowed = request.allow is None or name in request.allow
        high = request.min_score is None or scores[row] >= request.min_score
        known = sample.attributes[row]
        if "colour" in where:
            allowed &= known["colour"] in where["colour"]
        if "sizes?" in where:
            allowed &= bool({*(known["sizes?"] or ())} & {*where["sizes?"]})
        if "weight" in where:
            weight, bounds = known["weight"], where["weight"]
            allowed &= weight is not None and bounds["min"] <= weight <= bounds["max"]
        if allowed and high and name not in barred:
            rows.append(row)
    return [sample.candidate_ids[row] for row in rows], dict(
        zip(sample.candidate_ids, scores, strict=True)
    )


@pytest.mark.parametrize("few_chosen", [0, 20_000])
@pytest.mark.parametrize("index", ["exact", "scann"])
def test_any_filters_give_what_a_loop_gives(retriever, small, index, few_chosen, monkeypatch):
    monkeypatch.setattr(search, "_FEW_CHOSEN", few_chosen)
    lengths = []
    for seed in range(24):
        request = random_request(small.sample, seed, index)
        response = retriever.answer(request)
        assert (response.version, response.index) == (1, index)
        strangers = {"unheard of"} & {*request.exclude, *(request.allow or ())}
        assert response.unknown_ids == len(strangers)
        *known, nobody = response.results
        assert (nobody.known, nobody.fallback, nobody.candidate_ids) == (False, "", [])
        for result, query_id in zip(known, request.query_ids, strict=False):
            expected, scores = passing(small.sample, request, query_id)
            assert result.query_id == query_id
            assert result.known
            assert result.candidate_ids == expected[: request.k], request
            wanted = [scores[name] for name in result.candidate_ids]
            np.testing.assert_allclose(result.scores, wanted, rtol=1e-4, atol=1e-6)
            lengths.append((len(result.scores), request.k))
    assert any(0 < length < k for length, k in lengths)  # the cases are worth something
    assert any(length == k > 20 for length, k in lengths)
    assert any(length == 0 for length, k in lengths)


@pytest.mark.long
def test_a_tree_gives_k_good_results_whatever_the_filters(tree, clustered):
    sample, hits, total = clustered.sample, 0, 0
    for seed in range(16):
        request = random_request(sample, seed, "scann")
        for result, query_id in zip(tree.answer(request).results, request.query_ids, strict=True):
            if query_id == "nobody":
                continue
            expected, scores = passing(sample, request, query_id)
            got = result.candidate_ids
            assert len(got) == len(set(got)) <= min(request.k, len(expected))
            assert len(got) == min(request.k, len(expected))
            assert set(got) <= set(expected)
            wanted = [scores[name] for name in got]
            np.testing.assert_allclose(result.scores, wanted, rtol=1e-3, atol=1e-4)
            assert result.scores == sorted(result.scores, reverse=True)
            hits += len(set(got) & set(expected[: request.k]))
            total += min(request.k, len(expected))
    assert hits / total > 0.95


@pytest.fixture
def exactly_searched(monkeypatch):
    """How many queries each request passes on to exact search."""
    counts, best_rows = [], search.best_rows

    def counting(vectors, embeddings, filters, queries, k):
        counts.append(len(queries))
        return best_rows(vectors, embeddings, filters, queries, k)

    monkeypatch.setattr(search, "best_rows", counting)
    return counts


def test_an_index_is_asked_for_more_before_everything_is_scored(tree, clustered, exactly_searched):
    sample = clustered.sample
    exclude = sample.best_ids(0)[:15]
    request = RetrieveRequest(sample.query_ids, k=20, exclude=exclude, index="scann")
    results = tree.answer(request).results
    assert exactly_searched == [0]
    barred = sample.best(0)[:15]
    hits = [
        len(set(result.candidate_ids) & set(sample.best_ids(query, barred)[:20]))
        for query, result in enumerate(results)
    ]
    assert np.mean(hits) > 18.5
    assert {len(result.scores) for result in results} == {20}

    tree.index("scann").widest = 0  # a version that was published before there was wide_search
    try:
        results = tree.answer(request).results
    finally:
        tree.index("scann").widest = 160
    assert exactly_searched[1] >= 1
    assert results[0].candidate_ids == sample.best_ids(0, barred)[:20]


def test_few_chosen_rows_and_a_large_k_go_straight_to_exact_search(
    tree, clustered, exactly_searched, monkeypatch
):
    searched, of_index = [], IndexSearch.search
    monkeypatch.setattr(
        IndexSearch, "search", lambda self, e, k: (searched.append(len(e)), of_index(self, e, k))[1]
    )
    ids, sample = clustered.sample.query_ids[:3], clustered.sample
    allow = sample.candidate_ids[:50]
    tree.answer(RetrieveRequest(ids, k=5, allow=allow, index="scann"))
    tree.answer(RetrieveRequest(ids, k=161, index="scann"))
    assert (searched, exactly_searched) == ([], [3, 3])
    tree.answer(RetrieveRequest(ids, k=20, index="scann"))
    assert (searched, exactly_searched) == ([3], [3, 3, 0])


def test_a_share_of_the_corpus_is_sought_among_more_results(
    tree, clustered, exactly_searched, monkeypatch
):
    """A third is chosen: 20 of them are among 90 results, or among 160, the widest search."""
    monkeypatch.setattr(search, "_FEW_CHOSEN", 100)
    asked, search_wider = [], IndexSearch.search_wider

    def widening(self, embeddings, num_results):
        asked.append((len(embeddings), num_results))
        return search_wider(self, embeddings, num_results)

    monkeypatch.setattr(IndexSearch, "search_wider", widening)
    sample, where = clustered.sample, {"colour": ["red"]}
    request = RetrieveRequest(sample.query_ids, k=20, where=where, index="scann")
    results = tree.answer(request).results
    assert asked[0] == (200, 87)  # (20 + 2 √20) · 4000 / 1334
    assert asked[1][1] == 160
    assert exactly_searched[0] <= 10
    hits = 0
    for query, result in enumerate(results):
        chosen = [row for row in sample.best(query) if row % 3 == 0][:20]
        hits += len({*result.candidate_ids} & {sample.candidate_ids[row] for row in chosen})
        assert len(result.candidate_ids) == 20
    assert hits / 4000 > 0.95
    tree.answer(request.model_copy(update={"where": {"colour": ["red"], "sizes?": ["l"]}}))
    assert (len(asked), exactly_searched[1]) == (2, 200)  # a fifteenth: scored each


@pytest.mark.parametrize("index", ["exact", "scann"])
def test_some_more_than_the_results_of_an_index_are_asked_of_it(
    tree, clustered, exactly_searched, index
):
    ids = clustered.sample.query_ids
    results = tree.answer(RetrieveRequest(ids, k=21, index=index)).results
    hits = [
        len(set(result.candidate_ids) & set(clustered.sample.best_ids(query)[:21]))
        for query, result in enumerate(results)
    ]
    assert np.mean(hits) > 19.9
    assert exactly_searched == [len(ids) if index == "exact" else 0]


@pytest.mark.parametrize(("index", "searched"), [("exact", 0), ("scann", 1)])
def test_below_the_lowest_score_there_may_be_what_an_index_has_missed(
    tree, exactly_searched, index, searched
):
    [plain] = tree.answer(RetrieveRequest(["query 0"], k=20, index=index)).results
    request = RetrieveRequest(["query 0"], k=20, min_score=plain.scores[7], index=index)
    [result] = tree.answer(request).results
    assert result.candidate_ids[:8] == plain.candidate_ids[:8]
    assert exactly_searched == [0, searched]


def test_many_requests_get_what_each_gets_alone(retriever, small):
    requests = [
        random_request(small.sample, seed, ("exact", "scann")[seed % 2]) for seed in range(100, 120)
    ]
    requests[4] = RetrieveRequest(["query 0", "nobody"], unknown_queries="error")
    with pytest.raises(ValueError, match="takes query_ids, not features"):
        retriever.check(RetrieveRequest(features={"embedding": [[0.0] * 8]}))
    together = retriever.answer_all([retriever.check(request) for request in requests])
    assert isinstance(together[4], UnknownQuery)
    for place, request in enumerate(requests):
        if place != 4:
            alone = retriever.answer(request)
            assert [result.candidate_ids for result in together[place].results] == [
                result.candidate_ids for result in alone.results
            ]
    assert retriever.answer_all([]) == []
    assert retriever.answer(RetrieveRequest([])).results == []


def popularity(sample):
    """Rows by how many seen lists hold them: a loop."""
    counts = [0] * len(sample.vectors)
    for rows in sample.seen:
        for row in rows:
            counts[row] += 1
    return counts, sorted(range(len(counts)), key=lambda row: (-counts[row], row))


def test_unknown_queries_get_popular_candidates_that_are_marked(retriever, small):
    sample = small.sample
    counts, order = popularity(sample)
    request = RetrieveRequest(["nobody", "query 3"], k=7, min_score=1e9, unknown_queries="popular")
    nobody, known = retriever.answer(request).results
    assert (nobody.known, nobody.fallback) == (False, "popular")
    assert nobody.candidate_ids == [sample.candidate_ids[row] for row in order[:7]]
    assert nobody.scores == [counts[row] for row in order[:7]]
    assert (known.known, known.fallback, known.candidate_ids) == (True, "", [])

    exclude = [sample.candidate_ids[row] for row in order[:4]]
    left = [sample.candidate_ids[row] for row in order[4:]]
    request = RetrieveRequest(["nobody"], k=7, exclude=exclude)
    [barred] = retriever.answer(request, unknown_queries="popular").results
    assert barred.candidate_ids == left[:7]
    allow = [*exclude, *left[100:103]]
    request = RetrieveRequest(["nobody"], k=7, exclude=exclude, allow=allow)
    [allowed] = retriever.answer(request, unknown_queries="popular").results
    assert allowed.candidate_ids == left[100:103]
    [result] = retriever.top_k(["nobody"], 2, unknown_queries="popular")
    assert result.candidate_ids == [sample.candidate_ids[row] for row in order[:2]]


def test_an_unknown_query_can_be_an_error(retriever):
    request = RetrieveRequest(["nobody", "query 1", "noone"], unknown_queries="error")
    with pytest.raises(UnknownQuery, match=r"2 of 3 queries are not known .*: 'nobody', 'noone'"):
        retriever.answer(request, unknown_queries="empty")  # the request decides
    assert retriever.answer(request.model_copy(update={"unknown_queries": "empty"}))
    with pytest.raises(UnknownQuery):
        retriever.answer(RetrieveRequest(["nobody"]), unknown_queries="error")


def test_counts_of_a_bundle_decide_what_is_popular(tmp_path, small):
    files = shutil.copytree(small.version / RETRIEVAL, tmp_path / RETRIEVAL)
    np.save(files / schema.BUNDLE_CANDIDATE_COUNTS, np.arange(300) % 250)
    filters = Filters(300, np.array([248]), None, [np.empty(0, np.int64)])
    version = Version(1, tmp_path, read_manifest(small.version, "version"))
    corpus = Corpus(Base(version), version)
    rows, counts = corpus.popular_rows(filters, 0, 3)
    assert rows.tolist() == counts.tolist() == [249, 247, 246]


def test_without_counts_and_seen_lists_nothing_is_popular(tree):
    assert not tree.corpus.has_popularity
    with pytest.raises(
        ValueError, match=r"'popular' needs counts of the candidates, but .* choose"
    ):
        tree.answer(RetrieveRequest(["query 0"], unknown_queries="popular"))
    requests = [tree.check(RetrieveRequest([name])) for name in ("query 0", "nobody")]
    outcomes = tree.answer_all(requests, unknown_queries="popular")
    assert outcomes[0].results[0].known
    assert "needs counts of the candidates" in str(outcomes[1])


@pytest.fixture(scope="module")
def embedded(by_embedding):
    return Retriever.load(by_embedding.models)


def test_a_version_without_query_model_filters_by_embedding(embedded, by_embedding):
    sample = by_embedding.sample
    exclude = sample.best_ids(4)[:3]
    features = {"embedding": sample.queries[4:6].tolist()}
    response = embedded.answer(RetrieveRequest(features=features, k=8, exclude=exclude))
    rows = sample.best(4)[:3]
    for query, result in zip((4, 5), response.results, strict=True):
        assert (result.query_id, result.known) == ("", True)
        assert result.candidate_ids == sample.best_ids(query, rows)[:8]
    assert embedded.answer(RetrieveRequest(features={"embedding": []})).results == []


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, r"got the names \[\]"),
        ({"age": [1]}, r"got the names \['age'\]"),
        ({"embedding": [1.0] * 8}, r"got the shape \[8\]"),
        ({"embedding": [[1.0] * 7]}, r"got the shape \[1, 7\]"),
        ({"embedding": [[1.0] * 8, [1.0]]}, "not numbers in rows of one length"),
        ({"embedding": [["a"] * 8]}, "not numbers in rows of one length"),
        ({"embedding": [[float("nan")] * 8]}, "got a larger one or NaN"),
        ({"embedding": [[1e300] * 8]}, "got a larger one or NaN"),
        ({"embedding": [[10**400] * 8]}, "not numbers in rows of one length"),
    ],
)
def test_embeddings_of_a_request_are_checked(embedded, features, message):
    with pytest.raises(ValueError, match=message) as error:
        embedded.answer(RetrieveRequest(features=features))
    assert str(error.value).startswith("features must be {'embedding': numbers [B, 8]}")


def test_query_ids_mean_nothing_without_a_query_model(embedded):
    with pytest.raises(ValueError, match="published without a query model"):
        embedded.top_k(["query 0"], 3)
    features = {"embedding": np.ones((1, 8))}
    with pytest.raises(ValueError, match="exclude_seen needs seen lists"):
        embedded.answer(RetrieveRequest(features=features, exclude_seen=True))
