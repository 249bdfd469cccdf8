import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import checksum
from towers.data.interactions import open_data
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.settings import EvaluateConfig
from towers.output.bundle import export_bundle
from towers.training.run_directory import open_run, read_json
from towers.training.train import train


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return shutil.copytree(trained[0].run, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def bundle(prepared, run):
    evaluate_run(EvaluateConfig(data=str(prepared), run=str(run), ks=(5,)))
    return export_bundle(prepared, run, run.parent / "bundle")


def test_query_model_gives_the_embeddings_of_the_model(bundle, prepared, run):
    data = open_data(prepared)
    model, _ = open_run(run, data)
    served = tf.saved_model.load(str(bundle / schema.BUNDLE_QUERY_MODEL))
    raw_ids = data.query_vocabulary.raw_ids.to_pylist()
    answer = served.signatures["serving_default"](query_id=tf.constant([*raw_ids, "nobody"]))
    assert answer["embedding"].dtype == tf.float32
    np.testing.assert_array_equal(answer["embedding"][:-1], model.query_embeddings())
    assert answer["known"].numpy().tolist() == [True] * len(raw_ids) + [False]
    assert (answer["embedding"].numpy()[-1] == 0).all()


def test_vectors_ids_and_seen_lists(bundle, prepared, run):
    data = open_data(prepared)
    model, _ = open_run(run, data)
    vectors = np.load(bundle / schema.BUNDLE_VECTORS)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, model.candidate_embeddings())
    for side, name in (
        ("candidate", schema.BUNDLE_CANDIDATE_IDS),
        ("query", schema.BUNDLE_QUERY_IDS),
    ):
        ids = pq.read_table(bundle / name)[schema.RAW_ID].combine_chunks()
        assert ids.equals(getattr(data, f"{side}_vocabulary").raw_ids)
    offsets = np.load(bundle / schema.BUNDLE_SEEN_OFFSETS)
    seen = np.load(bundle / schema.BUNDLE_SEEN_CANDIDATES)
    assert (offsets.dtype, seen.dtype) == (np.int64, np.int32)
    known = data.positives("train", "validation")
    for query in range(data.num_queries):
        np.testing.assert_array_equal(seen[offsets[query] : offsets[query + 1]], known.of(query))
    samples = np.load(bundle / schema.BUNDLE_SAMPLE_QUERIES)
    np.testing.assert_array_equal(samples, model.query_embeddings())  # fewer than 1,000: all


def test_manifest(bundle, prepared, run):
    manifest = schema.read_manifest(bundle, "bundle")
    assert manifest.counts["dim"] == 8
    assert manifest.details["configuration"]["temperature"] == 0.5
    assert manifest.details["data"]["fingerprint"] == open_data(prepared).fingerprint
    metrics = json.loads((run / "metrics.json").read_text())
    assert manifest.details["metrics"]["test"] == metrics["test"]
    text = (bundle / schema.MANIFEST).read_text()
    assert "seconds" not in text
    assert str(run) not in text
    for name, described in manifest.files.items():
        assert checksum(bundle / name) == described["checksum"]


def test_metrics_of_other_weights_are_left_out(bundle, prepared, trained, run, tmp_path, caplog):
    assert "metrics" in schema.read_manifest(bundle, "bundle").details
    longer = shutil.copytree(run, tmp_path / "run")
    train(dataclasses.replace(trained[0], run=str(longer), epochs=3))
    later = export_bundle(prepared, longer, tmp_path / "bundle")
    assert "metrics" not in schema.read_manifest(later, "bundle").details
    assert f"{longer} was trained on after its evaluation" in caplog.text
    evaluate_run(EvaluateConfig(data=str(prepared), run=str(longer), ks=(5,)))
    details = schema.read_manifest(export_bundle(prepared, longer, later), "bundle").details
    assert details["metrics"]["weights"] == read_json(longer / "training.json")["weights"]


def test_a_bundle_is_replaced_at_once(prepared, run, tmp_path):
    first = export_bundle(prepared, run, tmp_path / "bundle")
    (first / "stray").write_text("")
    export_bundle(prepared, run, tmp_path / "bundle")
    assert not (first / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_errors_leave_nothing_behind(prepared, run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no trained run"):
        export_bundle(prepared, tmp_path, tmp_path / "bundle")
    monkeypatch.setattr(
        "towers.model.two_tower.TwoTower.candidate_embeddings",
        lambda self, ids: tf.fill([len(ids), 8], np.nan),
    )
    with pytest.raises(ValueError, match="must be finite"):
        export_bundle(prepared, run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
