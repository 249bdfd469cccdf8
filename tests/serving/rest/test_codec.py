"""The JSON of TensorFlow Serving: the examples of its REST page, and what it refuses."""

import dataclasses
import json
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import DeadlineExceeded, InvalidRequest
from serving.rest import codec as rest_codec
from serving.runtime.signature import Signature
from serving.version.names import State, VersionStatus


def signature(**inputs):
    specs = {name: tf.TensorSpec(None, dtype, name) for name, dtype in inputs.items()}
    return Signature("serving_default", specs, {}, meta_graph_pb2.SignatureDef())


def decode(body, **inputs):
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    text = text.encode() if isinstance(text, str) else text
    return rest_codec.decode_inputs(rest_codec.parse_predict(text), signature(**inputs), 6400)


def encode(by_row, **outputs):
    whole = rest_codec.encode_outputs(outputs, by_row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rest_codec, "PIECE_VALUES", 2)  # in pieces it is the same
        assert rest_codec.encode_outputs(outputs, by_row) == whole
    return json.loads(whole)


def strings(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_rows_of_a_single_input():
    decoded = decode({"instances": ["foo", "bar", {"b64": "/+A="}]}, tag=tf.string)
    assert decoded["tag"].tolist() == [b"foo", b"bar", b"\xff\xe0"]
    decoded = decode({"instances": [[[1, 2]], [[3, 4]]]}, x=tf.float32)
    assert decoded["x"].dtype == np.float32
    assert decoded["x"].tolist() == [[[1.0, 2.0]], [[3.0, 4.0]]]


ROWS = [
    {"tag": "foo", "signal": [1, 2, 3, 4, 5], "sensor": [[1, 2], [3, 4]]},
    {"tag": "bar", "signal": [3, 4, 1, 2, 5], "sensor": [[4, 5], [6, 8]]},
]
COLUMNS = {
    "tag": ["foo", "bar"],
    "signal": [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]],
    "sensor": [[[1, 2], [3, 4]], [[4, 5], [6, 8]]],
}
TYPES = {"tag": tf.string, "signal": tf.int64, "sensor": tf.float64}


@pytest.mark.parametrize("body", [{"instances": ROWS}, {"inputs": COLUMNS}])
def test_rows_and_columns_of_several_inputs(body):
    decoded = decode(body, **TYPES)
    assert {name: array.dtype for name, array in decoded.items()} == {
        "tag": np.dtype(object),
        "signal": np.dtype(np.int64),
        "sensor": np.dtype(np.float64),
    }
    assert decoded["tag"].tolist() == [b"foo", b"bar"]
    assert decoded["signal"].tolist() == COLUMNS["signal"]
    assert decoded["sensor"].tolist() == COLUMNS["sensor"]


def test_columns_of_a_single_input():
    assert decode({"inputs": ["a", "b"]}, tag=tf.string)["tag"].tolist() == [b"a", b"b"]
    assert decode({"inputs": {"tag": ["a"]}}, tag=tf.string)["tag"].tolist() == [b"a"]
    assert decode({"inputs": {"b64": "YQ"}}, tag=tf.string)["tag"].tolist() == b"a"
    assert decode({"inputs": {"x": 2, "other": 1}}, x=tf.float32)["x"] == 2.0
    assert decode({"inputs": []}, x=tf.float32)["x"].shape == (0,)


