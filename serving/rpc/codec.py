"""Tensors of the gRPC API: `TensorProto` to arrays and arrays to `TensorProto`.

The fields are filled directly: for 64 x 100 ids `tf.make_tensor_proto` takes ten times as long.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import error_codes_pb2, meta_graph_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
)

from serving.errors import InvalidRequest, check_rows
from serving.retrieval.encoded_ids import EncodedIds, field_head
from serving.runtime.service import Prediction
from serving.runtime.signature import Signature
from serving.version.names import VersionStatus

_OUTPUTS = predict_pb2.PredictResponse.OUTPUTS_FIELD_NUMBER  # a map: entries of key 1, value 2
SIGNATURE_DEF = "signature_def"  # the one field of metadata that there is

# What few bytes of a message may stand for: a shape costs its sender nothing.
_MAX_REPEATED = 1 << 18  # values
_MAX_REPEATED_BYTES = 1 << 22
_PIECE = 1 << 14  # values that are handed over at once
_FIELDS: dict[tf.DType, str] = {  # where a TensorProto keeps values that are not in its content
    tf.string: "string_val",
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int64: "int64_val",
    tf.bool: "bool_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    **dict.fromkeys((tf.int8, tf.int16, tf.int32, tf.uint8, tf.uint16), "int_val"),
    **dict.fromkeys((tf.half, tf.bfloat16), "half_val"),  # their bits, as integers
}


def decode_inputs(
    inputs: Mapping[str, tensor_pb2.TensorProto], signature: Signature, max_rows: int
) -> dict[str, np.ndarray]:
    """Inputs for a signature; whether names, dtypes and shapes fit is for the service to say.

    Raises:
      InvalidRequest: a tensor does not hold what it says, or has more than `max_rows` rows.
    """
    if signature.by_rows:  # a shape costs its sender nothing: see it before any value
        for tensor in inputs.values():
            check_rows(max((dim.size for dim in tensor.tensor_shape.dim[:1]), default=0), max_rows)
    return {name: decode_tensor(name, tensor) for name, tensor in inputs.items()}


def decode_tensor(name: str, proto: tensor_pb2.TensorProto) -> np.ndarray:
    """Any tensor; strings become an object array of bytes.

    Fewer values than the shape has room for are legal: the last one is repeated, none is zeros.

    Raises:
      InvalidRequest: the dtype is unknown, or the values do not fill the shape.
    """
    try:
        dtype = tf.dtypes.as_dtype(proto.dtype)
    except TypeError as error:
        raise InvalidRequest(f"Input {name!r} has the unknown dtype {proto.dtype}.") from error
    if dtype not in _FIELDS:
        raise InvalidRequest(f"Input {name!r} is {dtype.name}, which this service does not take.")
    shape = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise InvalidRequest(f"Input {name!r} must have a shape without unknown sizes.")
    size, content, values = math.prod(shape), proto.tensor_content, getattr(proto, _FIELDS[dtype])
    if not content:
        _check_values(name, values, size)
    elif dtype == tf.string:
        raise InvalidRequest(f"Input {name!r} must have its strings in string_val.")
    elif len(content) != size * dtype.size:
        raise InvalidRequest(
            f"Input {name!r} must have {size * dtype.size} bytes of tensor_content for "
            f"{size} values, got {len(content)}."
        )
    try:
        if dtype == tf.string:  # tf.make_ndarray takes five times as long
            last, strings = values[-1] if values else b"", np.empty(size, object)
            strings[:] = [*values, *[last] * (size - len(values))]  # a list: NumPy's own
            return strings.reshape(shape)  # arrays of bytes would lose a zero at the end
        return tf.make_ndarray(proto)
    except OverflowError as error:  # their field is as wide as an int32
        raise InvalidRequest(f"Input {name!r} must hold {dtype.name}: {error}.") from error
    except ValueError as error:  # more dimensions than NumPy has
        raise InvalidRequest(f"Input {name!r} cannot have {len(shape)} dimensions.") from error


def encode_tensor(array: np.ndarray, ids: EncodedIds | None = None) -> list[Any]:
    """A serialized `TensorProto` in parts: values in the field of their type, as TF Serving does.

    With `ids`, the array holds rows of candidates, and the tensor their ids.
    """
    proto, values, content = tensor_pb2.TensorProto(), array.ravel(), []
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    is_string = ids is not None or array.dtype == object
    dtype = tf.string if is_string else tf.dtypes.as_dtype(array.dtype)
    proto.dtype = dtype.as_datatype_enum
    field = _FIELDS.get(dtype)
    if ids is not None:
        content = [ids.string_val(values)]
    elif field is None:
        proto.tensor_content = values.tobytes()
    elif dtype in (tf.float32, tf.float64):
        # A packed field of them is their bytes; to hand over each number takes 50 times as long.
        number = proto.DESCRIPTOR.fields_by_name[field].number
        content = _field(number, [values.view(np.uint8)])
    else:
        values = values.view(np.uint16) if field == "half_val" else values
        for start in range(0, len(values), _PIECE):  # other threads have their turn in between
            getattr(proto, field).extend(values[start : start + _PIECE].tolist())
    return [proto.SerializeToString(), *content]  # what is joined is merged


def encode_prediction(model: str, prediction: Prediction, wanted: Collection[str] = ()) -> bytes:
    """The serialized answer to `Predict`; `wanted` names some outputs, nothing means all."""
    spec = _model_spec(model, prediction.version, prediction.signature.name)
    parts = [predict_pb2.PredictResponse(model_spec=spec).SerializeToString()]
    for name in wanted or prediction.outputs:
        tensor = encode_tensor(prediction.outputs[name], prediction.ids.get(name))
        parts += _field(_OUTPUTS, [*_field(1, [name.encode()]), *_field(2, tensor)])
    return b"".join(parts)  # the one copy


def check_output_filter(wanted: Collection[str], signature: Signature) -> None:
    """Raises InvalidRequest where a name is no output of the signature, or is there twice."""
    if not set(wanted) <= signature.outputs.keys() or len(set(wanted)) != len(wanted):
        raise InvalidRequest(
            f"output_filter must name outputs of {signature.name!r} once, "
            f"{_listed(signature.outputs)}, got {_listed(wanted)}."
        )


def encode_metadata(
    model: str, version: int, signatures: Mapping[str, meta_graph_pb2.SignatureDef]
) -> get_model_metadata_pb2.GetModelMetadataResponse:
    """The answer to `GetModelMetadata`."""
    spec = _model_spec(model, version)
    response = get_model_metadata_pb2.GetModelMetadataResponse(model_spec=spec)
    described = get_model_metadata_pb2.SignatureDefMap(signature_def=signatures)
    response.metadata[SIGNATURE_DEF].Pack(described)
    return response


def encode_status(statuses: Iterable[VersionStatus]) -> get_model_status_pb2.GetModelStatusResponse:
    """The answer to `GetModelStatus`."""
    response = get_model_status_pb2.GetModelStatusResponse()
    for status in statuses:
        row = response.model_version_status.add(version=status.version, state=status.state.value)
        row.status.error_code = error_codes_pb2.Code.Value(status.error_code)
        row.status.error_message = status.error_message
    return response


def _field(number: int, parts: list[Any]) -> list[Any]:
    """A field of a message whose bytes are those of the parts."""
    return [field_head(number, sum(map(len, parts))), *parts]


def _model_spec(model: str, version: int, signature: str = "") -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(name=model, signature_name=signature, version={"value": version})


def _listed(names: Collection[str]) -> str:
    """Names for a message, not too many of them."""
    text = ", ".join(sorted(names)) or "nothing"
    return text if len(text) <= 200 else text[:197] + "..."


def _check_values(name: str, values: Sequence[Any], size: int) -> None:
    """Refuses too many values, or so few that those left out would take too much memory."""
    missing = size - len(values)
    if missing < 0 or (missing and size > _MAX_REPEATED):
        raise InvalidRequest(
            f"Input {name!r} must have {size} values by its shape, got {len(values)}."
        )
    last = values[-1] if values else b""
    if isinstance(last, bytes) and missing * len(last) > _MAX_REPEATED_BYTES:
        raise InvalidRequest(
            f"Input {name!r} must not repeat {len(last)} bytes {missing} times: write them out."
        )
