import json

import numpy as np
import pytest
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle
from serving.publish import tuning
from serving.publish.measuring import Judge
from serving.publish.publish import publish
from serving.publish.settings import VersionOptions
from serving.publish.tuning import Sweep
from serving.version.index import ExactIndex, ScannIndex


@pytest.fixture(scope="module")
def report(clustered):
    return json.loads((clustered.version / "ann_report.json").read_text())


def halves(sample, seed=10):
    """Places of the queries that choose, and of those that judge."""
    order = np.random.default_rng(seed).permutation(len(sample.queries))[:1000]
    return order[::2], order[1::2]


def recall(sample, places, k, find):
    """Brute force: the share of the exact top k that `find` finds."""
    found = find(sample.queries[places])
    hits = [
        len(set(rows[:k]) & set(sample.best(query)[:k]))
        for query, rows in zip(places, found, strict=True)
    ]
    return np.mean(hits) / k


def searching(version):
    """The default search of the ScaNN model of a version."""
    import scann  # noqa: F401

    model = tf.saved_model.load(str(version / "assets.extra/scann"))
    search = model.signatures["embedding_search"]

    def find(queries):
        found = search(embedding=tf.constant(queries), leaves_to_search=tf.constant(0))
        return found["candidate_row"].numpy().tolist()

    return find


def test_the_reported_recall_is_that_of_queries_that_did_not_choose(clustered, report):
    choosing, judging = halves(clustered.sample)
    assert (report["queries"]["choosing"], report["queries"]["judging"]) == (100, 100)
    find = searching(clustered.version)
    for places, name in ((judging, "recall"), (choosing, "recall_when_chosen")):
        found = recall(clustered.sample, places, 20, find)
        assert found >= 0.95
        assert report["scann"][name] == pytest.approx(found, abs=2e-3)


def test_the_report_says_what_was_chosen_and_the_manifest_too(report, clustered):
    scann_report = report["scann"]
    chosen = {name: scann_report[name] for name in ("leaves_to_search", "num_reordered")}
    assert any(chosen.items() <= setting.items() for setting in scann_report["sweep"])
    details = schema.read_manifest(clustered.version, "version").details
    assert chosen.items() <= details.items()
    assert (details["at"], details["k"]) == (20, 20)
    assert details["default_index"] == report["default_index"] == report["faster"]
    faster = 1.5 * scann_report["batch_ms"] <= report["exact"]["batch_ms"]
    assert report["faster"] == ("scann" if faster else "exact")


def tune(published, **options):
    """The report and the index, without writing a version."""
    bundle, options = read_bundle(published.bundle), VersionOptions(k=20, **options)
    return tuning.tune(bundle, options, with_scann=True)


@pytest.fixture
def by_work(monkeypatch):
    """A search takes as long as it has work, so that nothing depends on the machine."""
    measure, latency = Judge.measure, Judge.latency

    def work(search, parameters):
        if not parameters:
            return 1e6
        return 10 * parameters[0] + parameters[1]

    def measured(self, search, *parameters, timings=9):
        found = measure(self, search, *parameters, timings=1)
        return found._replace(batch_ms=work(search, parameters))

    def latencies(self, search, *parameters):
        return {name: work(search, parameters) for name in latency(self, search, *parameters)}

    monkeypatch.setattr(Judge, "measure", measured)
    monkeypatch.setattr(Judge, "latency", latencies)


@pytest.mark.long
def test_a_sweep_measures_what_more_work_finds(clustered, by_work):
    sample = clustered.sample
    index = ScannIndex(sample.vectors, 20, 63)
    judge = Judge(sample.queries, ExactIndex(sample.vectors, 20).search, at=20)
    settings = {
        setting.parameters: setting for setting in Sweep(index, judge, promise=1.0).settings
    }
    for leaves, num_reordered in ((1, 25), (4, 50), (4, 200)):
        search = tf.function(index.search)
        found = search(tf.constant(sample.queries), leaves, num_reordered)[0].numpy().tolist()
        expected = recall(sample, np.arange(200), 20, lambda _, found=found: found)
        of_sweep = settings[leaves, num_reordered].measured.recall
        assert of_sweep == pytest.approx(expected, abs=2e-3)
    recalls = {parameters: setting.measured.recall for parameters, setting in settings.items()}
    assert recalls[1, 200] < recalls[4, 200]
    assert recalls[4, 25] < recalls[4, 200]
    assert len(settings) > 30


