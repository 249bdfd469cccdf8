import json

import pytest

from serving.retrieval.query import answer
from serving.retrieval.requests import UnknownQuery
from serving.retrieval.retriever import Retriever
from serving.retrieval.settings import QueryConfig


@pytest.fixture
def loaded(retriever, monkeypatch):
    """Spares the tests that read what is printed a load of the model."""
    monkeypatch.setattr(Retriever, "load", lambda *_: retriever)


def test_a_table_ranks_candidates_and_marks_seen_ones(small, loaded, capsys):
    result = answer(QueryConfig(str(small.models), "query 1", k=3))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["rank", "candidate_id", "score", "seen", "history"]
    expected = small.sample.best_ids(1)[:3]
    assert result.candidate_ids == expected
    for rank, line in enumerate(lines, start=1):
        score = f"{result.scores[rank - 1]:.4f}"
        beside = Retriever.load(small.models).history("query 1")[rank - 1]
        ranked = [str(rank), *expected[rank - 1].split(), score, "yes"]
        assert line.split() == [*ranked, *beside.split()]
    assert len(lines) == 3


def test_excluded_seen_candidates_are_not_shown(small, loaded, capsys):
    config = QueryConfig(str(small.models), "query 1", exclude_seen=True, index="exact")
    answer(config)
    assert "yes" not in capsys.readouterr().out


def test_json_says_which_version_and_index_answered(small, loaded, capsys):
    answer(QueryConfig(str(small.models), "query 1", k=2, index="exact", json=True))
    printed = json.loads(capsys.readouterr().out)
    assert (printed["query_id"], printed["model"]) == ("query 1", "twotower")
    assert (printed["version"], printed["index"]) == (1, "exact")
    first, second = printed["results"]
    assert (first["rank"], first["candidate_id"]) == (1, small.sample.best_ids(1)[0])
    assert first["score"] > second["score"]
    assert first["seen"] is True


def test_an_unknown_query_is_a_clear_line(small, capsys):
    with pytest.raises(UnknownQuery, match=r"'nobody' is not known to .*twotower/1: ") as error:
        answer(QueryConfig(str(small.models), "nobody"))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
