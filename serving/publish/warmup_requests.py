"""Requests that a server replays before a version takes traffic, as TensorFlow Serving does.

TensorFlow Serving reads `assets.extra/tf_serving_warmup_requests` of a SavedModel: a TFRecord file
of `PredictionLog`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from pipeline.contract.bundle import Bundle
from serving.version import served_model

WARMUP = Path("assets.extra") / "tf_serving_warmup_requests"
_BATCHES = (1, 64)  # queries of a request
_log = logging.getLogger(__name__)

Inputs = dict[str, np.ndarray]


def write(path: Path, signatures: Mapping[str, Sequence[str]], bundle: Bundle) -> None:
    """Adds the file to a SavedModel, with real queries for each of its signatures.

    Nothing is written where the package tensorflow-serving-api is not installed. Signatures that
    take query ids are left out where the bundle names none.

    Args:
      path: of the SavedModel.
      signatures: of it, each with the names of its inputs.
      bundle: that it was made of.
    """
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError:
        _log.info("tensorflow-serving-api cannot be imported: there is no %s.", WARMUP)
        return
    (path / WARMUP).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / WARMUP)) as file:
        for signature, inputs in _requests(signatures, bundle):
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.signature_name = signature
            for name, values in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
            file.write(log.SerializeToString(deterministic=True))


def _requests(
    signatures: Mapping[str, Sequence[str]], bundle: Bundle
) -> Iterator[tuple[str, Inputs]]:
    """Signatures and inputs, small batches and large ones."""
    examples = _examples(bundle)
    for signature, names in signatures.items():
        inputs = [examples[name] for name in names]
        for size in _BATCHES if all(values.size for values in inputs) else ():
            shapes = [(size, *values.shape[1:]) if values.ndim else () for values in inputs]
            yield signature, dict(zip(names, map(np.resize, inputs, shapes), strict=True))


def _examples(bundle: Bundle) -> Inputs:
    """Values by the name of an input: rows of queries, or a number. Empty where none are known."""
    most = _BATCHES[-1]
    samples = bundle.sample_queries
    rows = bundle.vectors if samples is None or not len(samples) else samples
    return {
        served_model.QUERY_ID: np.array([one.encode() for one in bundle.query_ids(most)], object),
        served_model.EMBEDDING: np.asarray(rows[:most]),
        served_model.LEAVES_TO_SEARCH: np.array(0, np.int32),
        served_model.NUM_RESULTS: np.array(min(most, len(bundle.vectors)), np.int32),
    }
