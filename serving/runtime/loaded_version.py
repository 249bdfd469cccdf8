"""A model version in memory: its signatures, and the retriever of one that we published."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from serving.errors import FailedPrecondition, InvalidRequest, OutOfMemory, ServiceError, check_ids
from serving.retrieval.encoded_ids import EncodedIds
from serving.retrieval.requests import MAX_NUMBER
from serving.retrieval.retriever import Retriever
from serving.retrieval.search import destroy_tables
from serving.runtime.signature import Signature
from serving.version import warmup_requests
from serving.version.served_model import (
    CANDIDATE_ID,
    EMBEDDING_SEARCH,
    REQUEST_EMBEDDING,
    RETRIEVE,
    TOP_K,
)
from serving.version.versions import SAVED_MODEL, Version, VersionFiles

_MAX_ERROR = 500  # characters of TensorFlow's message that a client sees
DESCRIBED = (REQUEST_EMBEDDING, RETRIEVE)  # signatures whose inputs describe queries
_log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


class LoadedVersion:
    """Runs the signatures of a version; may be shared by threads.

    `serving_default` of a version that we published searches with its default index, the other
    signatures are those of the exact model, which stock TensorFlow Serving loads as well.

    Attributes:
      retriever: None for the SavedModel of another framework.
      not_by_rows: signatures whose outputs turned out not to have a row for each input row.
    """

    def __init__(self, files: VersionFiles, index: str = "default") -> None:
        """Loads a version; ValueError, OSError or tf.errors.OpError: it cannot be loaded."""
        self.number, self.path = files.number, files.path
        self.retriever: Retriever | None = None
        self._foreign: Any = None  # the SavedModel of another framework
        self._functions: dict[str, Any] = {}
        self.not_by_rows: set[str] = set()
        try:
            self.signatures = self._load(files, index)
        except BaseException:
            self.close()  # what was loaded until then
            raise

    def _load(self, files: VersionFiles, index: str) -> dict[str, Signature]:
        """Loads the models and their functions; returns the signatures that can be served."""
        if files.manifest is None:
            self._foreign = tf.saved_model.load(str(self.path))
            self._functions = dict(self._foreign.signatures)
        else:
            self.retriever = Retriever(Version(self.number, self.path, files.manifest), index)
            exact, default = self.retriever.index("exact"), self.retriever.index()
            self._functions = dict(exact.model.signatures)
            searches, run = {TOP_K, RETRIEVE} & set(default.model.signatures), self.retriever.run
            self._functions |= {name: partial(run, name) for name in searches}
            self._functions[EMBEDDING_SEARCH] = exact.signature
        protos = _dense_signatures(self.path / SAVED_MODEL)
        served = [name for name in self._functions if name in protos]
        signatures = {name: Signature.of(name, protos[name]) for name in served}
        if not signatures:
            raise ValueError(f"{self.path} has no signature to serve: save it with one.")
        return signatures

    def signature(self, name: str) -> Signature:
        """The signature of that name; FailedPrecondition if the version has none."""
        if name not in self.signatures:
            there = ", ".join(sorted(self.signatures))
            raise FailedPrecondition(
                f"Signature {name[:80]!r} is not in version {self.number}; there are: {there}."
            )
        return self.signatures[name]

    def fit(self, name: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Checks the inputs of a signature; see `Signature.fit`."""
        arrays = self.signature(name).fit(inputs)
        if self.retriever is not None:  # ScaNN fails for a whole batch on a NaN
            for key, array in arrays.items():
                # Of what describes a query, NaN says that it is missing.
                values = np.nan_to_num(array) if name in DESCRIBED else array
                if array.dtype.kind == "f" and not (np.abs(values) <= MAX_NUMBER).all():
                    raise InvalidRequest(
                        f"Input {key!r} must hold finite numbers of at most {MAX_NUMBER:g}, "
                        "got a larger one or NaN."
                    )
                if array.dtype.kind == "O":
                    check_ids(array.ravel().tolist())
        return arrays

    def run(self, name: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Runs a signature on inputs that fit it; ServiceError: it fails.

        Strings are bytes, in an output of `ids` the rows of candidates stand for them.
        """
        signature = self.signatures[name]
        tensors = {
            key: tf.constant(inputs[key], spec.dtype) for key, spec in signature.inputs.items()
        }
        try:
            outputs = self._functions[name](**tensors)
            return {key: _as_array(outputs[key]) for key in signature.outputs}
        except tf.errors.OpError as error:
            raise _refusal(error) from error

    def ids(self, name: str) -> Mapping[str, EncodedIds]:
        """The outputs of a signature that hold rows of candidates, and the ids of these."""
        if self.retriever is None or name not in (TOP_K, RETRIEVE):
            return {}
        return {CANDIDATE_ID: self.retriever.corpus.encoded_ids}

    def run_all(self, name: str, requests: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """Runs a signature that goes by rows for several requests at once.

        Where an output turns out not to have a row for each input row, it is from then on run
        for each request alone.
        """
        if len(requests) > 1 and name not in self.not_by_rows:
            rows = [self.signatures[name].rows(inputs) for inputs in requests]
            joined = self.run(name, join(requests))
            if self.have_rows(name, [joined], [sum(rows)]):
                return split(joined, rows)
        return [self.run(name, inputs) for inputs in requests]

    def have_rows(self, name: str, outputs: Sequence[Arrays], rows: Sequence[int]) -> bool:
        """Whether outputs have as many rows as their inputs; if not, that is remembered."""
        pairs = zip(outputs, rows, strict=True)
        if all(array.shape[:1] == (count,) for part, count in pairs for array in part.values()):
            return True
        _log.warning("%s: %r has outputs not by rows, it is not batched.", self.path, name)
        self.not_by_rows.add(name)
        return False

    def warm_up(self, max_batch_size: int) -> None:
        """Runs the recorded requests, and every signature with 1 and the most rows.

        The first run of a function traces and allocates, ScaNN builds its searcher: no client
        pays for that. A version that fails here is not served.

        Raises:
          ValueError: a request cannot be read, or is refused.
          ServiceError: the version fails.
        """
        if self.retriever is not None and self.retriever.joins:
            self.retriever.corpus.load()  # the rest is warm
            return
        for number, request in enumerate(warmup_requests.read(self.path), start=1):
            name = request.model_spec.signature_name or TOP_K
            try:
                inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
                self.run(name, self.fit(name, inputs))
            except (ServiceError, TypeError, ValueError) as error:
                place = self.path / warmup_requests.WARMUP
                raise ValueError(f"request {number} in {place} is refused: {error}") from error
        if self.retriever is not None:
            self.retriever.warm_up()
        for signature in self.signatures.values():
            for rows in (1, max_batch_size):
                made_up = signature.made_up(rows)
                if made_up is None:
                    continue
                try:
                    self.run(signature.name, made_up)
                except ServiceError as error:
                    if self.retriever is not None:
                        raise
                    # Zeros may mean nothing to the model of somebody else.
                    _log.info("%s: %r is not warmed up: %s", self.path, signature.name, error)

    def close(self) -> None:
        """Frees it; call it after the last request."""
        if self.retriever is not None:
            self.retriever.close()
        if self._foreign is not None:
            destroy_tables(self._foreign)
        self.retriever = self._foreign = None
        self._functions = {}


def join(parts: Sequence[Arrays]) -> Arrays:
    """One array a name, [sum of rows, ...]; a single part stays as it is.

    >>> join([{"x": np.array([1, 2])}, {"x": np.array([3])}])
    {'x': array([1, 2, 3])}
    """
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(outputs: Arrays, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Undoes `join`: so many rows in each part, as views."""
    ends = np.cumsum(rows).tolist()
    return [
        {name: array[end - count : end] for name, array in outputs.items()}
        for count, end in zip(rows, ends, strict=True)
    ]


def _dense_signatures(path: Path) -> dict[str, meta_graph_pb2.SignatureDef]:
    """Those of the graph for serving whose inputs and outputs are all plain tensors."""
    graphs = saved_model_pb2.SavedModel.FromString(path.read_bytes()).meta_graphs
    serving = [graph for graph in graphs if tf.saved_model.SERVING in graph.meta_info_def.tags]
    dense = {}
    for name, proto in serving[0].signature_def.items() if serving else ():
        infos = (*proto.inputs.values(), *proto.outputs.values())
        if all(info.WhichOneof("encoding") == "name" for info in infos):
            dense[name] = proto
    return dense


def _as_array(tensor: tf.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    value = tensor.numpy()  # of a scalar it is a number or bytes
    return np.asarray(value, object if isinstance(value, bytes) else None)


def _refusal(error: tf.errors.OpError) -> ServiceError:
    message = error.message.strip()[:_MAX_ERROR]
    if isinstance(error, tf.errors.InvalidArgumentError | tf.errors.OutOfRangeError):
        return InvalidRequest(f"The model refuses the inputs: {message}")
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return OutOfMemory(f"There is not enough memory for the request: {message}")
    return ServiceError(f"The model failed: {message}")