def test_the_fastest_setting_that_keeps_the_promise_is_chosen(clustered, by_work):
    report, _ = tune(clustered, target_recall=0.9, scann_leaves=40)
    chosen, settings = report["scann"], report["scann"]["sweep"]
    assert chosen["num_leaves"] == 40
    assert chosen["recall"] >= 0.9
    assert chosen["recall_when_chosen"] > 0.9
    cheaper = [setting for setting in settings if setting["batch_ms"] < chosen["batch_ms"]]
    assert len(cheaper) > 5
    assert all(setting["recall"] < 0.95 for setting in cheaper)  # far enough above is always taken
    assert report["default_index"] == "scann"


@pytest.mark.long
@pytest.mark.parametrize(
    ("gain", "built", "chosen"), [(0.0, [63, 126], 63), (1e9, [63, 126, 252], 252)]
)
def test_a_larger_tree_is_kept_only_where_it_is_faster(
    gain, built, chosen, clustered, by_work, monkeypatch
):
    released = []
    release = ScannIndex.release
    monkeypatch.setattr(
        ScannIndex, "release", lambda self: (released.append(self.num_leaves), release(self))
    )
    monkeypatch.setattr(tuning, "_FASTER", gain)  # none is so much faster; any is so much
    report, _ = tune(clustered)
    assert sorted(map(int, report["scann"]["build_seconds"])) == built
    assert {setting["num_leaves"] for setting in report["scann"]["sweep"]} == {*built}
    assert report["scann"]["num_leaves"] == chosen
    assert sorted(released) == sorted({*built} - {chosen})


def test_recall_is_promised_at_a_rank(clustered):
    report, index = tune(clustered, at=2, scann_leaves=63)
    assert report["at"] == 2
    _, judging = halves(clustered.sample)

    def find(queries):
        return index.search(tf.constant(queries))[0].numpy().tolist()

    of_judging = recall(clustered.sample, judging, 2, find)
    assert report["scann"]["recall"] == pytest.approx(of_judging, abs=1e-4)
    assert of_judging >= 0.95


def test_a_promise_that_cannot_be_kept_is_refused_and_leaves_nothing(
    clustered, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "_REORDERED", (1.0,))
    monkeypatch.setattr(tuning, "_MOST_REORDERED", (1.0,))
    message = (
        r"target_recall 0.99 at 20 cannot be kept: ScaNN finds 0\.[5-9]\d+ of the exact results .* "
        "Lower target_recall, or publish exact search alone: scann false"
    )
    with pytest.raises(ValueError, match=message) as error:
        publish(clustered.bundle, tmp_path, k=20, target_recall=0.99, scann_leaves=63)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "twotower").iterdir()] == []


@pytest.mark.long
def test_where_no_setting_of_the_sweep_is_enough_all_leaves_are_searched(clustered, monkeypatch):
    monkeypatch.setattr(tuning, "_REORDERED", (1.0,))
    chosen = tune(clustered, target_recall=0.99, scann_leaves=63)[0]["scann"]
    assert (chosen["leaves_to_search"], chosen["num_reordered"]) in ((63, 200), (63, 1600))
    assert chosen["recall"] >= 0.99
    assert chosen["sweep"][-1]["leaves_to_search"] == 63


def test_where_exact_search_is_faster_it_is_the_default_and_no_error(
    clustered, by_work, monkeypatch
):
    measured = Judge.latency

    def slow_with_parameters(self, search, *parameters):
        times = measured(self, search, *parameters)
        return times if parameters else dict.fromkeys(times, 1e-3)

    monkeypatch.setattr(Judge, "latency", slow_with_parameters)
    report, index = tune(clustered, scann_leaves=63)
    assert report["default_index"] == report["faster"] == "exact"
    assert report["scann"]["recall"] >= 0.95
    assert index.num_leaves == 63


@pytest.mark.parametrize(
    ("num_candidates", "wanted", "trees"),
    [
        (1999, 0, [0]),
        (1999, 7, [7]),
        (2000, 0, [45, 90, 180]),
        (1_000_000, 0, [1000, 2000, 4000]),
        (1_000_000, 3000, [3000]),
    ],
)
def test_which_trees_are_tried(num_candidates, wanted, trees):
    assert tuning._trees(num_candidates, wanted) == trees
