"""The standard split: what is set aside, baselines, rankings, metrics beyond recall, the log."""

import argparse
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from benchmarks import standard, standard_page
from benchmarks.standard_rows import Baseline, Ours, ease, graph_filter
from towers.data.interactions import open_data
from towers.metrics.held_out import HeldOut
from towers.metrics.ranking import rank_corpus, tie_order

TRAIN = sp.csr_matrix(np.random.default_rng(3).random((40, 12)) < 0.3, dtype=np.float32)


def test_the_last_rows_of_a_user_are_set_aside():
    users = np.array(["b"] * 4 + ["a"] * 25 + ["b"])
    expected = np.zeros(30, bool)
    expected[[24, 25, 26, 27, 28, 29]] = True  # .2 · 25 = 5 of a, one of b
    np.testing.assert_array_equal(standard.last_fifth(users), expected)


def test_ease_is_the_best_linear_map_without_its_diagonal():
    dense, reg = TRAIN.toarray().astype(np.float64), 2.0
    gram = dense.T @ dense + reg * np.eye(12)
    expected = np.empty((12, 12))
    for item in range(12):  # ridge of an item on the others, Ning and Karypis 2011 without L1
        others = np.delete(np.arange(12), item)
        expected[others, item] = np.linalg.solve(gram[np.ix_(others, others)], gram[others, item])
        expected[item, item] = 0
    found = ease(TRAIN, 0, reg=reg)(np.arange(40))
    np.testing.assert_allclose(found, dense @ expected, atol=1e-4)


def test_the_graph_filter_is_its_equation():
    dense = TRAIN.toarray().astype(np.float64)
    users, items = (np.maximum(dense.sum(axis=axis), 1) for axis in (1, 0))
    scaled = dense / np.sqrt(users[:, None] * items)
    vectors = np.linalg.svd(scaled)[2][:5]
    low = np.diag(items**-0.5) @ vectors.T @ vectors @ np.diag(items**0.5)
    expected = dense @ (scaled.T @ scaled + 0.3 * low)
    scores = graph_filter(TRAIN, 0, low_pass=0.3, rank=5)
    np.testing.assert_allclose(scores(np.arange(40)), expected, atol=1e-4)


