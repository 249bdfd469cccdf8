"""`twotower compare`: its tests against enumeration and tables; runs that cannot be compared."""

import dataclasses
import html
import html.parser
import itertools
import json
import shutil

import numpy as np
import pytest
from browser import assert_file_fits, assert_shared_look

import twotower
from towers.data.interactions import open_data
from towers.evaluation.compare import compare, compare_paired, holm, permutation_test
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.hits_by_query import read_hits
from towers.evaluation.settings import CompareConfig, EvaluateConfig
from towers.metrics.definitions import half_width, mean_metrics
from towers.metrics.held_out import HeldOut
from towers.training.train import train

HOSTILE = "<b>second$x$"


@pytest.fixture(scope="module")
def runs(prepared, trained, tmp_path_factory):
    """Two trained runs, and a copy of the first in which users have the hits of others."""
    root = tmp_path_factory.mktemp("runs")
    config, _ = trained
    first, second = shutil.copytree(config.run, root / "first"), root / HOSTILE
    train(dataclasses.replace(config, run=str(second), epochs=1, learning_rate=1e-6))
    for run in (first, second):
        evaluate_run(EvaluateConfig(data=str(prepared), run=str(run), ks=(5, 10)))
    third = shutil.copytree(first, root / "third")
    hits = read_hits(third)
    order = np.random.default_rng(0).permutation(len(hits.hits))
    dataclasses.replace(hits, hits=hits.hits[order]).write(third)
    return [first, second, third]


def slow_p(differences):
    """Every assignment of signs to 8 users, in exact arithmetic on integers."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * one for sign, one in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(one >= observed for one in sums) / len(sums)


@pytest.mark.parametrize("seed", range(4))
def test_the_randomisation_test_is_exact_on_few_users(seed):
    whole = np.random.default_rng(seed).integers(-4, 9, (8, 3))
    expected = [slow_p(column.tolist()) for column in whole.T]
    got = permutation_test(whole / 10, resamples=256, seed=0)  # tenths: sums are not exact
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    drawn = permutation_test(whole / 10, resamples=255, seed=seed)  # too few to go through all
    np.testing.assert_allclose(drawn, expected, atol=0.12)
    many = permutation_test(np.tile(whole / 10, (2, 1)), resamples=20_000, seed=seed)
    np.testing.assert_allclose(
        many, permutation_test(np.tile(whole / 10, (2, 1)), resamples=2**16, seed=0), atol=0.015
    )


def test_a_drawn_p_is_never_0_and_repeats_with_its_seed():
    differences = np.random.default_rng(0).normal(3.0, 1.0, (200, 1))
    assert permutation_test(differences, resamples=99, seed=1) == pytest.approx(1 / 100)
    noise = np.random.default_rng(1).normal(size=(200, 2))
    first, again, other = (permutation_test(noise, resamples=500, seed=s) for s in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()


def test_both_tests_agree_on_many_users():
    differences = np.random.default_rng(3).normal(0.08, 1.0, (300, 4))
    paired = compare_paired(differences, resamples=5_000, seed=0)
    np.testing.assert_allclose(paired.p_t_test, paired.p_permutation, atol=0.025)


@pytest.mark.parametrize(
    ("t", "count", "p"), [(2.262, 10, 0.05), (3.250, 10, 0.01), (1.833, 10, 0.1), (12.706, 2, 0.05)]
)
def test_student_as_in_printed_tables(t, count, p):
    values = np.arange(count) - (count - 1) / 2  # mean 0
    shifted = values + t * values.std(ddof=1) / np.sqrt(count)
    paired = compare_paired(np.stack([shifted, -shifted], axis=1), resamples=10, seed=0)
    np.testing.assert_allclose(paired.p_t_test, p, rtol=2e-3)


@pytest.mark.parametrize("count", [1, 4])
def test_where_nothing_differs_p_is_1(count):
    differences = np.zeros((count, 2))
    differences[0, 1] = 0.5  # a single query that differs
    paired = compare_paired(differences, resamples=100, seed=0)
    assert paired.p_permutation.tolist() == [1, 1]
    assert paired.p_t_test[0] == 1
    assert paired.half_width[0] == 0


@pytest.mark.parametrize(
    ("count", "quantile"),
    [(2, 12.7062), (3, 4.30265), (10, 2.26216), (30, 2.04523), (30_000, 1.96)],
)
def test_intervals_are_those_of_student(count, quantile):
    values = np.random.default_rng(1).normal(size=(count, 2))
    expected = quantile * values.std(axis=0, ddof=1) / np.sqrt(count)
    paired = compare_paired(values, resamples=10, seed=0)
    np.testing.assert_allclose(paired.half_width, expected, rtol=1e-4)
    hits, positives = values[:, :1] > 0, np.ones(count, int)
    spread = quantile * hits.std(ddof=1) / np.sqrt(count)
    assert mean_metrics(hits, positives, (1,))[1]["recall@1"] == pytest.approx(spread, rel=1e-4)


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])


def test_what_an_evaluation_keeps_gives_its_metrics(runs, prepared):
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    data, hits = open_data(prepared), read_hits(runs[0])
    held_out = HeldOut(data, "test")
    expected = data.query_vocabulary.fingerprints[held_out.query_ids]
    np.testing.assert_array_equal(hits.fingerprints, expected)
    np.testing.assert_array_equal(hits.num_positives, held_out.num_positives)
    for name, value in metrics["test"].items():
        metric, k = name.split("@")
        assert hits.values(metric, int(k)).mean() == pytest.approx(value, rel=1e-12)


def test_a_run_compared_with_itself(runs, tmp_path):
    same = shutil.copytree(runs[0], tmp_path / "same")
    result = compare(CompareConfig(runs=(str(runs[0]), str(same))))
    assert list(result["metrics"]) == ["ndcg@10", "recall@10"]
    for first, second in result["metrics"].values():
        assert second["mean"] == first["mean"]
        assert (second["difference"], second["half_width"]) == (0, 0)
        assert second["p_t_test"] == second["p_permutation"] == second["p_holm"] == 1
        assert (second["better"], second["worse"], second["equal"]) == (0, 0, result["users"])


def test_three_runs(runs, capsys, tmp_path):
    arguments = ["compare", *map(str, runs), "--metric", "recall@5", "ndcg@10"]
    output = tmp_path / "new" / "c.json"
    assert twotower.main([*arguments, "--output", str(output)]) == 0
    result, text = json.loads(output.read_text()), capsys.readouterr().out
    hits = [read_hits(run) for run in runs]
    recalls = [one.hits[:, :5].sum(axis=1) / one.num_positives for one in hits]
    first, second, third = result["metrics"]["recall@5"]
    differences = recalls[1] - recalls[0]
    assert first == {"run": "first", "mean": pytest.approx(recalls[0].mean())}
    assert second["run"] == HOSTILE
    assert second["difference"] == pytest.approx(differences.mean())
    assert second["half_width"] == pytest.approx(half_width(differences))
    counts = [(differences > 0).sum(), (differences < 0).sum(), (differences == 0).sum()]
    assert [second[name] for name in ("better", "worse", "equal")] == counts
    p = permutation_test(differences[:, None], resamples=20_000, seed=1)[0]
    assert second["p_permutation"] == pytest.approx(p, abs=0.02)
    assert third["mean"] == pytest.approx(recalls[2].mean())
    smaller, larger = sorted([second["p_permutation"], third["p_permutation"]])
    assert {second["p_holm"], third["p_holm"]} == {
        min(1, 2 * smaller),
        max(min(1, 2 * smaller), larger),
    }
    for name, (first, *others) in result["metrics"].items():
        metric, k = name.split("@")
        values = [run.values(metric, int(k)) for run in hits]
        for number, one in enumerate(others, 1):
            assert one["mean"] - first["mean"] == pytest.approx(one["difference"], abs=1e-12)
            assert one["better"] == (values[number] > values[0]).sum()
    for one in (second, third):
        assert f"{one['difference']:+.4f} ± {one['half_width']:.4f}" in text


class Cells(html.parser.HTMLParser):
    """The tags of a page, and the text of its cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_the_page(runs, tmp_path):
    result = compare(CompareConfig(runs=tuple(map(str, runs)), output=str(tmp_path / "c.html")))
    text = (tmp_path / "c.html").read_text()
    assert_shared_look(text)
    found = Cells(text)
    assert not found.tags & {"b", "script"}
    assert "svg" in found.tags
    cells = [cell.strip() for cell in found.cells]
    assert HOSTILE in cells
    one = result["metrics"]["ndcg@10"][1]
    assert f"{one['difference']:+.4f} ±\N{NO-BREAK SPACE}{one['half_width']:.4f}" in cells
    place = cells.index("learning_rate")
    assert cells[place + 1 : place + 4] == ["0.01", "1e-06", "0.01"]
    assert "dim" not in cells  # the same in all runs
    assert html.escape(HOSTILE) in text.split("<svg")[1]  # its dollars are no formula
    assert [path.name for path in tmp_path.iterdir()] == ["c.html"]


