"""Rows predicted from the history before them: what is ranked, embedded, measured and written."""

import json

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.live import without_queries
from towers.data.interactions import open_data
from towers.evaluation.evaluate import evaluate_run, live_embeddings, measure_live
from towers.evaluation.settings import EvaluateConfig
from towers.metrics.held_out import HeldOut
from towers.model.encoder import Encoder
from towers.model.two_tower import TwoTower
from towers.training.settings import TrainConfig
from towers.training.train import train

TOWERS = {
    "features": {"tower": "features", "query_inputs": ("id", "history", "features"), "history": 4},
    "fism": {"tower": "fism", "normalize": True, "temperature": 0.3},
    "svdpp": {"tower": "svdpp", "share_items": False},
}


@pytest.fixture(scope="module")
def timed(attributed):
    return open_data(attributed)


@pytest.fixture(scope="module")
def live(timed):
    return HeldOut(timed, "test", history="live")


@pytest.mark.parametrize("name", TOWERS)
def test_a_row_is_embedded_as_a_request_with_its_history(timed, live, name, tmp_path, monkeypatch):
    monkeypatch.setattr("towers.evaluation.evaluate._MAX_CODES", 100)  # many blocks
    model = TwoTower(timed, 6, method="mns", init_stddev=0.5, **TOWERS[name])
    embeddings = live_embeddings(model, live)
    encoder = Encoder(timed, model, "query", tmp_path)
    users = timed.query_vocabulary.raw_ids.to_numpy(zero_copy_only=False)
    items = np.array(["", *timed.candidate_vocabulary.raw_ids.to_pylist()], object)
    codes = live.before.codes(np.arange(len(embeddings)))
    inputs = {spec: tf.fill([len(codes)], "") for spec in encoder.specs}
    inputs |= {"age": tf.fill([len(codes)], tf.constant(np.nan, tf.float64))}
    inputs |= {"query_id": tf.constant(users[live.query_ids]), "history": tf.constant(items[codes])}
    request = encoder.requested(inputs)["embedding"].numpy()
    np.testing.assert_allclose(embeddings, request, rtol=1e-5, atol=1e-6)
    stale = model.query_embeddings().numpy()[live.query_ids]
    assert not np.allclose(embeddings, stale)


def test_what_was_chosen_before_is_left_out_and_what_comes_later_is_not(timed, live):
    """A model that likes everything of the test split ranks all of a user's later rows at once."""
    test = timed.arrays("test")
    liked = np.zeros((timed.num_candidates, timed.num_queries), np.float32)
    liked[test["candidate_id"], test["query_id"]] = 1
    everyone = np.eye(timed.num_queries, dtype=np.float32)[live.query_ids]
    ranking = live.rank(everyone, liked, timed.num_candidates)
    for row, (query, time) in enumerate(zip(live.query_ids, test["timestamp"], strict=True)):
        ranked = ranking.candidates[row]
        codes = live.before.codes(np.array([row]))[0]
        assert set(ranked[ranked >= 0]) == set(range(timed.num_candidates)) - set(codes - 1)
        later = (test["query_id"] == query) & (test["timestamp"] >= time)
        assert set(ranked[: later.sum()]) == set(test["candidate_id"][later])
        [place] = np.flatnonzero(ranking.hits[row])
        assert ranked[place] == test["candidate_id"][row]


def test_a_user_counts_with_the_mean_of_its_rows(live):
    ranking = live.rank_by_popularity(5)
    means, _ = live.means(ranking, (5,))
    of_rows = ranking.hits[:, :5].any(axis=1)
    users = [of_rows[live.query_ids == user].mean() for user in np.unique(live.query_ids)]
    assert 0 < means["recall@5"] < 1
    np.testing.assert_allclose(means["recall@5"], np.mean(users))
    np.testing.assert_allclose(means["hit_rate@5"], np.mean(users))


def test_evaluate_measures_both_histories(attributed, timed, live, tmp_path, capsys):
    settings = {"dim": 4, "epochs": 1, "batch_size": 64, "tower": "fism", "jit_compile": False}
    train(TrainConfig(data=str(attributed), run=str(tmp_path), **settings))
    config = EvaluateConfig(data=str(attributed), run=str(tmp_path), ks=(5,), history="live")
    by_row = evaluate_run(config)["by_row"]
    assert json.loads((tmp_path / "metrics.json").read_text())["by_row"] == by_row
    assert by_row["rows"] == timed.num_rows("test")
    assert by_row["users"] == len(np.unique(live.query_ids))
    popularity, half_widths = live.measure_popularity((5,))
    assert by_row["popularity"] == {"means": popularity, "confidence_95": half_widths}
    cells = [f"{by_row[name]['means']['recall@5']:.4f}" for name in ("live", "stale")]
    assert cells[0] != cells[1]
    assert all(cell in capsys.readouterr().out for cell in cells[:1])
    page = (tmp_path / "report.html").read_text()
    section = page[page.index("Live history") : page.index("Training")]
    assert all(cell in section for cell in cells)
    assert f"{by_row['unseen']['live']['means']['recall@5']:.4f}" in section.split("without")[1]
    evaluate_run(EvaluateConfig(data=str(attributed), run=str(tmp_path), ks=(5,)))
    assert "Live history" not in (tmp_path / "report.html").read_text()


def test_users_without_train_rows_are_measured_apart(timed, live):
    """Whom training has never seen: rows of theirs with something before, by hand."""
    absent = np.unique(live.query_ids)[::3]
    data = without_queries(timed, absent)
    rows = HeldOut(data, "test", history="live")
    model = TwoTower(data, 4, method="mns", tower="fism")
    config = EvaluateConfig(data="data", run="run", ks=(5,))
    result = measure_live(model, rows, config)["unseen"]
    trained = np.isin(rows.query_ids, data.arrays("train")["query_id"])
    chosen = ~trained & (rows.before.sizes > 0)
    assert result["rows"] == chosen.sum() > 0
    assert 1 < result["users"] == len(np.unique(rows.query_ids[chosen]))
    hits = rows.rank(live_embeddings(model, rows), model.candidate_embeddings(), 5).hits.any(axis=1)
    users = [hits[chosen & (rows.query_ids == u)].mean() for u in np.unique(rows.query_ids[chosen])]
    np.testing.assert_allclose(result["live"]["means"]["hit_rate@5"], np.mean(users))


def test_towers_without_a_history_are_refused(timed, live):
    model = TwoTower(timed, 4, method="mns")
    with pytest.raises(ValueError, match="history live is for towers that read a history"):
        live_embeddings(model, live)
