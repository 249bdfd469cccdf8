"""Queries as a request describes them, through every door: the same results as brute force."""

import json

import grpc
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import running
from tensorflow_serving.apis import predict_pb2

import twotower
from serving.retrieval.query_inputs import MAX_HISTORY
from serving.retrieval.retriever import Retriever

MODEL = "/v1/models/twotower"
ITEMS = [f"cañdidate {7 * row}" for row in range(300)]
LIVE = {"history": [ITEMS[3], "gone\n\0", ITEMS[8]], "town": "Bern", "age": 30, "tags": ["a", "b"]}


def embedding_of(sample, query):
    """By hand, as the query model of the bundle does it."""
    rows = [ITEMS.index(name) for name in query.get("history", ()) if name in ITEMS]
    total = sample.vectors[rows].sum(axis=0)
    if "query_id" in query and not query.get("history"):
        total = total + sample.queries[sample.query_ids.index(query["query_id"])]
    if "town" in query:
        total = total + sample.vectors[["Ulm", "Bern"].index(query["town"])]
    return total + 0.01 * query.get("age", 0) + len(query.get("tags", ()))


def best_ids(sample, query, excluded=()):
    scores = sample.vectors @ embedding_of(sample, query)
    return [ITEMS[row] for row in np.argsort(-scores, kind="stable") if ITEMS[row] not in excluded]


@pytest.fixture(scope="module")
def retriever(described):
    retriever = Retriever.load(described.models)
    yield retriever
    retriever.close()


@pytest.fixture(scope="module")
def live(described):
    with running(described.models) as server:
        yield server


def test_a_query_is_what_the_request_says(retriever, described):
    queries = [LIVE, {"query_id": "query 4"}, {"query_id": "query 4", "history": [ITEMS[9]]}]
    queries += [{"query_id": "query 4", "town": "Ulm", "history": [], "age": None}]
    for index in ("exact", "scann"):
        results = retriever.top_k(queries=queries, k=7, index=index)
        for query, result in zip(queries, results, strict=True):
            said = {name: value for name, value in query.items() if value}
            assert result.candidate_ids == best_ids(described.sample, said)[:7]
            assert (result.query_id, result.known) == (query.get("query_id", ""), True)
        assert [result.unknown_history for result in results] == [1, 0, 0, 0]


def test_a_query_of_which_nothing_is_known(retriever):
    [result] = retriever.top_k(queries=[{"history": ["gone"]}], k=3)
    assert (result.known, result.candidate_ids, result.unknown_history) == (False, [], 1)
    [result] = retriever.top_k(queries=[{"query_id": "new"}], k=3, unknown_queries="popular")
    assert (result.known, result.fallback, len(result.candidate_ids)) == (False, "popular", 3)


def test_what_a_request_calls_history_counts_as_seen(retriever, described):
    seen = [ITEMS[row] for row in described.sample.seen[1]]
    query = {"query_id": "query 1", "history": [ITEMS[200], ITEMS[201]]}
    [result] = retriever.top_k(queries=[query], k=5, exclude_seen=True)
    excluded = [*seen, *query["history"]]
    assert result.candidate_ids == best_ids(described.sample, query, excluded)[:5]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"colour": "red"}, r"queries\[1\] has 'colour', .* it takes age, history, query_id, tags"),
        ({"townn": "Ulm"}, "did you mean town"),
        ({"age": "old"}, r"queries\[1\]: age must be a number up to 1e\+15, got 'old'"),
        ({"age": True}, "age must be a number"),
        ({"age": float("nan")}, "age must be a number"),
        ({"town": ["Ulm"]}, "town must be a string"),
        ({"town": "\ud800"}, "town must be a string"),
        ({"town": "x" * 70_000}, "town must be a string, got 'xxx"),
        ({"history": "a"}, "history must be a list of strings"),
        ({"history": [1]}, r"history must be a list of strings, got \[1\]"),
        ({"history": ["a"] * 100_000}, f"history must be a list of at most {MAX_HISTORY}"),
        ({"tags": {"a": 1}}, "tags must be a list of strings"),
        ({}, r"queries\[1\] must have at least one of age, history"),
        ({"town": None}, r"queries\[1\] must have at least one of"),
    ],
)
def test_a_wrong_query_is_one_line(retriever, query, message):
    with pytest.raises(ValueError, match=message) as error:
        retriever.top_k(queries=[LIVE, query])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_the_rows_of_a_table(retriever):
    table = {"query_id": ["a", "b"], "history": [[ITEMS[3], None, ""], None], "town": [7.0, None]}
    table |= {"age": pa.array([30, None]), "tags": pa.array([None, ["x"]])}
    rows = retriever.query_inputs.rows(pa.table(table))
    first = {"query_id": "a", "history": [ITEMS[3]], "town": "7", "age": 30, "tags": []}
    assert rows == [first, {"query_id": "b", "history": [], "tags": ["x"]}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"histroy": [["a"]]}, "'histroy', which this version does not take: did you mean history"),
        ({"history": ["a"]}, "attribute 'history' must hold lists of texts"),
        ({"age": ["old"]}, "attribute 'age' must hold numbers"),
        ({"town": [["Ulm"]]}, "attribute 'town' must hold texts"),
        ({"town": [None]}, r"queries\[0\] must have at least one of"),
        ({"history": [["a"] * 100_000]}, f"history must be a list of at most {MAX_HISTORY}"),
    ],
)
def test_a_wrong_table_is_one_line(retriever, columns, message):
    with pytest.raises(ValueError, match=message) as error:
        retriever.query_inputs.rows(pa.table(columns))
    assert len(str(error.value)) < 300


