import shutil

import numpy as np
import pytest
import tensorflow as tf
from saved_models import write_affine
from tensorflow_serving.apis import prediction_log_pb2

from serving.runtime.loaded_version import LoadedVersion
from serving.version.versions import look_at
from serving.version.warmup_requests import WARMUP


class Counted(LoadedVersion):
    """Notes what is run."""

    def __init__(self, arrival):
        super().__init__(arrival)
        self.runs = []

    def run(self, name, inputs):
        self.runs.append((name, {key: array.tolist() for key, array in inputs.items()}))
        return super().run(name, inputs)


def load(path):
    return Counted(look_at(1, path, look_at(1, path).stamp))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_affine(tmp_path_factory.mktemp("affine") / "1", 3.0)


@pytest.fixture
def affine(template, tmp_path):
    return shutil.copytree(template, tmp_path / "1")


def record(path, *requests):
    """Writes the file; a request is (signature, inputs)."""
    (path / WARMUP).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / WARMUP)) as file:
        for signature, inputs in requests:
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.model_spec.signature_name = signature
            for name, array in inputs.items():
                proto = tf.make_tensor_proto(array)
                log.predict_log.request.inputs[name].CopyFrom(proto)
            file.write(log.SerializeToString())


def test_recorded_requests_are_replayed_first(affine):
    x = np.array([[1, 2]], np.float32)
    record(affine, ("", {"x": x}), ("total", {"x": 2 * x}))
    loaded = load(affine)
    loaded.warm_up(4)
    assert loaded.runs[:2] == [
        ("serving_default", {"x": [[1, 2]]}),
        ("total", {"x": [[2, 4]]}),
    ]


def test_every_signature_runs_with_one_row_and_with_a_full_batch(affine):
    loaded = load(affine)
    loaded.warm_up(4)
    rows = {name: [] for name in loaded.signatures}
    for name, inputs in loaded.runs:
        rows[name].append(len(inputs["x"]))
    # A total is not by rows, and how many it may have is not known.
    assert rows == {"serving_default": [1, 4], "mean": [1, 4], "positive": [1, 4], "total": []}


def test_a_published_version_is_run_on_all_its_paths(small, unshared):
    unshared()
    loaded = load(small.version)
    loaded.warm_up(16)
    sizes = {name: set() for name in loaded.signatures}
    for name, inputs in loaded.runs:
        sizes[name] |= {len(values) for values in inputs.values()}
    assert all({1, 16} <= of_signature for of_signature in sizes.values())


@pytest.mark.parametrize(
    ("signature", "inputs", "message"),
    [
        ("", {"x": np.ones((1, 3), np.float32)}, "request 1 in .* is refused: Input 'x'"),
        ("other", {"x": np.ones((1, 2), np.float32)}, "request 1 in .* 'other' is not in"),
        ("positive", {"x": -np.ones((1, 2), np.float32)}, "request 1 in .* The model refuses"),
    ],
)
def test_a_recorded_request_that_fails_stops_the_version(affine, signature, inputs, message):
    record(affine, (signature, inputs))
    with pytest.raises(ValueError, match=message):
        load(affine).warm_up(4)


def test_a_file_that_is_no_record_stops_the_version(affine):
    (affine / WARMUP).parent.mkdir(exist_ok=True)
    (affine / WARMUP).write_bytes(b"not a TFRecord")
    with pytest.raises(ValueError, match="must be a TFRecord of PredictionLog"):
        load(affine).warm_up(4)


def test_other_kinds_of_requests_are_left_out(affine):
    log = prediction_log_pb2.PredictionLog()
    log.classify_log.request.model_spec.name = "adder"
    (affine / WARMUP).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(affine / WARMUP)) as file:
        file.write(log.SerializeToString())
    loaded = load(affine)
    loaded.warm_up(4)
    assert loaded.runs
