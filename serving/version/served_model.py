"""The SavedModel of a version: a query encoder, an index, and the raw ids of the candidates.

Signatures, the same in the exact and the ScaNN model:
  serving_default: query_id string [B] -> candidate_id string [B, K], score float32 [B, K];
    where there is no result (an unknown query), the empty id with score 0.
  query_embedding: query_id string [B] -> embedding float32 [B, D], known bool [B].
  embedding_search: embedding float32 [B, D] -> candidate_row int32 [B, K], -1 for no result,
    score float32 [B, K]. In the ScaNN model it also takes leaves_to_search, int32 scalar, 0 or
    less for the tuned number; kept out of `serving_default`, which thus means the same in both.
  wide_search, in the ScaNN model alone: embedding float32 [B, D], num_results int32 scalar, from
    K to N -> as embedding_search with so many columns, for those who filter results.
In the exact model, `serving_default` and `retrieve` know the delta of a version (see `delta`), the
others its base alone.
Where the query model takes more than ids (see `towers.model.encoder`), also
  request_embedding: its inputs, query_id among them -> embedding, known, unknown_history int32 [B].
  retrieve: the same inputs -> candidate_id, score as `serving_default`.
A version without a query model takes embedding instead of query_id everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.attributes import LIST, NUMBER, TEXT, as_attributes
from serving.version.delta import DeltaVariables, part_checkpoint
from serving.version.index import ExactIndex, ScannIndex, best_rows

QUERY_ID, EMBEDDING, KNOWN = "query_id", "embedding", "known"
CANDIDATE_ID, CANDIDATE_ROW, SCORE = "candidate_id", "candidate_row", "score"
LEAVES_TO_SEARCH, NUM_RESULTS = "leaves_to_search", "num_results"
TOP_K, QUERY_EMBEDDING, EMBEDDING_SEARCH = "serving_default", "query_embedding", "embedding_search"
WIDE_SEARCH = "wide_search"
REQUEST_EMBEDDING, RETRIEVE = "request_embedding", "retrieve"
HISTORY, UNKNOWN_HISTORY = "history", "unknown_history"


def type_of(spec: tf.TensorSpec) -> pa.DataType:
    """What an input of `request_embedding` is in a table."""
    return NUMBER if spec.dtype.is_floating else (TEXT, LIST)[spec.shape.rank - 1]


def input_rows(specs: Mapping[str, tf.TensorSpec], table: pa.Table) -> list[dict[str, Any]]:
    """The inputs as rows of a table say them, None if left out; ValueError: of another kind."""
    table = table.rename_columns([schema.input_name(name) for name in table.column_names])
    like = pa.schema([(name, type_of(spec)) for name, spec in specs.items()])
    rows: list[dict[str, Any]] = as_attributes(table, like).to_pylist()
    for row in rows:
        row |= {n: list(filter(None, v)) for n, v in row.items() if isinstance(v, list)}
    return rows


def input_tensors(
    specs: Mapping[str, tf.TensorSpec], rows: Sequence[Mapping[str, Any]]
) -> dict[str, tf.Tensor]:
    """The inputs of B rows: lists are filled up with empty strings."""
    return {name: _tensor(spec, [row.get(name) for row in rows]) for name, spec in specs.items()}


def _tensor(spec: tf.TensorSpec, values: list[Any]) -> tf.Tensor:
    if spec.dtype.is_floating:
        return tf.constant([np.nan if value is None else value for value in values], spec.dtype)
    if spec.shape.rank == 1:
        return tf.constant([value or "" for value in values], tf.string)
    width = max((len(value or ()) for value in values), default=0)
    rows = [[*(value or ()), *[""] * (width - len(value or ()))] for value in values]
    return tf.constant(rows, tf.string, [len(values), width])


class QueryModel(tf.Module):
    """Raw query ids to embeddings, by the query SavedModel of a bundle."""

    def __init__(self, path: Path, dimensions: int) -> None:
        """Loads a SavedModel for D dimensions; ValueError: it has not the signature of a bundle."""
        super().__init__(name="query_model")
        self._dimensions = dimensions
        try:
            self._model = tf.saved_model.load(str(path))
        except (OSError, tf.errors.OpError, ValueError) as error:
            raise ValueError(f"{path} must be a SavedModel: {error}.") from error
        signature = self._model.signatures.get(TOP_K)
        if signature is None:
            raise ValueError(f"{path} must have a signature {TOP_K!r}: save it with one.")
        _check_signature(path, signature, dimensions)
        self.input = tf.TensorSpec([None], tf.string, name=QUERY_ID)
        request = self._model.signatures.get(REQUEST_EMBEDDING)
        inputs = {} if request is None else request.structured_input_signature[1]
        self.request_inputs = list(inputs.values())

    def __call__(self, query_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Embeddings float32 [B, D] and known bool [B]."""
        outputs = self._model.signatures[TOP_K](**{QUERY_ID: query_ids})
        return tf.ensure_shape(outputs[EMBEDDING], [None, self._dimensions]), outputs[KNOWN]

    def request(self, *values: tf.Tensor) -> dict[str, tf.Tensor]:
        """The outputs of `request_embedding` for values of `request_inputs`."""
        names = [spec.name for spec in self.request_inputs]
        inputs = dict(zip(names, values, strict=True))
        outputs = self._model.signatures[REQUEST_EMBEDDING](**inputs)
        shape = [None, self._dimensions]
        return {**outputs, EMBEDDING: tf.ensure_shape(outputs[EMBEDDING], shape)}


