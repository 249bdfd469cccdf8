import json

import pytest

from serving.publish.publish import publish
from serving.rest.messages import encode_retrieve
from serving.retrieval.query import answer
from serving.retrieval.requests import RetrieveRequest, UnknownQuery
from serving.retrieval.retriever import Retriever
from serving.retrieval.settings import QueryConfig


@pytest.fixture
def loaded(retriever, monkeypatch):
    """Spares the tests that read what is printed a load of the model."""
    monkeypatch.setattr(Retriever, "load", lambda *_: retriever)


def test_a_table_ranks_candidates_and_marks_seen_ones(small, loaded, capsys):
    [result] = answer(QueryConfig(str(small.models), ("query 1",), k=3))
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


def test_several_queries_are_answered_in_their_order(small, loaded, capsys):
    ids = ("query 2", "query 1")
    results = answer(QueryConfig(str(small.models), ids, k=2))
    assert [result.candidate_ids for result in results] == [
        small.sample.best_ids(2)[:2],
        small.sample.best_ids(1)[:2],
    ]
    out = capsys.readouterr().out
    assert out.index("query 2\n") < out.index("query 1\n")
    answer(QueryConfig(str(small.models), ids, k=2, json=True))
    assert [one["query_id"] for one in json.loads(capsys.readouterr().out)] == list(ids)


def test_a_cut_off_above_the_corpus_is_an_error_where_somebody_chose_it(small, loaded):
    size = len(small.sample.vectors)
    with pytest.raises(ValueError, match=f"k must be at most {size}, .* change k"):
        answer(QueryConfig(str(small.models), ("query 1",), k=size + 1))


@pytest.fixture(scope="module")
def titled(small, tmp_path_factory):
    """A version whose candidates are called by their sizes, a column of lists."""
    models = tmp_path_factory.mktemp("titled")
    publish(small.bundle, models, k=10, title_column="sizes?", scann=False)
    return Retriever.load(models)


def test_titles_stand_beside_ids(small, titled, monkeypatch, capsys):
    titles = {
        raw_id: " ".join(attributes["sizes?"] or ())
        for raw_id, attributes in zip(
            small.sample.candidate_ids, small.sample.attributes, strict=True
        )
    }
    monkeypatch.setattr(Retriever, "load", lambda *_: titled)
    [result] = answer(QueryConfig("models", ("query 1",), k=9))
    assert result.titles == [titles[raw_id] for raw_id in result.candidate_ids]
    assert {"", "s m"} <= set(result.titles)
    lines = capsys.readouterr().out.splitlines()[1:]
    for raw_id, line in zip(result.candidate_ids, lines, strict=True):
        named = f"{raw_id}  {titles[raw_id]}".rstrip()
        assert line.count(f"{named}  ") == 1
        assert line.endswith(named)  # the history is the best 90
    answer(QueryConfig("models", ("query 1",), k=9, json=True))
    shown = json.loads(capsys.readouterr().out)["results"]
    assert [one.get("title", "") for one in shown] == list(result.titles)
    response = titled.answer(RetrieveRequest(["query 1"], k=9))
    [said] = json.loads(encode_retrieve("twotower", response))["results"]
    assert [one.get("title", "") for one in said["candidates"]] == list(result.titles)
    assert titled.corpus.titles_of(["nobody", result.candidate_ids[0]]) == ["", result.titles[0]]


def test_a_title_is_an_attribute_of_the_bundle(small, tmp_path):
    with pytest.raises(
        ValueError, match=r"got 'name': it has colour, sizes., weight; change title"
    ):
        publish(small.bundle, tmp_path, title_column="name")
    assert not list(tmp_path.iterdir())


def test_excluded_seen_candidates_are_not_shown(small, loaded, capsys):
    config = QueryConfig(str(small.models), ("query 1",), exclude_seen=True, index="exact")
    answer(config)
    assert "yes" not in capsys.readouterr().out


def test_json_says_which_version_and_index_answered(small, loaded, capsys):
    answer(QueryConfig(str(small.models), ("query 1",), k=2, index="exact", json=True))
    printed = json.loads(capsys.readouterr().out)
    assert (printed["query_id"], printed["model"]) == ("query 1", "twotower")
    assert (printed["version"], printed["index"]) == (1, "exact")
    first, second = printed["results"]
    assert (first["rank"], first["candidate_id"]) == (1, small.sample.best_ids(1)[0])
    assert first["score"] > second["score"]
    assert first["seen"] is True


def test_an_unknown_query_is_a_clear_line(small, capsys):
    with pytest.raises(UnknownQuery, match=r"'nobody' is not known to .*twotower/1: ") as error:
        answer(QueryConfig(str(small.models), ("query 1", "nobody")))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
