"""Runs a version before it is served, so that no request pays for what happens only once.

The first run of a function traces and allocates; ScaNN builds its searcher. A version that fails
here is not served.
"""

from __future__ import annotations

import logging

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from serving.errors import ServiceError
from serving.runtime.loaded_version import LoadedVersion
from serving.runtime.signature import Signature
from serving.version import warmup_requests
from serving.version.served_model import TOP_K

_log = logging.getLogger(__name__)


def warm_up(loaded: LoadedVersion, max_batch_size: int) -> None:
    """Runs the recorded requests of a version, and every signature with 1 and the most rows.

    Raises:
      ValueError: a request cannot be read, or is refused.
      ServiceError: the version fails.
    """
    for number, request in enumerate(warmup_requests.read(loaded.path), start=1):
        _replay(loaded, request, f"request {number} in {loaded.path / warmup_requests.WARMUP}")
    if loaded.retriever is not None:
        loaded.retriever.warm_up()
    for signature in loaded.signatures.values():
        for rows in (1, max_batch_size):
            inputs = _made_up(signature, rows)
            if inputs is None:
                continue
            try:
                loaded.run(signature.name, inputs)
            except ServiceError as error:
                if loaded.retriever is not None:
                    raise
                # Zeros may mean nothing to the model of somebody else.
                _log.info("%s: %r is not warmed up: %s", loaded.path, signature.name, error)


def _replay(loaded: LoadedVersion, request: predict_pb2.PredictRequest, name: str) -> None:
    signature = request.model_spec.signature_name or TOP_K
    try:
        inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
        loaded.run(signature, loaded.fit(signature, inputs))
    except (ServiceError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is refused: {error}") from error


def _made_up(signature: Signature, rows: int) -> dict[str, np.ndarray] | None:
    """Zeros and empty strings that fit; None where other sizes than the rows are open too."""
    inputs = {}
    for name, spec in signature.inputs.items():
        shape = spec.shape.as_list() if spec.shape.rank is not None else [None]
        if signature.by_rows:
            shape[0] = rows
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            return None
        dtype = spec.dtype.as_numpy_dtype
        inputs[name] = np.full(sizes, b"" if dtype is object else 0, dtype)
    return inputs
