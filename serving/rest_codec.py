"""JSON of TensorFlow Serving's REST API: bodies to arrays and arrays to bodies.

Reference: https://www.tensorflow.org/tfx/serving/api_rest. JSON is read and written by
pydantic-core, which FastAPI brings along: 64 x 100 ids and scores take it about a millisecond,
a seventh of what the standard library takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import json_format
from pydantic_core import from_json, to_json
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import InvalidRequest
from serving.json_tensors import is_base64, shown, to_array, to_lists
from serving.model_config import VersionStatus
from serving.signature import Signature


class PredictBody(NamedTuple):
    """A body of `:predict`, read but not yet compared with a signature."""

    signature: str  # "" where it names none
    by_row: bool  # "instances", answered by "predictions"; otherwise "inputs" and "outputs"
    values: Any


def parse_predict(body: bytes) -> PredictBody:
    """Reads a body of `:predict`.

    Raises:
      InvalidRequest: it is not JSON, or not an object with either `instances` or `inputs`.
    """
    try:
        content = from_json(body)  # NaN, Infinity and -Infinity are numbers to it
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


def decode_inputs(body: PredictBody, signature: Signature) -> dict[str, np.ndarray]:
    """The inputs of a signature, with its dtypes; whether shapes fit is for the service to say.

    Raises:
      InvalidRequest: an input is missing, is too many, is ragged or has another type.
    """
    names = list(signature.inputs)
    columns = _rows(body.values, names) if body.by_row else _columns(body.values, names)
    return {
        name: to_array(name, columns[name], spec.dtype.as_numpy_dtype)
        for name, spec in signature.inputs.items()
    }


def encode_outputs(outputs: Mapping[str, np.ndarray], by_row: bool) -> bytes:
    """The body that answers `:predict`; a single output goes without its name.

    Raises:
      InvalidRequest: outputs have no common first dimension to make rows of, or a dtype that
        JSON cannot carry.
    """
    if by_row:
        _check_rows(outputs)
    columns = {name: to_lists(name, array) for name, array in sorted(outputs.items())}
    if len(columns) == 1:
        content: Any = next(iter(columns.values()))
    elif by_row:
        content = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    else:
        content = columns
    # Tokens NaN and Infinity, as TensorFlow Serving writes them and Python reads them.
    return to_json({"predictions" if by_row else "outputs": content}, inf_nan_mode="constants")


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
