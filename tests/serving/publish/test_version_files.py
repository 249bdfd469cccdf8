"""What a version holds beside its graphs: the picture of the index, requests to warm up with."""

import json
import sys

import numpy as np
import pytest
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle, write_bundle
from serving.publish.measuring import best_of, draw
from serving.publish.publish import publish
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
    assert {str(WARMUP), f"assets.extra/scann/{WARMUP}", "ann_report.png"} <= set(manifest.files)
    assert manifest.format_version == "1.1"
    assert not (small.version / "ann_report.png").exists()  # a scan has no curve


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
    draw(report, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_the_picture_is_a_picture(clustered):
    from matplotlib import image

    pixels = image.imread(clustered.version / "ann_report.png")
    assert pixels.shape == (495, 770, 4)
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50  # curves, points and letters


def test_the_curve_leaves_out_what_is_slower_and_worse():
    points = [(0.5, 3.0), (0.6, 1.0), (0.6, 2.0), (0.9, 5.0), (0.8, 6.0), (0.9, 4.0)]
    settings = [{"recall": recall, "batch_ms": time} for recall, time in points]
    assert best_of(settings) == [settings[1], settings[5]]