def test_signature_name():
    body = rest_codec.parse_predict(b'{"signature_name": "other", "inputs": [1]}')
    assert body.signature == "other"
    assert rest_codec.parse_predict(b'{"inputs": [1]}').signature == ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "JSON Parse error: EOF"),
        ('{"instances": ["a"', "JSON Parse error"),
        ('{"instances": ["a"]} x', "trailing"),
        ("'instances'", "JSON Parse error"),
        (b'{"instances": ["\xff"]}', "JSON Parse error"),
        ("[" * 5000, "recursion"),
        ("[1, 2]", "must be a JSON object, got [1,2]"),
        ("{}", "'instances' (rows) or 'inputs'"),
        ({"instances": ["a"], "inputs": ["a"]}, "got both"),
        ({"instances": ["a"], "signature_name": 7}, "'signature_name' must be a string, got 7"),
        ({"instances": "a"}, "must be a list"),
        ({"instances": {"tag": "a"}}, "must be a list"),
        ({"instances": []}, "at least one row"),
        ({"instances": [1]}, "'tag' must be a string in every place, got 1"),
        ({"instances": ["a", None]}, "got null"),
        ({"instances": ["a", ["b"]]}, 'got ["b"]'),
        ({"instances": [["a"], ["b", "c"]]}, 'lists of 1 at level 2, got ["b","c"]'),
        ({"instances": [["a"], "b"]}, 'got "b"'),
        ({"instances": [{"tag": "a"}, "b"]}, 'got both: row 1 is "b"'),
        ({"instances": ["a", {"tag": "b"}]}, "got both: row 1"),
        ({"instances": [{"tag": "a"}, {"tags": "b"}]}, 'row 1 has ["tags"]'),
        ({"instances": [{"tag": "a", "more": 1}]}, 'row 0 has ["more","tag"]'),
        ({"instances": [{"b64": "!"}]}, "'tag' is not valid base64"),
        ({"instances": [{"tag": {"b64": 1}}]}, "the one key 'b64'"),
        ({"inputs": {"tags": ["b"]}}, 'must have tag, got ["tags"]'),
        ({"instances": ["a" * 500 + "b", 1, 2]}, "got 1."),
        ({"instances": [{"x": "a" * 500}]}, "row 0 has"),
        ("[" * 100 + "1" + "]" * 100, "must be a JSON object, got [[[["),
        ('{"instances": ' + "[" * 40 + '"a"' + "]" * 40 + "}", "more than 32 dimensions"),
    ],
)
def test_what_is_refused(body, message):
    with pytest.raises(InvalidRequest) as refusal:
        decode(body, tag=tf.string)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_several_inputs_need_names():
    with pytest.raises(InvalidRequest, match="objects with the inputs tag, n"):
        decode({"instances": ["a"]}, tag=tf.string, n=tf.int32)
    with pytest.raises(InvalidRequest, match="an object with tag, n"):
        decode({"inputs": ["a"]}, tag=tf.string, n=tf.int32)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (tf.bool, [True, False]),
        (tf.int8, [-128, 127]),
        (tf.int32, [-(2**31), 2**31 - 1]),
        (tf.int64, [-(2**63), 2**63 - 1]),
        (tf.uint64, [0, 2**64 - 1]),
        (tf.float32, [0.5, 1, -3e38]),
        (tf.half, [0.5, 1]),
    ],
)
def test_numbers_keep_their_dtype_and_value(dtype, values):
    array = decode({"instances": values}, x=dtype)["x"]
    assert array.dtype == dtype.as_numpy_dtype
    assert array.tolist() == np.array(values, array.dtype).tolist()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (tf.int32, "1.0"),
        (tf.int32, "true"),
        (tf.int32, "2147483648"),
        (tf.int8, "128"),
        (tf.uint64, "-1"),
        (tf.bool, "1"),
        (tf.float32, "true"),
        (tf.float32, '"1"'),
        (tf.float32, "16777217"),  # 2 ** 24 + 1
        (tf.float32, "1e39"),
        (tf.float64, "9007199254740993"),
        (tf.float64, "1" + "0" * 400),
        (tf.complex64, "1"),
    ],
)
def test_a_value_of_another_type_is_refused(dtype, value):
    with pytest.raises(InvalidRequest, match="'x'"):
        decode(f'{{"instances": [{value}]}}', x=dtype)


def test_not_a_number_and_infinity_go_in_and_out():
    array = decode('{"instances": [NaN, Infinity, -Infinity]}', x=tf.float32)["x"]
    assert np.isnan(array[0])
    assert array[1:].tolist() == [np.inf, -np.inf]
    assert (
        rest_codec.encode_outputs({"x": array}, True) == b'{"predictions":[NaN,Infinity,-Infinity]}'
    )


def test_outputs_by_row_and_by_column():
    outputs = {"score": np.array([[1, 0.5]], np.float32), "id": strings(b"a", b"b").reshape(1, 2)}
    rows = [{"id": ["a", "b"], "score": [1.0, 0.5]}]
    assert encode(True, **outputs) == {"predictions": rows}
    assert encode(False, **outputs) == {"outputs": {"id": [["a", "b"]], "score": [[1.0, 0.5]]}}
    assert encode(True, id=outputs["id"]) == {"predictions": [["a", "b"]]}
    assert encode(False, n=np.array(3)) == {"outputs": 3}
    assert encode(True, n=np.zeros((0, 2)), m=np.zeros((0, 1))) == {"predictions": []}
    assert encode(False, n=np.zeros((2, 0, 3)), m=strings()) == {
        "outputs": {"n": [[], []], "m": []}
    }


def test_texts_are_escaped_and_bytes_are_base64():
    awkward = strings(b'a"\\\n\x00', "ñ日".encode(), b"")
    assert encode(True, id=awkward) == {"predictions": ['a"\\\n\x00', "ñ日", ""]}
    assert encode(True, id_bytes=strings(b"\xff", b"a")) == {
        "predictions": [{"b64": "/w=="}, {"b64": "YQ=="}]
    }
    assert encode(True, id=strings(b"\xff", b"a")) == {"predictions": [{"b64": "/w=="}, "a"]}
    halves = strings(b"\xc3", b"\xb1")  # valid text only when taken together
    assert encode(True, id=halves) == {"predictions": [{"b64": "ww=="}, {"b64": "sQ=="}]}