@pytest.mark.long
def test_the_page_fits_into_a_narrow_window(runs, tmp_path):
    compare(CompareConfig(runs=tuple(map(str, runs)), output=str(tmp_path / "c.html")))
    assert_file_fits(tmp_path / "c.html")


def test_runs_that_cannot_be_compared(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    hits = read_hits(other)

    def check(message):
        with pytest.raises(ValueError, match=message):
            compare(CompareConfig(runs=(str(runs[0]), str(other)), output=str(tmp_path / "c.html")))
        assert not (tmp_path / "c.html").exists()

    for differing, message in (
        ({"data_fingerprint": "ff"}, "first and .*other are of different prepared data"),
        ({"split": "validation"}, "the test and the validation split: evaluate both"),
        ({"fingerprints": hits.fingerprints[::-1]}, "hold other users"),
        ({"num_positives": hits.num_positives + 1}, "hold other users"),
    ):
        dataclasses.replace(hits, **differing).write(other)
        check(message)
    (other / "hits_by_query.parquet").write_bytes(b"PAR1")
    check("cannot be read")
    (other / "hits_by_query.parquet").unlink()
    check("has no hits_by_query.parquet: make it with `twotower evaluate`")
    shutil.copy(runs[1] / "hits_by_query.parquet", other)
    check("was trained on after its evaluation")
    (other / "training.json").unlink()
    check("is no run: there is no training.json")


def test_wrong_settings(runs, capsys):
    names = [str(run) for run in runs]
    for arguments, message in (
        (names[:1], "runs must be two or more"),
        ([*names, "--metric", "recall"], "metric must be one of"),
        ([*names, "--metric", "recall@20"], "was ranked down to 10 only: evaluate it with --ks 20"),
        ([*names, "--output", "x.txt"], "output must end in .html or .json"),
        ([*names, "--resamples", "10"], "resamples must be at least 100"),
    ):
        assert twotower.main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
