"""What a version holds beside its graphs: the picture of the index, requests to warm up with."""

import json
import sys

import numpy as np
import pytest
import tensorflow as tf
from browser import assert_file_fits, assert_shared_look

from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle, write_bundle
from pipeline.contract.index_plot import is_best
from serving.publish.publish import publish, write_page
from serving.version.warmup_requests import WARMUP, read, write


@pytest.mark.parametrize("place", ["", "assets.extra/scann"])
def test_a_server_can_warm_up_every_signature_with_real_queries(small, place):
    import scann  # noqa: F401

    signatures = tf.saved_model.load(str(small.version / place)).signatures
    replayed = {}
    for request in read(small.version / place):
        name = request.model_spec.signature_name
        inputs = {key: tf.make_ndarray(proto) for key, proto in request.inputs.items()}
        outputs = signatures[name](**{key: tf.constant(value) for key, value in inputs.items()})
        if "known" in outputs:
            assert outputs["known"].numpy().all()
        [size] = {len(value) for value in inputs.values() if value.ndim}
        replayed.setdefault(name, []).append(size)
    assert replayed == {name: [1, 64] for name in signatures}


def test_warm_up_and_picture_are_listed_in_the_manifest(clustered, small):
    manifest = schema.read_manifest(clustered.version, "version")
    assert {str(WARMUP), f"assets.extra/scann/{WARMUP}", "ann_report.html"} <= set(manifest.files)
    assert manifest.format_version == "1.1"
    assert not (small.version / "ann_report.html").exists()  # a scan has no curve


def test_without_query_ids_only_embeddings_warm_up(tmp_path):
    """Signatures of a version with a query model, of a bundle that names no queries."""
    vectors = np.random.default_rng(0).normal(size=(70, 4)).astype(np.float32)
    bundle = read_bundle(write_bundle(tmp_path / "bundle", vectors, [str(n) for n in range(70)]))
    query_id = tf.TensorSpec([None], tf.string, name="query_id")
    embedding = tf.TensorSpec([None, 4], tf.float32, name="embedding")
    signatures = {"serving_default": [query_id], "embedding_search": [embedding]}
    write(tmp_path, signatures, bundle)
    requests = list(read(tmp_path))
    assert [request.model_spec.signature_name for request in requests] == ["embedding_search"] * 2
    sizes = [tf.make_ndarray(request.inputs["embedding"]) for request in requests]
    np.testing.assert_array_equal(sizes[0], vectors[:1])
    np.testing.assert_array_equal(sizes[1], vectors[:64])


def test_a_version_is_made_without_the_packages_for_pictures_and_warm_up(
    bundle, clustered, tmp_path, monkeypatch
):
    for module in ("matplotlib.figure", "tensorflow_serving.apis"):
        monkeypatch.setitem(sys.modules, module, None)
    version = publish(bundle, tmp_path, scann=False)
    assert not (version / WARMUP).exists()
    report = json.loads((clustered.version / "ann_report.json").read_text())
    write_page(report, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_page_of_the_index(clustered):
    report = json.loads((clustered.version / "ann_report.json").read_text())
    page = (clustered.version / "ann_report.html").read_text()
    assert_shared_look(page)
    assert f"chosen: {report['scann']['recall']:.3f} on other queries" in page
    assert page.count("leaves</text>") == len({s["num_leaves"] for s in report["scann"]["sweep"]})
    assert f"<td>{report['scann']['recall']:.4f}</td>" in page


@pytest.mark.long
def test_the_page_fits_into_a_narrow_window(clustered):
    assert_file_fits(clustered.version / "ann_report.html")


def test_the_curve_leaves_out_what_is_slower_and_worse():
    recalls = np.array([0.6, 0.6, 0.5, 0.9, 0.9, 0.8])  # by ascending time
    assert is_best(recalls).tolist() == [True, False, False, True, False, False]