def test_outputs_without_common_rows_go_by_column_only():
    outputs = {"a": np.zeros(2), "b": np.zeros(3)}
    with pytest.raises(InvalidRequest, match="ask by column"):
        rest_codec.encode_outputs(outputs, True)
    with pytest.raises(InvalidRequest, match="ask by column"):
        rest_codec.encode_outputs({"a": np.array(1.0)}, True)
    assert encode(False, **outputs) == {"outputs": {"a": [0.0, 0.0], "b": [0.0, 0.0, 0.0]}}
    with pytest.raises(InvalidRequest, match="complex128"):
        rest_codec.encode_outputs({"a": np.zeros(1, complex)}, True)


def test_float32_is_written_shortest_and_read_back_exactly():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=5000), 10.0 ** rng.uniform(-40, 38, 5000), [0.1, -0.0, 1 / 3, 16777216]]
    ).astype(np.float32)
    text = rest_codec.encode_outputs({"x": values}, True)
    read = np.array(json.loads(text)["predictions"])
    np.testing.assert_array_equal(read.astype(np.float32), values)
    usual = np.abs(values) < 1e6
    usual &= np.abs(values) > 1e-11
    longest = [len(np.format_float_scientific(value).split("e")[0]) for value in values[usual]]
    written = [len(np.format_float_scientific(value).split("e")[0]) for value in read[usual]]
    assert (np.array(written) <= np.array(longest) + 1).all()
    assert (np.array(written) > np.array(longest)).mean() < 0.01
    assert rest_codec.encode_outputs({"x": values[-4:-1]}, True) == (
        b'{"predictions":[0.1,-0.0,0.33333334]}'
    )


def test_half_precision_is_written_too():
    values = np.array([0.1, 65504], np.float16)
    assert np.array(encode(True, x=values)["predictions"], np.float16).tolist() == values.tolist()
    bfloat16 = tf.bfloat16.as_numpy_dtype
    read = np.array(encode(True, x=np.array([0.1, 3e38], bfloat16))["predictions"]).astype(bfloat16)
    assert read.tolist() == np.array([0.1, 3e38], bfloat16).tolist()


def test_status():
    statuses = [VersionStatus(7, State.AVAILABLE), VersionStatus(6, State.END, "INTERNAL", "bad")]
    assert json.loads(rest_codec.encode_status(statuses)) == {
        "model_version_status": [
            {
                "version": "7",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            },
            {
                "version": "6",
                "state": "END",
                "status": {"error_code": "INTERNAL", "error_message": "bad"},
            },
        ]
    }


def test_metadata():
    proto = meta_graph_pb2.SignatureDef(method_name="tensorflow/serving/predict")
    proto.inputs["x"].name = "x:0"
    proto.inputs["x"].dtype = types_pb2.DT_FLOAT
    proto.inputs["x"].tensor_shape.dim.add().size = -1
    described = json.loads(rest_codec.encode_metadata("m", 5, {"serving_default": proto}))
    assert described["model_spec"] == {"name": "m", "signature_name": "", "version": "5"}
    of_default = described["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert of_default["method_name"] == "tensorflow/serving/predict"
    assert of_default["inputs"]["x"] == {
        "dtype": "DT_FLOAT",
        "name": "x:0",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
    }


def test_an_answer_is_not_written_to_its_end_after_the_deadline():
    outputs = {"x": np.zeros(3)}
    for by_row in (True, False):
        with pytest.raises(DeadlineExceeded):
            rest_codec.encode_outputs(outputs, by_row, time.monotonic() - 1)


def test_rows_are_counted_before_they_are_read():
    by_rows = dataclasses.replace(signature(x=tf.string), by_rows=True)
    for body in (
        b'{"instances": [1, 2, 3]}',
        b'{"inputs": [1, 2, 3]}',
        b'{"inputs": {"x": [1, 2, 3]}}',
    ):
        with pytest.raises(InvalidRequest, match="at most 2 rows, got 3"):
            rest_codec.decode_inputs(rest_codec.parse_predict(body), by_rows, 2)


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b"[" + b"1," * 19 + b"1]", 20),
        (b"[" + b"[]," * 9 + b"1]", 19),
        (b"{" + b",".join(b'"%d":1' % number for number in range(19)) + b"}", 19),
        (b'["' + b",[{" * 50 + b'\\", \\\\",' + b"1," * 17 + b"1]", 19),
    ],
)
def test_values_are_counted_before_they_are_read(body, values, monkeypatch):
    expected = rest_codec.parse(body)
    monkeypatch.setattr(rest_codec, "_BLOCK", 7)  # in blocks it is the same
    monkeypatch.setattr(rest_codec, "MAX_VALUES", values)
    assert rest_codec.parse(body) == expected
    monkeypatch.setattr(rest_codec, "MAX_VALUES", values - 1)
    with pytest.raises(ValueError, match=f"more than {values - 1} values"):
        rest_codec.parse(body)
