"""JSON of TensorFlow Serving's REST API: bodies to arrays and arrays to bodies.

Reference: https://www.tensorflow.org/tfx/serving/api_rest. Bodies are read by pydantic-core, which
takes NaN and Infinity for numbers as TensorFlow Serving does, and answers are written by orjson,
which knows NumPy's arrays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import orjson
from google.protobuf import json_format
from pydantic_core import from_json
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import DeadlineExceeded, InvalidRequest, check_rows
from serving.rest.tensors import is_base64, shown, to_array, to_json_values
from serving.retrieval.encoded_ids import EncodedIds
from serving.rpc import codec as grpc_codec
from serving.runtime.signature import Signature
from serving.version.names import VersionStatus

MAX_VALUES = 1 << 19  # of a body, lists and objects included; each takes up to 200 bytes
PIECE_VALUES = 1 << 13  # that are written at once: a few milliseconds

_BLOCK = 1 << 20  # bytes whose values are counted at once
_AS_IN_PROTO = {"always_print_fields_with_no_presence": True, "preserving_proto_field_name": True}


class PredictBody(NamedTuple):
    """A body of `:predict`, read but not yet compared with a signature."""

    signature: str  # "" where it names none
    by_row: bool  # "instances", answered by "predictions"; otherwise "inputs" and "outputs"
    values: Any


def parse(body: bytes | bytearray) -> Any:
    """What a body says; it is counted first, for no other thread runs Python while it is read.

    >>> parse(b'{"instances": ["a", NaN]}')
    {'instances': ['a', nan]}

    Raises:
      ValueError: it is not JSON, has more than MAX_VALUES values or is nested too deeply.
    """
    if sum(map(body.count, b",[{")) > MAX_VALUES and _num_values(body) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values: split the request, or use gRPC")
    return from_json(body, cache_strings="none")


def _num_values(body: bytes | bytearray) -> int:
    """Values of a JSON text, or some more: its brackets and commas outside of strings."""
    if b"\\" in body:  # without what is escaped, a string ends at its next quote
        body = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    in_string, count = np.False_, 0
    for start in range(0, len(body), _BLOCK):
        part = np.frombuffer(body, np.uint8, min(_BLOCK, len(body) - start), start)
        quoted = np.bitwise_xor.accumulate(part == ord('"')) ^ in_string
        marks = (part == ord(",")) | (part | 32 == ord("{"))  # | 32: [ as well
        count += int(np.count_nonzero(marks & ~quoted))
        in_string = quoted[-1]
    return count


def parse_predict(body: bytes | bytearray) -> PredictBody:
    """Reads a body of `:predict`; InvalidRequest unless it is JSON with `instances` or `inputs`."""
    try:
        content = parse(body)
    except ValueError as error:
        raise InvalidRequest(f"JSON Parse error: {error}.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {shown(content)}.")
    signature = content.get("signature_name", "")
    if not isinstance(signature, str):
        raise InvalidRequest(f"'signature_name' must be a string, got {shown(signature)}.")
    by_row = "instances" in content
    if by_row and "inputs" in content:
        raise InvalidRequest("The body must have either 'instances' or 'inputs', got both.")
    if not by_row and "inputs" not in content:
        raise InvalidRequest("The body must have 'instances' (rows) or 'inputs' (columns).")
    return PredictBody(signature, by_row, content["instances" if by_row else "inputs"])


def check_lengths(columns: Iterable[Any], max_rows: int) -> None:
    """Raises InvalidRequest where a list among them has more than `max_rows` rows."""
    check_rows(max((len(rows) for rows in columns if isinstance(rows, list)), default=0), max_rows)


def decode_inputs(body: PredictBody, signature: Signature, max_rows: int) -> dict[str, np.ndarray]:
    """The inputs of a signature, with its dtypes; whether shapes fit is for the service to say.

    Raises:
      InvalidRequest: an input is missing, is too many, is ragged, has another type or more than
        `max_rows` rows.
    """
    if signature.by_rows:
        by_name = _is_object(body.values) and not body.by_row
        values = body.values.values() if by_name else [body.values]
        check_lengths(values, max_rows)
    columns = (_rows if body.by_row else _columns)(body.values, list(signature.inputs))
    return {
        name: to_array(name, columns[name], spec.dtype.as_numpy_dtype)
        for name, spec in signature.inputs.items()
    }


def encode_outputs(
    outputs: Mapping[str, np.ndarray],
    by_row: bool,
    deadline: float = math.inf,
    ids: Mapping[str, EncodedIds] = MappingProxyType({}),
) -> bytes:
    """The body that answers `:predict`; a single output goes without its name.

    >>> encode_outputs({"score": np.float32([[0.1, 2]])}, by_row=True)
    b'{"predictions":[[0.1,2.0]]}'

    `by_row` gives "predictions", one for each row; otherwise "outputs", one for each name. An
    output of `ids` holds rows of candidates, whose ids are written.

    Raises:
      InvalidRequest: outputs have no common first dimension to make rows of, or a dtype that
        JSON cannot carry.
      DeadlineExceeded: the deadline, in seconds of `time.monotonic`, passed.
    """
    columns = dict(sorted(outputs.items()))
    if by_row:
        rows = {name: array.shape[0] if array.ndim else "none" for name, array in columns.items()}
        if "none" in rows.values() or len(set(rows.values())) != 1:
            raise InvalidRequest(
                f"The outputs have no common number of rows ({rows}): ask by column, with 'inputs'."
            )
        return b'{"predictions":%s}' % _rows_json(columns, deadline, ids)
    parts = {
        name: _rows_json({name: array}, deadline, ids)
        if array.ndim
        else dump(to_json_values(name, array))
        for name, array in columns.items()
    }
    if len(parts) == 1:
        return b'{"outputs":%s}' % parts.popitem()[1]
    return dump({"outputs": {name: orjson.Fragment(part) for name, part in parts.items()}})


def dump(content: Any) -> bytes:
    """JSON of anything that holds no float which is not finite; arrays become lists."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def json_list(pieces: Iterable[Sequence[Any]], deadline: float) -> bytes:
    """Pieces as one JSON list, with turns for other threads; DeadlineExceeded where it is late."""
    parts = []
    for piece in pieces:
        if time.monotonic() > deadline:
            raise DeadlineExceeded("The deadline passed while the answer was written.")
        parts.append(dump(piece)[1:-1])
    return b"[%s]" % b",".join(parts)


