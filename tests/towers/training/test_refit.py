"""A run that serves: refitted on the rows of all splits, or with a later preparation."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle
from towers.data.dataframe import from_dataframe
from towers.data.interactions import open_data
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.settings import EvaluateConfig
from towers.output.bundle import export_bundle
from towers.training.earlier_run import open_to_serve
from towers.training.run_directory import open_run
from towers.training.settings import TrainConfig
from towers.training.train import train


def pairs_by_raw_id(data, *splits):
    queries, candidates = (getattr(data, f"{side}_vocabulary").raw_ids for side in schema.SIDES)
    return {
        (queries[int(q)].as_py(), candidates[int(c)].as_py())
        for split in splits
        for q, c in zip(*(data.arrays(split)[f"{s}_id"] for s in schema.SIDES), strict=True)
    }


def seen_by_raw_id(bundle):
    offsets = np.load(bundle / schema.BUNDLE_SEEN_OFFSETS)
    candidates = np.load(bundle / schema.BUNDLE_SEEN_CANDIDATES)
    queries = pq.read_table(bundle / schema.BUNDLE_QUERY_IDS)[schema.RAW_ID].to_pylist()
    ids = read_bundle(bundle).candidate_ids
    return {
        (query, ids[row])
        for query, start, end in zip(queries, offsets[:-1], offsets[1:], strict=True)
        for row in candidates[start:end]
    }


@pytest.fixture(scope="module")
def chosen(prepared, tmp_path_factory):
    """A run that stopped early: its best epoch is before its last."""
    run = tmp_path_factory.mktemp("chosen") / "run"
    config = TrainConfig(
        data=str(prepared),
        run=str(run),
        dim=4,
        batch_size=64,
        learning_rate=0.3,
        learning_rate_decay=0.5,
        epochs=30,
        patience=2,
        validation_metric="recall@5",
        jit_compile=False,
    )
    return config, train(config)


@pytest.fixture(scope="module")
def refitted(chosen, tmp_path_factory):
    run = str(tmp_path_factory.mktemp("refitted") / "run")
    config = TrainConfig(data=chosen[0].data, run=run, refit=chosen[0].run, jit_compile=False)
    return config, train(config)


def test_a_refit_takes_the_settings_and_the_epochs_and_all_rows(chosen, refitted, data):
    (old, before), (config, summary) = chosen, refitted
    assert before["best_epoch"] < before["epochs"]  # or the test could not tell them apart
    assert (summary["finished"], summary["epochs"]) == (True, before["best_epoch"])
    rows = sum(data.num_rows(split) for split in schema.SPLITS)
    assert summary["steps"] == before["best_epoch"] * -(-rows // 64)
    recorded = json.loads((Path(config.run) / "config.json").read_text())["configuration"]
    settings = dataclasses.asdict(old) | {"refit": old.run, "run": config.run, "patience": 0}
    assert recorded == json.loads(json.dumps(settings | {"epochs": before["best_epoch"]}))
    model, _ = open_run(config.run, open_data(config.data))
    counts = np.bincount(
        np.concatenate([data.arrays(split)[schema.CANDIDATE_ID] for split in schema.SPLITS]),
        minlength=data.num_candidates,
    )
    np.testing.assert_array_equal(model.method.frequency, counts)
    assert train(config) == summary  # the same command again has nothing to do


def test_what_a_refit_exports_has_seen_all_rows(chosen, refitted, data, tmp_path):
    bundle = export_bundle(refitted[0].data, refitted[0].run, tmp_path / "bundle")
    everything = pairs_by_raw_id(data, *schema.SPLITS)
    assert seen_by_raw_id(bundle) == everything
    before = export_bundle(chosen[0].data, chosen[0].run, tmp_path / "before")
    assert seen_by_raw_id(before) == pairs_by_raw_id(data, "train", "validation") < everything


def test_a_refit_has_nothing_to_be_evaluated_on(refitted, chosen):
    config = EvaluateConfig(data=refitted[0].data, run=refitted[0].run)
    with pytest.raises(ValueError, match=f"nothing is held out: evaluate {chosen[0].run}"):
        evaluate_run(config)


@pytest.mark.parametrize("name", ["init_from", "teacher"])
def test_what_knows_the_held_out_rows_teaches_nothing(chosen, refitted, tmp_path, name):
    (first, _), takes = chosen, {"method": "full_softmax", name: refitted[0].run}
    config = dataclasses.replace(first, run=str(tmp_path / "new"), epochs=1, patience=0, **takes)
    with pytest.raises(ValueError, match=f"{name} must not be a refit .*: give {first.run}"):
        train(config)
    train(dataclasses.replace(config, **{name: first.run}))


def test_other_settings_and_unfinished_runs_are_refused(chosen, tmp_path):
    config = TrainConfig(data=chosen[0].data, run=str(tmp_path / "new"), refit=chosen[0].run)
    with pytest.raises(
        ValueError, match=r"refit takes the settings and epochs of .*: leave out --dim, --epochs\."
    ):
        train(dataclasses.replace(config, dim=64, epochs=3))
    with pytest.raises(ValueError, match="holds no trained run"):
        train(dataclasses.replace(config, refit=str(tmp_path)))
    (tmp_path / "begun").mkdir()
    for name, content in (("config.json", None), ("training.json", {"finished": False})):
        text = (Path(chosen[0].run) / name).read_text() if content is None else json.dumps(content)
        (tmp_path / "begun" / name).write_text(text)
    with pytest.raises(ValueError, match="is not finished: train it to its end"):
        train(dataclasses.replace(config, refit=str(tmp_path / "begun")))
    assert not (tmp_path / "new").exists()


def later_rows(pairs):
    """Two users and an item are gone, three users and two items are new, the ranks change."""
    stay = pairs[~pairs["user_id"].isin([0, 1]) & (pairs["item_id"] != "i3")]
    new = [(user, f"i{item}") for user in (900, 901, 902) for item in (7, 8, 9, 40, 41, 42)]
    new += [(user, item) for user in range(10, 50) for item in ("tea", "milk")]
    return pd.concat([stay, pd.DataFrame(new, columns=["user_id", "item_id"])], ignore_index=True)


@pytest.fixture
def later(pairs, make_prepared):
    """(directory, data) of a later preparation."""
    rows = from_dataframe(later_rows(pairs), user="user_id", item="item_id", validation_ratio=0.2)
    return make_prepared(rows, "later"), rows


def train_one(tmp_path, prepared, tower="id", **options):
    config = TrainConfig(
        data=str(prepared),
        run=str(tmp_path / "run"),
        dim=4,
        batch_size=256,
        epochs=1,
        tower=tower,
        jit_compile=False,
        **options,
    )
    train(config)
    return config.run


@pytest.mark.parametrize(
    "tower", ["id", *(pytest.param(name, marks=pytest.mark.long) for name in ("fism", "light_gcn"))]
)
def test_an_older_run_exports_with_a_later_preparation(
    prepared, data, later, tmp_path, caplog, tower
):
    directory, rows = later
    run = train_one(tmp_path, prepared, tower)
    old, _ = open_run(run, open_data(prepared))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        bundle = read_bundle(export_bundle(directory, run, tmp_path / "bundle"))
    before = data.candidate_vocabulary.raw_ids.to_pylist()
    corpus = rows.candidate_vocabulary.raw_ids.to_pylist()
    assert bundle.candidate_ids == [name for name in corpus if name in before]
    assert set(before) - set(bundle.candidate_ids) == {"i3"}
    if tower != "light_gcn":  # whose vectors are those of the later graph
        vectors = old.candidate_embeddings().numpy()
        expected = vectors[[before.index(name) for name in bundle.candidate_ids]]
        np.testing.assert_allclose(bundle.vectors, expected, rtol=1e-6)
    known = set(data.query_vocabulary.raw_ids.to_pylist())
    assert set(bundle.query_ids(1000)) == known - {"0", "1"}
    assert seen_by_raw_id(bundle.path) == {
        (query, candidate)
        for query, candidate in pairs_by_raw_id(rows, "train", "validation")
        if query in known and candidate in before
    }
    text = " ".join(caplog.messages)
    sizes = rows.num_queries, rows.num_candidates
    assert f"{run} does not know 3 of {sizes[0]} query ids of the data, such as '90" in text
    assert f"{run} does not know 2 of {sizes[1]} candidate ids of the data, such as " in text


@pytest.mark.parametrize("of_log", [False, True])
def test_counts_follow_their_candidates(prepared, data, later, tmp_path, monkeypatch, of_log):
    """Lengths by `popularity_power` are made of the counts that the run began with."""
    run = train_one(tmp_path, prepared, normalize=True, popularity_power=0.5)
    directory, _ = later
    counts = np.maximum(data.train_counts, 1)
    if of_log:
        counts = np.arange(1.0, data.num_candidates + 1)
        monkeypatch.setattr("towers.training.earlier_run.counts_of_run", lambda run, config: counts)
    model, _, left = open_to_serve(run, open_data(directory))
    names = left.candidate_vocabulary.raw_ids.to_pylist()
    of_each = counts[[data.candidate_vocabulary.raw_ids.to_pylist().index(name) for name in names]]
    lengths = np.linalg.norm(model.candidate_embeddings(), axis=1)
    np.testing.assert_allclose(lengths, (of_each / of_each.mean()) ** 0.5, rtol=1e-5)


def test_a_refit_is_exported_with_a_later_preparation(refitted, later, tmp_path):
    directory, rows = later
    bundle = export_bundle(directory, refitted[0].run, tmp_path / "bundle")
    seen = seen_by_raw_id(bundle)
    assert seen < pairs_by_raw_id(rows, *schema.SPLITS)
    assert seen & pairs_by_raw_id(rows, "test")


@pytest.mark.long
def test_a_run_of_attributes_or_of_other_ids_is_refused(
    prepared, attributed, make_prepared, tmp_path
):
    run = train_one(tmp_path, attributed, "features", query_inputs=("id",))
    with pytest.raises(
        ValueError, match=r"trained on other data .* not on ids alone.*twotower items"
    ):
        export_bundle(prepared, run, tmp_path / "bundle")
    others = pd.DataFrame([(f"u{n % 5}", f"x{n}") for n in range(20)], columns=["user", "item"])
    others = make_prepared(from_dataframe(others, user="user", item="item"))
    run = train_one(tmp_path / "ids", prepared)
    with pytest.raises(ValueError, match="none of the 5 ids of the query side of the data is in"):
        export_bundle(others, run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