def test_a_version_that_takes_ids_alone(small):
    retriever = Retriever.load(small.models)
    [result] = retriever.top_k(queries=[{"query_id": "query 3"}], k=4)
    assert result.candidate_ids == small.sample.best_ids(3)[:4]
    with pytest.raises(ValueError, match="history, which this version does not take: its tower"):
        retriever.top_k(queries=[{"query_id": "query 3", "history": [ITEMS[0]]}])
    retriever.close()


def test_rest(live, described):
    body = {"queries": [LIVE, {"query_id": "query 2"}], "k": 4}
    results = live.post(f"{MODEL}:retrieve", body).json["results"]
    for query, result in zip(body["queries"], results, strict=True):
        ids = [candidate["id"] for candidate in result["candidates"]]
        assert ids == best_ids(described.sample, query)[:4]
    assert [result["unknown_history"] for result in results] == [1, 0]
    answer = live.post(f"{MODEL}:retrieve", {"queries": [{"town": 7}]})
    assert (answer.status, answer.error) == (400, "queries[0]: town must be a string, got 7.")


def test_predict_over_both_apis(live, described):
    row = {"age": 30, "history": [ITEMS[3]], "query_id": "", "tags": ["a"], "town": "Bern"}
    expected = best_ids(described.sample, {n: v for n, v in row.items() if v})[:40]
    body = {"signature_name": "retrieve", "instances": [row, row]}
    answer = live.post(f"{MODEL}:predict", body).json["predictions"]
    assert [found["candidate_id"] for found in answer] == [expected] * 2
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "twotower", "retrieve"
    for name, value in row.items():
        dtype = tf.float64 if name == "age" else tf.string
        value = np.nan if name == "age" else value  # a number that is missing
        request.inputs[name].CopyFrom(tf.make_tensor_proto([value], dtype))
    ids = tf.make_ndarray(live.prediction.Predict(request).outputs["candidate_id"])
    del row["age"]
    expected = best_ids(described.sample, {n: v for n, v in row.items() if v})[:40]
    assert [name.decode() for name in ids[0]] == expected


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner)),
    max_leaves=9,
)
NAMES = st.one_of(st.sampled_from(["query_id", "history", "town", "age", "tags"]), st.text())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(queries=st.one_of(ANYTHING, st.lists(st.dictionaries(NAMES, ANYTHING, max_size=4))))
def test_no_body_fails_the_service(live, queries):
    answer = live.post(f"{MODEL}:retrieve", json.dumps({"queries": queries, "k": 2}).encode())
    assert answer.status in (200, 400), answer


WHERE_NAMES = st.one_of(st.sampled_from(["colour", "sizes?", "weight"]), st.text())
BOUNDS = st.dictionaries(st.sampled_from(["min", "max", "mean"]), ANYTHING)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    where=st.one_of(ANYTHING, st.dictionaries(WHERE_NAMES, st.one_of(BOUNDS, ANYTHING), max_size=4))
)
def test_no_where_fails_the_service(live, where):
    body = {"query_ids": ["query 1"], "k": 2, "where": where}
    answer = live.post(f"{MODEL}:retrieve", json.dumps(body).encode())
    assert answer.status in (200, 400), answer
    if answer.status == 400:
        assert "\n" not in answer.error
        assert len(answer.error) < 1000


STRANGE = ["a\nb", "\0", "a\0b", "\r\n", "\u2028", "x" * 60_000, "🦆", "cañdidate 21\n"]


