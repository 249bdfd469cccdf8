"""Requests that a server replays before a version takes traffic, as TensorFlow Serving does.

TensorFlow Serving reads `assets.extra/tf_serving_warmup_requests` of a SavedModel: a TFRecord file
of `PredictionLog`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from pipeline.contract.bundle import Bundle
from serving.version import served_model
from serving.version.versions import EXTRAS

WARMUP = EXTRAS / "tf_serving_warmup_requests"

_BATCHES = (1, 64)  # queries of a request
_MAX_REQUESTS = 1000  # that are replayed, as in TensorFlow Serving
_log = logging.getLogger(__name__)


def write(model: Path, signatures: Mapping[str, Sequence[tf.TensorSpec]], bundle: Bundle) -> None:
    """Adds the file to a SavedModel, with real queries for each of its signatures.

    Nothing is written where the package tensorflow-serving-api is not installed. Signatures that
    take query ids are left out where the bundle names none.
    """
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError:
        _log.info("tensorflow-serving-api cannot be imported: there is no %s.", WARMUP)
        return
    (model / WARMUP).parent.mkdir(exist_ok=True)
    examples = _examples(bundle)
    with tf.io.TFRecordWriter(str(model / WARMUP)) as file:
        for signature, specs in signatures.items():
            # An attribute that a request leaves out is an empty string, or NaN.
            inputs = [
                examples[spec.name] if spec.name in examples else _missing(spec) for spec in specs
            ]
            for size in _BATCHES if all(values.size for values in inputs) else ():
                log = prediction_log_pb2.PredictionLog()
                request = log.predict_log.request
                request.model_spec.signature_name = signature
                for spec, values in zip(specs, inputs, strict=True):
                    shape = (size, *values.shape[1:]) if values.ndim else ()
                    proto = tf.make_tensor_proto(np.resize(values, shape))
                    request.inputs[spec.name].CopyFrom(proto)
                file.write(log.SerializeToString(deterministic=True))


def read(model: Path) -> Iterator[Any]:
    """The `Predict` requests recorded with a SavedModel, no others; ValueError: it is broken."""
    from tensorflow_serving.apis import prediction_log_pb2

    path = model / WARMUP
    if not path.is_file():
        return
    try:
        for record in tf.data.TFRecordDataset(str(path)).take(_MAX_REQUESTS).as_numpy_iterator():
            log = prediction_log_pb2.PredictionLog.FromString(record)
            if log.WhichOneof("log_type") == "predict_log":
                yield log.predict_log.request
            else:
                _log.warning("%s: only predict_log is replayed.", path)
    except (tf.errors.OpError, DecodeError) as error:
        raise ValueError(f"{path} must be a TFRecord of PredictionLog: {error}.") from error


def _missing(spec: tf.TensorSpec) -> np.ndarray:
    """One row of an input that a request leaves out: float64 [1], string [1] or [1, 1]."""
    value = np.nan if spec.dtype.is_floating else b""
    return np.full([1] * spec.shape.rank, value, spec.dtype.as_numpy_dtype)


def _examples(bundle: Bundle) -> dict[str, np.ndarray]:
    """Values by the name of an input: rows of queries, or a number. Empty where none are known."""
    most, samples = _BATCHES[-1], bundle.sample_queries
    rows = bundle.vectors if samples is None or not len(samples) else samples
    return {
        served_model.QUERY_ID: np.array([name.encode() for name in bundle.query_ids(most)], object),
        served_model.EMBEDDING: np.asarray(rows[:most]),
        served_model.LEAVES_TO_SEARCH: np.array(0, np.int32),
        served_model.NUM_RESULTS: np.array(min(most, len(bundle.vectors)), np.int32),
    }
