"""JSON of TensorFlow Serving's REST API: bodies to arrays and arrays to bodies.

Reference: https://www.tensorflow.org/tfx/serving/api_rest. JSON is read and written by
pydantic-core, which FastAPI brings along: 64 x 100 ids and scores take it about a millisecond,
a seventh of what the standard library takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import json_format
from pydantic_core import to_json
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import DeadlineExceeded, InvalidRequest, check_rows
from serving.rest import pieces as json_pieces
from serving.rest.tensors import (
    is_base64,
    shown,
    to_array,
    to_lists,
)
from serving.runtime.signature import Signature
from serving.version.status import VersionStatus

PIECE_VALUES = 1 << 13  # that are written at once: a few milliseconds


class PredictBody(NamedTuple):
    """A body of `:predict`, read but not yet compared with a signature."""

    signature: str  # "" where it names none
    by_row: bool  # "instances", answered by "predictions"; otherwise "inputs" and "outputs"
    values: Any


def parse_predict(body: bytes | bytearray) -> PredictBody:
    """Reads a body of `:predict`.

    Raises:
      InvalidRequest: it is not JSON, or not an object with either `instances` or `inputs`.
    """
    try:
        content = json_pieces.parse(body)  # NaN, Infinity and -Infinity are numbers to it
    except ValueError as error:
        raise InvalidRequest(f"JSON Parse error: {error}.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {shown(content)}.")
    signature = content.get("signature_name", "")
    if not isinstance(signature, str):
        raise InvalidRequest(f"'signature_name' must be a string, got {shown(signature)}.")
    if "instances" in content and "inputs" in content:
        raise InvalidRequest("The body must have either 'instances' or 'inputs', got both.")
    if "instances" in content:
        return PredictBody(signature, True, content["instances"])
    if "inputs" in content:
        return PredictBody(signature, False, content["inputs"])
    raise InvalidRequest("The body must have 'instances' (rows) or 'inputs' (columns).")


def decode_inputs(body: PredictBody, signature: Signature, max_rows: int) -> dict[str, np.ndarray]:
    """The inputs of a signature, with its dtypes; whether shapes fit is for the service to say.

    Raises:
      InvalidRequest: an input is missing, is too many, is ragged, has another type or more than
        `max_rows` rows.
    """
    names = list(signature.inputs)
    if signature.by_rows:
        values = body.values
        columns = values.values() if _is_object(values) and not body.by_row else [values]
        check_rows(max((len(one) for one in columns if isinstance(one, list)), default=0), max_rows)
    columns = _rows(body.values, names) if body.by_row else _columns(body.values, names)
    return {
        name: to_array(name, columns[name], spec.dtype.as_numpy_dtype)
        for name, spec in signature.inputs.items()
    }


def encode_outputs(
    outputs: Mapping[str, np.ndarray], by_row: bool, deadline: float = math.inf
) -> bytes:
    """The body that answers `:predict`; a single output goes without its name.

    Args:
      outputs: arrays by name.
      by_row: "predictions", one for each row; otherwise "outputs", one for each name.
      deadline: of the request, in seconds of `time.monotonic`.

    Raises:
      InvalidRequest: outputs have no common first dimension to make rows of, or a dtype that
        JSON cannot carry.
      DeadlineExceeded: the deadline passed.
    """
    columns = dict(sorted(outputs.items()))
    if by_row:
        _check_rows(columns)
        return b'{"predictions":%s}' % _rows_json(columns, deadline)
    parts = [
        _rows_json({name: array}, deadline) if array.ndim else _json(to_lists(name, array))
        for name, array in columns.items()
    ]
    if len(parts) == 1:
        return b'{"outputs":%s}' % parts[0]
    named = zip(map(to_json, columns), parts, strict=True)
    return b'{"outputs":{%s}}' % b",".join(b"%s:%s" % pair for pair in named)


def json_list(pieces: Iterable[Sequence[Any]], deadline: float) -> bytes:
    """All pieces as one list in JSON: between two of them other threads have their turn.

    Raises:
      DeadlineExceeded: the deadline passed.
    """
    parts = []
    for piece in pieces:
        if time.monotonic() > deadline:
            raise DeadlineExceeded("The deadline passed while the answer was written.")
        parts.append(_json(piece)[1:-1])
    return b"[%s]" % b",".join(parts)


def encode_error(message: str) -> bytes:
    """The body of every answer that is none."""
    return to_json({"error": message})


def encode_status(statuses: Iterable[VersionStatus]) -> bytes:
    """`GetModelStatusResponse` in JSON, where an int64 is a string."""
    rows = [
        {
            "version": str(status.version),
            "state": status.state.name,
            "status": {"error_code": status.error_code, "error_message": status.error_message},
        }
        for status in statuses
    ]
    return to_json({"model_version_status": rows})


def encode_metadata(
    model: str, version: int, signatures: Mapping[str, meta_graph_pb2.SignatureDef]
) -> bytes:
    """`GetModelMetadataResponse` in JSON, its one entry unpacked."""
    described = {
        name: json_format.MessageToDict(
            signature,
            always_print_fields_with_no_presence=True,
            preserving_proto_field_name=True,
        )
        for name, signature in sorted(signatures.items())
    }
    content = {
        "model_spec": {"name": model, "signature_name": "", "version": str(version)},
        "metadata": {"signature_def": {"signature_def": described}},
    }
    return to_json(content)


def _json(content: Any) -> bytes:
    # Tokens NaN and Infinity, as TensorFlow Serving writes them and Python reads them.
    return to_json(content, inf_nan_mode="constants")


def _rows_json(columns: Mapping[str, np.ndarray], deadline: float) -> bytes:
    """Rows as a JSON list: of values where there is one column, of objects otherwise."""
    total = len(next(iter(columns.values())))
    width = sum(array.size for array in columns.values()) // max(1, total)

    def pieces() -> Iterator[list[Any]]:
        size = max(1, PIECE_VALUES // max(1, width))
        for start in range(0, total, size):
            lists = {
                name: to_lists(name, array[start : start + size]) for name, array in columns.items()
            }
            if len(lists) == 1:
                yield next(iter(lists.values()))
            else:
                rows = zip(*lists.values(), strict=True)
                yield [dict(zip(lists, row, strict=True)) for row in rows]

    return json_list(pieces(), deadline)


def _rows(instances: Any, names: Sequence[str]) -> dict[str, Any]:
    """Rows to columns; rows are values where there is one input, or objects by name."""
    if not isinstance(instances, list):
        raise InvalidRequest(f"'instances' must be a list, got {shown(instances)}.")
    if not instances:
        raise InvalidRequest("'instances' must hold at least one row, got an empty list.")
    are_objects = _is_object(instances[0])
    if not are_objects and len(names) != 1:
        raise InvalidRequest(
            f"'instances' must hold objects with the inputs {', '.join(names)}, "
            f"got {shown(instances[0])}."
        )
    wanted = set(names)
    for row, instance in enumerate(instances):
        if _is_object(instance) != are_objects:
            raise InvalidRequest(
                "'instances' must hold objects or plain values, got both: "
                f"row {row} is {shown(instance)}."
            )
        if are_objects and instance.keys() != wanted:
            raise InvalidRequest(
                f"Each of 'instances' must have exactly the inputs {', '.join(names)}; "
                f"row {row} has {shown(sorted(instance))}."
            )
    if not are_objects:
        return {names[0]: instances}
    return {name: [instance[name] for instance in instances] for name in names}


def _columns(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    if not _is_object(inputs):
        if len(names) != 1:
            raise InvalidRequest(
                f"'inputs' must be an object with {', '.join(names)}, got {shown(inputs)}."
            )
        return {names[0]: inputs}
    if not inputs.keys() >= set(names):  # more than these do no harm, as in TensorFlow Serving
        raise InvalidRequest(f"'inputs' must have {', '.join(names)}, got {shown(sorted(inputs))}.")
    return inputs


def _is_object(value: Any) -> bool:
    """Whether it names inputs; {"b64": "..."} is a value."""
    return isinstance(value, dict) and not is_base64(value)


def _check_rows(outputs: Mapping[str, np.ndarray]) -> None:
    rows = {name: array.shape[0] if array.ndim else "none" for name, array in outputs.items()}
    if "none" in rows.values() or len(set(rows.values())) != 1:
        raise InvalidRequest(
            f"The outputs have no common number of rows ({rows}): ask by column, with 'inputs'."
        )
