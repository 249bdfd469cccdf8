"""Runs of the papers' tables: which are the same, what is repeated, what the page shows."""

import argparse
import json

import pytest

from benchmarks import paper_page, paper_tables
from benchmarks.paper_page import section
from benchmarks.paper_search import SEARCHES, changed
from benchmarks.paper_settings import TABLES, Row, Table
from benchmarks.paper_tables import check, identity, settings_of
from towers.training.settings import TrainConfig

METRICS = {"recall@50": 0.2}


def result(seed=10, epochs=30, **further):
    kept = {"config": {}, "metrics": METRICS, "date": "2026-11-28", "commit": "c", "command": "run"}
    return kept | {"method": "bpr", "seed": seed, "epochs": epochs} | further


def test_every_trial_is_a_configuration_that_differs_from_the_others():
    for (name, method), trials in SEARCHES.items():
        table = next(table for (other, _), table in TABLES.items() if other == name)
        configs = []
        for trial in trials:
            settings = settings_of(changed(table.rows[method], trial), table, method)
            configs.append(TrainConfig(data="data", run="run", **settings))
        assert all(configs.count(config) == 1 for config in configs)
        assert len(trials) <= 24


def test_runs_of_other_lengths_are_others_unless_validation_ended_them():
    assert identity(result(epochs=30)) != identity(result(epochs=60))
    ended = {"config": {"validation_ratio": 0.1}}
    assert identity(result(epochs=5, **ended)) == identity(result(epochs=6, **ended))


@pytest.mark.parametrize(("value", "within"), [(0.203, True), (0.205, False)])
def test_a_check_trains_as_long_as_the_row_and_fails_outside_its_interval(
    value, within, monkeypatch, tmp_path
):
    kept = [result(epochs=30), result(epochs=60, confidence_95={"recall@50": 0.004})]
    trained = []

    def measured(options, dataset, method, seed, place):
        trained.append((dataset, method, seed, options.epochs))
        return [{"metrics": {"recall@50": value}, "confidence_95": {"recall@50": 1.0}}, {}]

    monkeypatch.setattr(paper_tables, "rows_of", lambda path: kept)
    monkeypatch.setattr(paper_tables, "measured", measured)
    options = argparse.Namespace(check="adasir/gowalla/bpr", work=str(tmp_path), commit="c")
    assert check(options) is within
    assert trained == [("gowalla", "bpr", 10, 60)]


@pytest.mark.parametrize(
    "row", ["", "adasir", "nothing/gowalla/bpr", "adasir/gowalla/nothing", "adasir/gowalla/bpr/99"]
)
def test_a_check_of_a_row_that_is_not_kept_is_an_error(row, monkeypatch, tmp_path):
    monkeypatch.setattr(paper_tables, "rows_of", lambda path: [result(), result(method="nothing")])
    options = argparse.Namespace(check=row, work=str(tmp_path), commit="c")
    with pytest.raises(ValueError, match=r"check must be TABLE/DATASET/METHOD\[/SEED\] of a kept"):
        check(options)


def test_a_table_has_its_seeds_what_is_not_built_and_what_is_missing():
    rows = {"bpr": Row(paper={"recall@50": 0.19}), "dns": Row()}
    extra = {"published": {"IRGAN": {"recall@50": 0.3}}, "seconds": {"dns": 36.0}}
    table = Table("Title", "a paper", {}, ("recall@50",), rows, **extra)
    path = paper_tables.RESULTS / "some.json"
    text = section(
        table, "gowalla", [result(seed=10, cpu_seconds=120), result(seed=11, epochs=15)], path
    )
    assert "| `bpr` | 30 | 1 | **.2000** (.1900) | 2 |" in text
    assert "| IRGAN | not built | – | (.3000) | – |" in text
    assert "`dns` 1.0." in text
    ended = [
        result(seed, epochs=n, config={"validation_ratio": 0.1}) for seed, n in ((10, 6), (11, 8))
    ]
    assert "| `bpr` | 6-8 | 2 |" in section(table, "gowalla", ended, path)


def test_the_page_says_which_rows_are_below_the_papers(monkeypatch):
    paper = {"recall@50": 0.2, "ndcg@50": 0.1}
    rows = {"bpr": Row(paper=paper), "dns": Row(paper=paper), "warp": Row()}
    found = [result(metrics={"recall@50": r, "ndcg@50": 0.1}) for r in (0.195, 0.192)]
    found += [result(method="dns", metrics={"recall@50": 0.194, "ndcg@50": 0.0969})]
    found += [result(method=name) for name in ("warp", "popularity")]
    monkeypatch.setattr(paper_page, "TABLES", {("sdns", "tmall"): Table("Title", "", {}, (), rows)})
    monkeypatch.setattr(paper_page, "rows_of", lambda path: found)
    assert "| Title | 2 | 0 | `bpr`, `dns` |" in paper_page.summary()
    found[0]["metrics"]["recall@50"] = found[1]["metrics"]["recall@50"] = 0.1941
    assert "| Title | 2 | 1 | `dns` |" in paper_page.summary()


def test_the_page_has_the_phases_of_adasir_beside_those_of_the_paper(monkeypatch, tmp_path):
    path = tmp_path / "paper_phases.json"
    monkeypatch.setattr(paper_page, "PHASES", path)
    monkeypatch.setattr(paper_page, "ROOT", tmp_path)
    assert paper_page.phases() == []
    times = {"sampling": [0.5, 0.01], "training": [2.0, 0.1]}
    phases = dict.fromkeys(("adasir_u", "adasir_p", "adasir_w"), times)
    path.write_text(
        json.dumps(phases | dict.fromkeys(("processor", "beside", "commit", "command"), "-"))
    )
    (text,) = paper_page.phases()
    assert "| `adasir_w` | 0.50 ± 0.01 (0.06) | 2.00 ± 0.10 (1.38) | 0.25 (0.05) |" in text