def test_gini_is_the_mean_difference_over_twice_the_mean():
    counts = np.array([0, 3, 1, 8, 0])
    differences = np.abs(counts[:, None] - counts).mean()
    assert standard.gini(counts) == pytest.approx(differences / (2 * counts.mean()))
    assert standard.gini(np.full(7, 4)) == pytest.approx(0)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pages_say_what_is_kept(page):
    text, kept = (standard.RESULTS.parents[1] / page).read_text(), standard.rows_of(standard.KEPT)
    for name in ("preset", "student"):
        rows = [row for row in kept if (row["dataset"], row["row"]) == ("gowalla", name)]
        value, width = (
            np.mean([row[key]["recall@20"] for row in rows]) for key in ("metrics", "confidence_95")
        )
        assert f"{value:.4f} ± {width:.4f}".replace("0.", ".") in text


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A split in time of 30 users who choose 6 of 60 items in a row."""
    root = tmp_path_factory.mktemp("standard")
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.choice(60, 26, replace=False) for _ in range(30)]).astype(str)
    rows = pa.table({"user_id": np.repeat(np.arange(30), 26).astype(str), "item_id": items})
    test = np.tile(np.arange(26) >= 20, 30)
    for name, part in (("train", ~test), ("test", test)):
        file = root / "gowalla_lightgcn" / f"{name}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(rows.filter(pa.array(part)), file)
    work = str(root / "work")
    return argparse.Namespace(data=str(root), work=work, commit="c", dataset="gowalla")


@pytest.mark.long
def test_what_is_chosen_on_holds_no_test_rows(options):
    data = open_data(standard.prepared(options, "validation"))
    assert [data.num_rows(split) for split in ("train", "validation", "test")] == [480, 120, 0]
    final = open_data(standard.prepared(options, "test"))
    assert [final.num_rows(split) for split in ("train", "validation", "test")] == [600, 0, 180]


def test_a_ranking_by_scores_is_that_of_embeddings(options, monkeypatch):
    data = open_data(standard.prepared(options, "test"))
    queries, items = np.random.default_rng(1).normal(size=(2, 60, 4)).round().astype(np.float32)
    queries = queries[:30]  # small whole numbers: many ties
    order = tie_order(data.candidate_vocabulary.fingerprints)
    ranking, held_out = standard.rank(lambda ids: queries[ids] @ items[order].T, data, "test")
    known = data.positives("train")
    expected = rank_corpus(queries, items, held_out.query_ids, known, k=20, order=order)
    np.testing.assert_array_equal(ranking.candidates, expected)
    np.testing.assert_array_equal(ranking.hits, held_out.rank(queries, items, 20).hits)


def test_head_and_tail_are_recalls_of_their_items(options):
    data = open_data(standard.prepared(options, "test"))
    held_out = HeldOut(data, "test")
    vectors = np.random.default_rng(2).normal(size=(90, 4)).astype(np.float32)
    ranking = held_out.rank(vectors[:30], vectors[30:], 20)
    found, widths = standard.beyond(ranking.candidates, ranking.hits, held_out, data)
    most = set(np.argsort(-data.train_counts, kind="stable")[:3].tolist())  # 5 % of 60
    expected = {"head": [], "tail": []}
    for query, top in zip(held_out.query_ids, ranking.candidates.tolist(), strict=True):
        wanted = set(data.positives("test").of(query).tolist())
        for name, part in (("head", wanted & most), ("tail", wanted - most)):
            if part:
                expected[name].append(len(part & set(top)) / len(part))
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-5)
        assert widths[name] > 0
    shares = data.train_counts[ranking.candidates] / 30
    assert found["novelty"] == pytest.approx(-np.log2(shares).mean(), abs=1e-5)
    assert found["coverage"] == len(np.unique(ranking.candidates)) / 60


@pytest.fixture
def results(tmp_path, monkeypatch):
    for name in ("SEARCHES", "KEPT", "TESTS"):
        monkeypatch.setattr(standard, name, tmp_path / f"{name}.json")
    return tmp_path


def test_nothing_is_measured_on_test_before_its_search_is_finished(options, results):
    for trials in ([], [{"number": 0, "state": "complete", "value": 0.1, "params": {}}] * 5):
        study = {"row": "EASE", "dataset": "gowalla", "trials": trials}
        (results / "SEARCHES.json").write_text(json.dumps([study]))
        with pytest.raises(LookupError, match="needs its 6 trials"):
            standard.test(options, "EASE", 10)
    assert not (results / "TESTS.json").exists()


OTHER = Baseline(ease, {"reg": "log:1:100"}, "scipy")
OURS = Ours({"dim": 4, "normalize": True, "l2": 0.0}, ["temperature=log:0.1:1"], epochs=2)


@pytest.mark.parametrize("row", [OTHER, pytest.param(OURS, marks=pytest.mark.long)])
def test_a_row_is_tuned_measured_logged_and_checked(row, options, results, monkeypatch, capsys):
    for module in (standard, standard_page):
        monkeypatch.setattr(module, "ROWS", {"EASE": row})
    monkeypatch.setattr(standard, "ONE_SETTING", 2)
    standard.tune(options, "EASE")
    standard.tune(options, "EASE")  # finished: no further trials
    (study,) = json.loads((results / "SEARCHES.json").read_text())
    assert len({tuple(trial["params"].values()) for trial in study["trials"]}) == 2
    standard.test(options, "EASE", 10)
    options.check = "EASE"
    assert standard.check(options)
    kept = json.loads((results / "KEPT.json").read_text())
    assert kept[0]["params"] == standard.best_of("gowalla", "EASE")["params"]
    assert len(json.loads((results / "TESTS.json").read_text())) == 2
    kept[0]["metrics"]["recall@20"] += 1
    (results / "KEPT.json").write_text(json.dumps(kept))
    assert not standard.check(options)
    assert "OUTSIDE" in capsys.readouterr().out
    assert f"| EASE | {row.source} | 1 | 1." in standard_page.table(kept)
    assert "| gowalla | EASE | 2 | " in standard_page.chosen(study)


@pytest.mark.long
def test_ta_feng_is_parted_by_a_date(options, tmp_path):
    day = np.tile(np.arange(40), 30) * 86_400 + 979_344_000  # from 2001-01-13 on
    rows = {"user_id": np.repeat(np.arange(30), 40), "item_id": np.tile(np.arange(40), 30)}
    (tmp_path / "tafeng").mkdir()
    pq.write_table(pa.table(rows | {"timestamp": day}), tmp_path / "tafeng/interactions.parquet")
    chosen = argparse.Namespace(data=str(tmp_path), work=str(tmp_path), dataset="tafeng")
    for split, expected in (("validation", [600, 90, 510]), ("test", [690, 0, 510])):
        data = open_data(standard.prepared(chosen, split))
        assert [data.num_rows(part) for part in ("train", "validation", "test")] == expected
