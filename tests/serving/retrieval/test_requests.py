import pytest

from serving.retrieval.requests import RetrieveRequest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "must have one of query_ids, queries and features"),
        ({"query_ids": ["a"], "features": {}}, "must have one of query_ids, queries and features"),
        ({"query_ids": ["a"], "queries": []}, "must have one of query_ids, queries and features"),
        ({"queries": {"history": []}}, "queries: Input should be a valid list, got {"),
        ({"queries": ["a"]}, "queries.0: Input should be a valid dictionary, got 'a'"),
        ({"query_ids": "a"}, "query_ids: Input should be a valid list, got 'a'"),
        ({"query_ids": ["a", 7]}, "query_ids.1: Input should be a valid string, got 7"),
        ({"query_ids": {"a": 1}}, "query_ids: Input should be a valid list"),
        ({"features": [1.0]}, r"features: Input should be a valid dictionary, got \[1.0\]"),
        ({"query_ids": [], "exclude": None}, "exclude: Input should be a valid list, got None"),
        ({"query_ids": [], "exclude": b"raw"}, "exclude: Input should be a valid list"),
        ({"query_ids": [], "allow": [None]}, "allow.0: Input should be a valid string, got None"),
        ({"query_ids": [], "k": 0}, "k: Input should be greater than or equal to 1, got 0"),
        ({"query_ids": [], "k": True}, "k: Input should be a valid integer, got True"),
        ({"query_ids": [], "k": 2.0}, "k: Input should be a valid integer, got 2.0"),
        (
            {"query_ids": [], "exclude_seen": 1},
            "exclude_seen: Input should be a valid boolean, got 1",
        ),
        (
            {"query_ids": [], "min_score": float("nan")},
            "min_score: Input should be a finite number",
        ),
        ({"query_ids": [], "min_score": "1"}, "min_score: Input should be a valid number, got '1'"),
        (
            {"query_ids": [], "min_score": True},
            "min_score: Input should be a valid number, got True",
        ),
        (
            {"query_ids": [], "index": "fast"},
            "index: Input should be 'default', 'exact' or 'scann', got 'fast'",
        ),
        ({"query_ids": [], "index": ["exact"]}, "index: Input should be 'default'"),
        (
            {"query_ids": [], "unknown_queries": ""},
            "unknown_queries: Input should be 'popular', 'empty'",
        ),
        ({"query_ids": [], "kk": 1}, "kk: there is no such field, .* did you mean k"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RetrieveRequest(**arguments)
    assert "\n" not in str(error.value)


def test_a_message_does_not_repeat_megabytes():
    with pytest.raises(ValueError, match="query_ids: Input") as error:
        RetrieveRequest("x" * 1_000_000)
    assert len(str(error.value)) < 200