class GivenEmbedding(tf.Module):
    """Stands in for a query model where the caller brings embeddings: all are known."""

    request_inputs: Sequence[tf.TensorSpec] = ()

    def __init__(self, dimensions: int) -> None:
        super().__init__(name="given_embedding")
        self.input = tf.TensorSpec([None, dimensions], tf.float32, name=EMBEDDING)

    def __call__(self, embedding: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The embeddings float32 [B, D] as they are, and True [B]."""
        return tf.identity(embedding), tf.ones(tf.shape(embedding)[:1], tf.bool)


class ServedModel(tf.Module):
    """Joins the three parts into the signatures that are saved."""

    def __init__(
        self,
        encoder: QueryModel | GivenEmbedding,
        index: ExactIndex | ScannIndex,
        candidate_ids: list[str],
        dimensions: int,
    ) -> None:
        super().__init__(name="served_model")
        self.encoder = encoder
        self.index = index
        self.candidate_ids = tf.Variable(candidate_ids, trainable=False, name="candidate_ids")
        self._embedding = tf.TensorSpec([None, dimensions], tf.float32, name=EMBEDDING)
        if isinstance(index, ExactIndex):
            self.delta = DeltaVariables(dimensions)
        else:
            self.release = tf.function(index.release, input_signature=[])

    def save(self, path: Path) -> dict[str, list[tf.TensorSpec]]:
        """Writes the SavedModel; returns the inputs of each signature."""
        inputs = [self._embedding]
        if isinstance(self.index, ScannIndex):
            inputs.append(tf.TensorSpec([], tf.int32, name=LEAVES_TO_SEARCH))
        signatures = {
            TOP_K: _trace(self._top_k, self.encoder.input),
            QUERY_EMBEDDING: _trace(self._query_embedding, self.encoder.input),
            EMBEDDING_SEARCH: _trace(self._embedding_search, *inputs),
        }
        if isinstance(self.index, ScannIndex):
            num_results = tf.TensorSpec([], tf.int32, name=NUM_RESULTS)
            signatures[WIDE_SEARCH] = _trace(self._wide_search, self._embedding, num_results)
        if isinstance(self.encoder, QueryModel) and self.encoder.request_inputs:
            inputs = self.encoder.request_inputs
            signatures[REQUEST_EMBEDDING] = _trace(self.encoder.request, *inputs)
            signatures[RETRIEVE] = _trace(self._retrieve, *inputs)
        tf.saved_model.save(self, str(path), signatures=signatures)
        if isinstance(self.index, ExactIndex):
            part_checkpoint(path)
        return {
            name: list(function.structured_input_signature[0])
            for name, function in signatures.items()
        }

    def _top_k(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._best(*self.encoder(query))

    def _retrieve(self, *values: tf.Tensor) -> dict[str, tf.Tensor]:
        assert isinstance(self.encoder, QueryModel)
        outputs = self.encoder.request(*values)
        return self._best(outputs[EMBEDDING], outputs[KNOWN])

    def _best(self, embedding: tf.Tensor, known: tf.Tensor) -> dict[str, tf.Tensor]:
        if isinstance(self.index, ExactIndex):
            ids, scores = self._best_with_delta(self.index, embedding)
            is_result = scores > -math.inf
        else:
            rows, scores = self.index.search(embedding)
            ids, is_result = tf.gather(self.candidate_ids, tf.maximum(rows, 0)), rows >= 0
        is_result &= known[:, tf.newaxis]  # [B, K]
        return {CANDIDATE_ID: tf.where(is_result, ids, ""), SCORE: tf.where(is_result, scores, 0.0)}

    def _best_with_delta(
        self, index: ExactIndex, embedding: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Ids and scores [B, K]; -inf where there are no more candidates."""
        rows, scores = index.search(embedding, self.delta.excluded.read_value())
        added = best_rows(self.delta.vectors.read_value(), embedding, index.k)
        ids = [tf.gather(self.candidate_ids, rows), tf.gather(self.delta.ids, added[0])]
        scores, places = tf.math.top_k(tf.concat([scores, added[1]], axis=1), k=index.k)
        return tf.gather(tf.concat(ids, axis=1), places, batch_dims=1), scores

    def _query_embedding(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
        embedding, known = self.encoder(query)
        return {EMBEDDING: embedding, KNOWN: known}

    def _embedding_search(self, *inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, scores = self.index.search(*inputs)
        return {CANDIDATE_ROW: rows, SCORE: scores}

    def _wide_search(self, embedding: tf.Tensor, num_results: tf.Tensor) -> dict[str, tf.Tensor]:
        assert isinstance(self.index, ScannIndex)
        rows, scores = self.index.search_wider(embedding, num_results)
        return {CANDIDATE_ROW: rows, SCORE: scores}


def _trace(function: Callable[..., dict[str, tf.Tensor]], *inputs: tf.TensorSpec) -> Any:
    return tf.function(function).get_concrete_function(*inputs)


def _check_signature(path: Path, signature: Any, dimensions: int) -> None:
    """Refuses a query model with other inputs or outputs than the contract names."""
    inputs = signature.structured_input_signature[1]
    outputs = signature.structured_outputs
    got = {name: spec.dtype.name for name, spec in (*inputs.items(), *outputs.items())}
    if list(inputs) != [QUERY_ID] or inputs[QUERY_ID].dtype != tf.string:
        raise ValueError(f"{path} must take one input {QUERY_ID!r} of strings, got {got}.")
    if not {EMBEDDING, KNOWN} <= set(outputs) or outputs[KNOWN].dtype != tf.bool:
        raise ValueError(f"{path} must give {EMBEDDING!r} and {KNOWN!r} (bool), got {got}.")
    shape = outputs[EMBEDDING].shape
    fits = shape.rank == 2 and shape[1] in (None, dimensions)
    if outputs[EMBEDDING].dtype != tf.float32 or not (fits or shape.rank is None):
        raise ValueError(
            f"{path} must give embeddings float32 [B, {dimensions}] like the candidate vectors, "
            f"got {outputs[EMBEDDING].dtype.name} {shape}."
        )
