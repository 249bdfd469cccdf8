"""What a request says of its queries → the inputs of the graph that embeds them → embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.attributes import kind_of
from pipeline.contract.settings import did_you_mean
from serving.errors import MAX_ID_LENGTH, InvalidRequest
from serving.retrieval.requests import MAX_NUMBER, shown
from serving.retrieval.search import CheckedQueries
from serving.version import served_model

MAX_HISTORY = 10_000  # candidates of one query

Query = Mapping[str, Any]
Embedded = tuple[np.ndarray, np.ndarray, np.ndarray]  # embeddings, known, unknown_history


class QueryInputs:
    """The inputs that describe a query, by name, and the graphs that embed it.

    Args:
      signatures: of the exact model; one that takes ids alone has no `request_embedding`.
    """

    def __init__(self, signatures: Mapping[str, Any]) -> None:
        self.id_encoder = signatures[served_model.QUERY_EMBEDDING]
        self.encoder = signatures.get(served_model.REQUEST_EMBEDDING, self.id_encoder)
        self.specs = dict(sorted(self.encoder.structured_input_signature[1].items()))

    def check(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """The queries without their nulls; InvalidRequest: a name or a value does not fit."""
        checked = []
        for number, query in enumerate(queries):
            query = {schema.input_name(name): value for name, value in query.items()}
            kept = {name: value for name, value in query.items() if value is not None}
            for name, value in kept.items():
                if (spec := self.specs.get(name)) is None:
                    raise InvalidRequest(self._unknown(number, name))
                if rule := _broken_rule(spec, value):
                    raise InvalidRequest(
                        f"queries[{number}]: {name} must be {rule}, got {shown(value)}."
                    )
            if not kept:
                raise InvalidRequest(
                    f"queries[{number}] must have at least one of {', '.join(self.specs)}."
                )
            checked.append(kept)
        return checked

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """Checked queries as rows of a table describe them, null left out; errors of `check`."""
        names = map(schema.input_name, table.column_names)
        if unknown := [name for name in names if name not in self.specs]:
            raise InvalidRequest(self._unknown(0, unknown[0]))
        return self.check(served_model.input_rows(self.specs, table))

    def tensors(self, queries: Sequence[Query]) -> dict[str, tf.Tensor]:
        """Checked queries as tensors with B rows: lists are filled up with empty strings."""
        return served_model.input_tensors(self.specs, queries)

    def embed(self, parts: Sequence[CheckedQueries]) -> Iterator[Embedded]:
        """Of each part embeddings float32 [b, D], known bool [b] and unknown_history int32 [b].

        One call makes all of them, when the first is asked for. Either all parts have `queries`,
        or all have ids alone.
        """
        if parts[0].queries is None:
            ids = [query_id for part in parts for query_id in part.query_ids]
            outputs = self.id_encoder(**{served_model.QUERY_ID: tf.constant(ids, tf.string)})
        else:
            queries = [query for part in parts for query in part.queries or ()]
            outputs = self.encoder(**self.tensors(queries))
        embeddings, known, unknown_history = arrays_of(outputs)
        start = 0
        for part in parts:
            piece = slice(start, start + len(part.query_ids))
            start = piece.stop
            yield embeddings[piece], known[piece], unknown_history[piece]

    def kinds(self) -> dict[str, str]:
        """Of each input what a request brings: text, list (of texts) or number."""
        return {name: kind_of(served_model.type_of(spec)) for name, spec in self.specs.items()}

    def _unknown(self, number: int, name: str) -> str:
        has = f"it takes {', '.join(self.specs)}."
        hint = did_you_mean(name[:40], list(self.specs), has)
        what = "history" if name == served_model.HISTORY else repr(name[:40])
        if name == served_model.HISTORY:
            hint = "its tower knows ids alone; train fism, svdpp, or features with a history."
        return f"queries[{number}] has {what}, which this version does not take: {hint}"


def arrays_of(outputs: Mapping[str, tf.Tensor]) -> Embedded:
    """What an encoder gave for B queries: float32 [B, D], bool [B], int32 [B]."""
    known, skipped = outputs[served_model.KNOWN].numpy(), outputs.get(served_model.UNKNOWN_HISTORY)
    skipped = np.zeros(len(known), np.int32) if skipped is None else skipped.numpy()
    return outputs[served_model.EMBEDDING].numpy(), known, skipped


def _broken_rule(spec: tf.TensorSpec, value: Any) -> str:
    """What a value must be, if it is not that; "" if it is."""
    if spec.dtype.is_floating:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if is_number and abs(value) <= MAX_NUMBER else f"a number up to {MAX_NUMBER:g}"
    if spec.shape.rank == 1:
        return "" if _is_text(value) else "a string"
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_list or not all(map(_is_text, value)):
        return "a list of strings"
    return "" if len(value) <= MAX_HISTORY else f"a list of at most {MAX_HISTORY}: the last ones"


def _is_text(value: Any) -> bool:
    """Whether it is a string that TensorFlow takes: no half of a surrogate pair."""
    if not isinstance(value, str) or len(value) > MAX_ID_LENGTH:
        return False
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
