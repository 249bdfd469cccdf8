import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import InvalidRequest
from serving.runtime.signature import Signature


def signature(inputs, outputs):
    """From {name: (dtype, shape)}; a shape of None has no known rank."""
    proto = meta_graph_pb2.SignatureDef()
    for described, infos in ((inputs, proto.inputs), (outputs, proto.outputs)):
        for name, (dtype, shape) in described.items():
            infos[name].name = f"{name}:0"
            infos[name].dtype = dtype.as_datatype_enum
            infos[name].tensor_shape.CopyFrom(tf.TensorShape(shape).as_proto())
    return Signature.of("serving_default", proto)


def wide():
    inputs = {"query_id": (tf.string, [None]), "weight": (tf.float32, [None, 2])}
    return signature(inputs, {"score": (tf.float32, [None, 3])})


def test_a_signature_is_read_from_its_proto():
    read = wide()
    assert read.inputs["query_id"] == tf.TensorSpec([None], tf.string, "query_id")
    assert read.inputs["weight"] == tf.TensorSpec([None, 2], tf.float32, "weight")
    assert read.outputs == {"score": tf.TensorSpec([None, 3], tf.float32, "score")}


@pytest.mark.parametrize(
    ("inputs", "output", "by_rows"),
    [
        ({"x": [None, 2]}, [None], True),
        ({"x": [None, 2], "y": [None]}, [None, None], True),
        ({"x": [None, 2]}, None, True),  # what has no known rank is looked at when it is there
        ({"x": [None, 2], "scalar": []}, [None], False),
        ({"x": [8, 2]}, [8], False),
        ({"x": None}, [None], False),
        ({"x": [None, 2]}, [], False),
        ({"x": [None, 2]}, [2], False),
        ({}, [None], False),
    ],
)
def test_by_rows_is_what_the_shapes_say(inputs, output, by_rows):
    described = {name: (tf.float32, shape) for name, shape in inputs.items()}
    assert signature(described, {"out": (tf.float32, output)}).by_rows is by_rows


def test_what_fits_passes_as_it_is():
    inputs = {"query_id": texts(b"e", b"\xff\x00"), "weight": np.ones((2, 2), np.float32)}
    fitted = wide().fit(inputs)
    assert all(fitted[name] is inputs[name] for name in inputs)
    assert wide().rows(fitted) == 2


def texts(*values):
    return np.array(values, object)


def test_no_rows_fit():
    inputs = {"query_id": np.empty(0, object), "weight": np.empty((0, 2), np.float32)}
    assert wide().rows(wide().fit(inputs)) == 0


GOOD = {"query_id": texts(b"a", b"b"), "weight": np.ones((2, 2), np.float32)}
INPUT = "Input 'weight' of signature 'serving_default' must be float32 \\[any, 2\\], got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((2, 2))}, INPUT + "float64 \\[2, 2\\]"),
        ({"weight": np.ones((2, 2), np.int32)}, INPUT + "int32"),
        ({"weight": np.ones((2, 3), np.float32)}, INPUT + "float32 \\[2, 3\\]"),
        ({"weight": np.ones(2, np.float32)}, INPUT + "float32 \\[2\\]"),
        ({"weight": texts(b"a", b"b")}, INPUT + "string \\[2\\]"),
        ({"query_id": np.array(b"a", object)}, "must be string \\[any\\], got string \\[\\]"),
        ({"query_id": np.array([1, 2])}, "must be string \\[any\\], got int64 \\[2\\]"),
        ({"query_id": texts(b"a")}, "same number of rows, got query_id 1, weight 2"),
        ({"other": 1}, "takes 'query_id': string \\[any\\], 'weight': float32 \\[any, 2\\], got"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(change, message):
    with pytest.raises(InvalidRequest, match=message):
        wide().fit({**GOOD, **change})


def test_a_missing_input_is_refused():
    with pytest.raises(InvalidRequest, match="got inputs 'query_id'"):
        wide().fit({"query_id": texts(b"a")})
    with pytest.raises(InvalidRequest, match="got inputs none"):
        wide().fit({})


def test_shapes_of_rows_tell_what_can_be_joined():
    open_sizes = signature({"x": (tf.float32, [None, None])}, {"y": (tf.float32, [None])})
    of = lambda *shape: open_sizes.row_shapes({"x": np.zeros(shape)})  # noqa: E731
    assert of(3, 4) == of(7, 4) != of(3, 5)