def encode_status(statuses: Iterable[VersionStatus]) -> bytes:
    """`GetModelStatusResponse` in JSON, where an int64 is a string."""
    return dump(json_format.MessageToDict(grpc_codec.encode_status(statuses), **_AS_IN_PROTO))


def encode_metadata(
    model: str, version: int, signatures: Mapping[str, meta_graph_pb2.SignatureDef]
) -> bytes:
    """`GetModelMetadataResponse` in JSON, its one entry unpacked."""
    described = {
        name: json_format.MessageToDict(signature, **_AS_IN_PROTO)
        for name, signature in sorted(signatures.items())
    }
    spec = {"name": model, "signature_name": "", "version": str(version)}
    return dump({"model_spec": spec, "metadata": {"signature_def": {"signature_def": described}}})


def _rows_json(
    columns: Mapping[str, np.ndarray], deadline: float, ids: Mapping[str, EncodedIds]
) -> bytes:
    """Rows as a JSON list: of values where there is one column, of objects otherwise."""
    total = len(next(iter(columns.values())))
    width = sum(array.size for array in columns.values()) // max(1, total)
    size = max(1, PIECE_VALUES // max(1, width))

    def piece(start: int) -> Any:
        parts = {name: array[start : start + size] for name, array in columns.items()}
        rows = [
            list(map(orjson.Fragment, ids[name].json_lists(part)))
            if name in ids
            else to_json_values(name, part)
            for name, part in parts.items()
        ]
        if len(rows) == 1:
            return rows[0]
        return [dict(zip(columns, row, strict=True)) for row in zip(*rows, strict=True)]

    return json_list(map(piece, range(0, total, size)), deadline)


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
    for row, instance in enumerate(instances):
        if _is_object(instance) != are_objects:
            raise InvalidRequest(
                "'instances' must hold objects or plain values, got both: "
                f"row {row} is {shown(instance)}."
            )
        if are_objects and instance.keys() != set(names):
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
