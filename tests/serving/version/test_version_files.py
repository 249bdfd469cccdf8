"""What a version holds beside its graphs: the picture of the index, requests to warm up with."""

import json
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from pipeline.contract import schema
from serving.publish.publish import publish
from serving.publish.recall_plot import _best_of

WARMUP = "assets.extra/tf_serving_warmup_requests"


def warmup_requests(model):
    """Signature and inputs of every request, as TensorFlow Serving reads them."""
    for record in tf.data.TFRecordDataset(str(model / WARMUP)):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        yield request.model_spec.signature_name, inputs


@pytest.mark.parametrize("place", ["", "assets.extra/scann"])
def test_a_server_can_warm_up_every_signature_with_real_queries(small, place):
    import scann  # noqa: F401

    signatures = tf.saved_model.load(str(small.version / place)).signatures
    replayed = {}
    for name, inputs in warmup_requests(small.version / place):
        outputs = signatures[name](**{one: tf.constant(value) for one, value in inputs.items()})
        if "known" in outputs:
            assert outputs["known"].numpy().all()
        [size] = {len(value) for value in inputs.values() if value.ndim}
        replayed.setdefault(name, []).append(size)
    assert replayed == {name: [1, 64] for name in signatures}


def test_warm_up_and_picture_are_listed_in_the_manifest(clustered, small):
    manifest = schema.read_manifest(clustered.version, "version")
    assert {WARMUP, f"assets.extra/scann/{WARMUP}", "ann_report.png"} <= set(manifest.files)
    assert manifest.format_version == "1.1"
    assert not (small.version / "ann_report.png").exists()  # a scan has no curve


def test_without_query_ids_only_embeddings_warm_up(tmp_path, write_bundle, small):
    sample = type(small.sample)(small.sample.vectors, small.sample.queries)  # no seen lists
    version = publish(write_bundle(tmp_path / "a", sample), tmp_path / "models", scann=False)
    assert {name for name, _ in warmup_requests(version)} == {"embedding_search"}
    bundle = write_bundle(tmp_path / "b", sample, query_model=False)
    version = publish(bundle, tmp_path / "models", scann=False)
    by_name = dict(warmup_requests(version))
    assert set(by_name) == {"serving_default", "query_embedding", "embedding_search"}
    assert not (version / "ann_report.png").exists()
    np.testing.assert_array_equal(by_name["serving_default"]["embedding"], sample.vectors[:64])


def test_a_version_is_made_without_the_packages_for_pictures_and_warm_up(
    clustered, tmp_path, monkeypatch
):
    for module in ("matplotlib.figure", "tensorflow_serving.apis"):
        monkeypatch.setitem(sys.modules, module, None)
    version = publish(clustered.bundle, tmp_path, k=20, scann_leaves=16)
    assert json.loads((version / "ann_report.json").read_text())["scann"]["num_leaves"] == 16
    assert not (version / "ann_report.png").exists()
    assert not (version / WARMUP).exists()


def test_the_picture_is_a_picture(clustered):
    from matplotlib import image

    pixels = image.imread(clustered.version / "ann_report.png")
    assert pixels.shape == (495, 770, 4)
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50  # curves, points and letters


def test_the_curve_leaves_out_what_is_slower_and_worse():
    points = [(0.5, 3.0), (0.6, 1.0), (0.6, 2.0), (0.9, 5.0), (0.8, 6.0), (0.9, 4.0)]
    settings = [{"recall": recall, "batch_ms": time} for recall, time in points]
    assert _best_of(settings) == [settings[1], settings[5]]
