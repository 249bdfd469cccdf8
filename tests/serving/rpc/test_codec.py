"""Tensors of the gRPC API, held against TensorFlow's own conversions."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import predict_pb2

from serving.errors import InvalidRequest
from serving.retrieval.encoded_ids import EncodedIds
from serving.rpc import codec as grpc_codec
from serving.runtime.service import Prediction
from serving.runtime.signature import Signature

NUMBERS = [
    tf.bool, tf.half, tf.bfloat16, tf.float32, tf.float64, tf.int8, tf.int16, tf.int32, tf.int64,
    tf.uint8, tf.uint16, tf.uint32, tf.uint64,
]  # fmt: skip


def signature(inputs=(), outputs=()):
    return Signature(
        "serving_default",
        {name: tf.TensorSpec(None) for name in inputs},
        {name: tf.TensorSpec(None) for name in outputs},
        meta_graph_pb2.SignatureDef(),
    )


def encoded(array, *ids):
    return tensor_pb2.TensorProto.FromString(b"".join(grpc_codec.encode_tensor(array, *ids)))


def in_fields(array, dtype):
    """A tensor with its values in the field of its type, as clients without NumPy write it."""
    proto = tf.make_tensor_proto(array, dtype)
    if proto.tensor_content:
        kind = dtype.as_numpy_dtype
        values = np.frombuffer(proto.tensor_content, kind)
        proto.tensor_content = b""
        if dtype in (tf.half, tf.bfloat16):
            proto.half_val.extend(values.view(np.uint16).tolist())
        else:
            field = {
                tf.bool: "bool_val", tf.float32: "float_val", tf.float64: "double_val",
                tf.int64: "int64_val", tf.uint32: "uint32_val", tf.uint64: "uint64_val",
            }.get(dtype, "int_val")  # fmt: skip
            getattr(proto, field).extend(values.tolist())
    return proto


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("write", [tf.make_tensor_proto, in_fields])
def test_numbers_of_every_dtype(dtype, write):
    array = np.array([[0, 1, 1], [1, 0, 100]]).astype(dtype.as_numpy_dtype)
    decoded = grpc_codec.decode_tensor("x", write(array, dtype))
    assert decoded.dtype == array.dtype
    assert decoded.tolist() == array.tolist()
    proto = encoded(array)
    assert proto == in_fields(array, dtype)
    assert tf.make_ndarray(proto).tolist() == array.tolist()


@pytest.mark.parametrize("size", [0, 1, 31, 32, 4095, 4096, 600_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_field_of_floats_has_all_of_them(size, dtype):
    array = np.random.default_rng(size).normal(size=size).astype(dtype)
    proto, expected = encoded(array), tensor_pb2.TensorProto()
    field = {np.float32: "float_val", np.float64: "double_val"}[dtype]
    getattr(expected, field).extend(array.tolist())
    expected.dtype = tf.as_dtype(dtype).as_datatype_enum
    expected.tensor_shape.dim.add().size = size
    assert proto == expected


def test_strings():
    array = np.array([[b"a", b"\xff\x00"], ["ñ".encode(), b""]], object)
    decoded = grpc_codec.decode_tensor("x", tf.make_tensor_proto(array))
    assert decoded.dtype == object
    assert decoded.tolist() == array.tolist()
    proto = encoded(array)
    assert proto == tf.make_tensor_proto(array)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_rows_of_candidates_become_the_tensor_of_their_ids(size):
    ids, rows = ["a" * size, "ñ\0", "x"], np.array([[1, -1, 0], [2, 0, 1]])
    names = [*(name.encode() for name in ids), b""]
    expected = np.array([[names[row] for row in part] for part in rows], object)
    assert encoded(rows, EncodedIds(ids)) == tf.make_tensor_proto(expected)
    assert tf.make_ndarray(encoded(rows[:0], EncodedIds(ids))).shape == (0, 3)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 1, 2)])
def test_shapes(shape):
    for array in (np.zeros(shape, np.float32), np.full(shape, b"a", object)):
        proto = encoded(array)
        assert tf.make_ndarray(proto).shape == shape
        decoded = grpc_codec.decode_tensor("x", proto)
        assert decoded.shape == shape
        assert decoded.tolist() == array.tolist()


def of_strings(*values):
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=values)


def test_a_zero_byte_at_the_end_is_kept_where_a_value_is_repeated():
    proto = of_strings(b"a", b"b\0")
    proto.tensor_shape.dim.add().size = 4
    decoded = grpc_codec.decode_tensor("x", proto).tolist()
    assert decoded == [b"a", b"b\0", b"b\0", b"b\0"]
    assert decoded[2] is decoded[3]


def test_rows_are_counted_before_any_value_is_read():
    proto = of_strings(b"a")
    proto.tensor_shape.dim.add().size = 6
    by_rows = dataclasses.replace(signature(["x"]), by_rows=True)
    assert len(grpc_codec.decode_inputs({"x": proto}, by_rows, 6)["x"]) == 6
    proto.tensor_shape.dim[0].size = 10**12
    with pytest.raises(InvalidRequest, match=r"at most 6 rows, got 1000000000000"):
        grpc_codec.decode_inputs({"x": proto}, by_rows, 6)


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1, 2]), [1, 2, 2, 2]),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_INT32, int_val=[3]), [3, 3, 3, 3]),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_INT64), [0, 0, 0, 0]),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[b"q"]), [b"q"] * 4),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING), [b""] * 4),
    ],
)
def test_the_last_value_stands_for_those_left_out(proto, expected):
    proto.tensor_shape.dim.add().size = 4
    assert grpc_codec.decode_tensor("x", proto).tolist() == expected


@pytest.mark.parametrize(
    ("proto", "sizes", "message"),
    [
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1, 2]), [1], "1 values"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1]), [10**7], "got 1"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT), [10**9, 10**9, 10**9], "got 0"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, tensor_content=b"12345"), [1], "got 5"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_INT8, int_val=[300]), [1], "int8"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1]), [-1], "unknown sizes"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1]), [1] * 200, "200 dim"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_content=b"a"), [1], "string_val"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_RESOURCE), [1], "resource"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_COMPLEX64), [1], "complex64"),
        (tensor_pb2.TensorProto(dtype=types_pb2.DT_QINT8, tensor_content=b"a"), [1], "qint8"),
        (tensor_pb2.TensorProto(dtype=999), [1], "unknown dtype 999"),
        (tensor_pb2.TensorProto(), [1], "dtype 0"),
        (of_strings(b"x" * 30_000), [1 << 18], "must not repeat 30000 bytes 262143 times"),
    ],
)
def test_tensors_that_are_refused(proto, sizes, message):
    for size in sizes:
        proto.tensor_shape.dim.add().size = size
    with pytest.raises(InvalidRequest) as refusal:
        grpc_codec.decode_tensor("x", proto)
    assert "'x'" in str(refusal.value)
    assert message in str(refusal.value)


def test_a_shape_must_be_known():
    proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1])
    proto.tensor_shape.unknown_rank = True
    with pytest.raises(InvalidRequest, match="unknown sizes"):
        grpc_codec.decode_tensor("x", proto)


def test_inputs_of_a_signature():
    one = tf.make_tensor_proto([1.0])
    decoded = grpc_codec.decode_inputs({"a": one}, signature(["a"]), 9)
    assert decoded["a"].tolist() == [1.0]


def test_output_filter():
    outputs = {"id": np.array([b"a"], object), "score": np.array([2.0], np.float32)}
    both = signature((), ["id", "score"])
    prediction = Prediction(outputs, 3, both, {})
    parse = predict_pb2.PredictResponse.FromString
    response = parse(grpc_codec.encode_prediction("m", prediction))
    assert set(response.outputs) == {"id", "score"}
    assert (response.model_spec.name, response.model_spec.version.value) == ("m", 3)
    assert response.model_spec.signature_name == "serving_default"
    response = parse(grpc_codec.encode_prediction("m", prediction, ["score"]))
    assert set(response.outputs) == {"score"}
    for wanted in (["scores"], ["id", "id"]):
        with pytest.raises(InvalidRequest, match="output_filter must name outputs of"):
            grpc_codec.check_output_filter(wanted, both)
    grpc_codec.check_output_filter([], both)
