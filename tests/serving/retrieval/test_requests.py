import pytest

from serving.retrieval.requests import RetrieveRequest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "must have one of query_ids, queries and features"),
        ({"query_ids": ["a"], "features": {}}, "must have one of query_ids, queries and features"),
        ({"query_ids": ["a"], "queries": []}, "must have one of query_ids, queries and features"),
        ({"queries": {"history": []}}, "queries must be a list, got"),
        ({"queries": ["a"]}, "queries must be mappings, got 'a'"),
        ({"query_ids": "a"}, "query_ids must be a sequence of strings, got 'a'"),
        ({"query_ids": ["a", 7]}, "query_ids must be a sequence of strings, got 7 in it"),
        ({"query_ids": {"a": 1}}, "query_ids must be a sequence of strings"),
        ({"features": [1.0]}, r"features must map names to values, got \[1.0\]"),
        ({"query_ids": [], "exclude": None}, "exclude must be a sequence of strings, got None"),
        ({"query_ids": [], "exclude": b"raw"}, "exclude must be a sequence of strings"),
        ({"query_ids": [], "allow": [None]}, "allow must be a sequence .* got None in it"),
        ({"query_ids": [], "k": 0}, "k must be at least 1, got 0"),
        ({"query_ids": [], "k": True}, "k must be at least 1, got True"),
        ({"query_ids": [], "k": 2.0}, "k must be at least 1, got 2.0"),
        ({"query_ids": [], "exclude_seen": 1}, "exclude_seen must be true or false, got 1"),
        ({"query_ids": [], "min_score": float("nan")}, "min_score must be a finite number"),
        ({"query_ids": [], "min_score": "1"}, "min_score must be a finite number, got '1'"),
        ({"query_ids": [], "min_score": True}, "min_score must be a finite number, got True"),
        ({"query_ids": [], "index": "fast"}, "index must be one of default, exact, scann, got"),
        ({"query_ids": [], "index": ["exact"]}, "index must be one of"),
        ({"query_ids": [], "unknown_queries": ""}, "unknown_queries must be one of popular, empty"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RetrieveRequest(**arguments)
    assert "\n" not in str(error.value)


def test_a_message_does_not_repeat_megabytes():
    with pytest.raises(ValueError, match="query_ids must be") as error:
        RetrieveRequest("x" * 1_000_000)
    assert len(str(error.value)) < 200