def test_hostile_queries_are_answered_or_refused_in_one_line(live, described):
    def ask(**body):
        return live.post(f"{MODEL}:retrieve", {"k": 3} | body)

    [result] = ask(queries=[{"query_id": "a\n\0", "history": [*STRANGE, ITEMS[3]]}]).json["results"]
    assert (result["query_id"], result["unknown_history"]) == ("a\n\0", len(STRANGE))
    ids = [candidate["id"] for candidate in result["candidates"]]
    assert ids == best_ids(described.sample, {"history": [ITEMS[3]]})[:3]
    same = ask(query_ids=["query 1"]).json["results"]
    assert ask(query_ids=["query 1"], exclude=STRANGE).json["results"] == same
    [result] = ask(query_ids=["query 1"], where={"colour": STRANGE}).json["results"]
    assert result["candidates"] == []
    for wrong, message in [
        ({"queries": [{"history": ["a"] * 100_000}]}, "history must be a list of at most"),
        ({"queries": [{"history": [["a"]]}]}, "history must be a list of strings"),
        ({"queries": [{"history": {"a": 1}}]}, "history must be a list of strings"),
        ({"queries": [{"age": "30"}]}, "age must be a number"),
        ({"queries": [{"age": 1e300}]}, "age must be a number"),
        ({"queries": [{"town": "\ud800"}]}, ""),
        ({"where": {"colour": ["a"] * 100_000}}, "where may have at most 10000 values"),
        ({"where": {"colour": {"min": 1}}}, "where: colour must be a string"),
        ({"where": {"weight": ["1"]}}, "where: weight must be numbers"),
        ({"where": {"weight": {"min": "1"}}}, "where: weight must be numbers"),
        ({"where": {f"c{row}": "a" for row in range(100_000)}}, "at most 20 fields"),
        ({"where": {"a\n\0": "a"}}, "which this version does not know"),
    ]:
        answer = ask(**{"query_ids": ["query 1"]} | wrong if "where" in wrong else wrong)
        assert answer.status == 400, wrong
        assert message in answer.error
        assert "\n" not in answer.error
        assert len(answer.error) < 500


def test_hostile_tensors_are_answered_or_refused_in_one_line(live, described):
    def predict(**inputs):
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = "twotower", "retrieve"
        empty = {"query_id": [""], "town": [""], "tags": [[""]], "history": [[""]]}
        for name, value in (empty | {"age": np.array([np.nan])} | inputs).items():
            proto = tf.make_tensor_proto(value if isinstance(value, tf.Tensor) else np.array(value))
            request.inputs[name].CopyFrom(proto)
        return live.prediction.Predict(request).outputs["candidate_id"]

    expected = best_ids(described.sample, {"history": [ITEMS[3]]})[:40]
    names = tf.make_ndarray(predict(history=tf.constant([[*STRANGE, b"\xff\0", ITEMS[3]]])))
    assert [name.decode() for name in names[0]] == expected
    names = tf.make_ndarray(predict(history=tf.constant([["a"] * 100_000 + [ITEMS[3]]])))
    assert [name.decode() for name in names[0]] == expected
    for wrong in (
        {"history": [1]},
        {"history": [[1.5]]},
        {"history": ["a"]},
        {"age": ["old"]},
        {"town": [["Ulm"]]},
        {"tags": [["a"], ["b"]]},
        {"town": []},
    ):
        with pytest.raises(grpc.RpcError) as error:
            predict(**wrong)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, wrong
        assert "\n" not in error.value.details()


def test_the_command(described, capsys):
    models = ["query", "--models", str(described.models), "--json"]
    said = ["--history", f"{ITEMS[3]},gone", "--set", "town=Bern", "age=30", "tags=a,b"]
    assert twotower.main([*models, *said, "--k", "5"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    query = {"history": [ITEMS[3]], "town": "Bern", "age": 30, "tags": ["a", "b"]}
    expected = best_ids(described.sample, query)[:5]
    assert [result["candidate_id"] for result in results] == expected
    assert results[0]["seen"] == (expected[0] == ITEMS[3])
    barred = {name for name, row in zip(ITEMS, range(300), strict=True) if row % 3 != 1}
    where = ["--where", "colour=blue", "weight:max=20"]
    assert twotower.main([*models, *said, *where, "--k", "9"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    weight = {n: a["weight"] for n, a in zip(ITEMS, described.sample.attributes, strict=True)}
    barred |= {name for name in ITEMS if weight[name] is None or weight[name] > 20}
    expected = best_ids(described.sample, query, barred)
    assert [result["candidate_id"] for result in results] == expected[:9]
    assert twotower.main([*models, *said, "--where", "colour:min=3"]) == 2
    assert "where must have no min of colour, which holds texts" in capsys.readouterr().err
    assert twotower.main([*models, "--set", "age=old"]) == 2
    assert twotower.main(models) == 2
    assert "without --history and --set, got ()" in capsys.readouterr().err
