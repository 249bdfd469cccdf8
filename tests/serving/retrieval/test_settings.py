import dataclasses

import pytest

from serving.retrieval.settings import QueryConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"index": "fast"}, "index must be one of default, exact, scann, got 'fast'"),
        ({"query": ""}, "query must be raw ids"),
        ({"version": -1}, "version must be at least 0"),
        ({"models": ""}, "models must be a directory"),
    ],
)
def test_a_query_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QueryConfig("models", "query 1"), **change)
