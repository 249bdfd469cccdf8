"""The gRPC API over a real channel, asked with the stubs of tensorflow-serving-api."""

import gzip
import json
import shutil
import subprocess
import sys
import zlib

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running_server import running
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from serving.rpc import guard as grpc_guard
from serving.version.names import State

Code, Gzip = grpc.StatusCode, grpc.Compression.Gzip
TOKENS = "s3cret", "adm1n"  # of the guarded server


def request_for(*ids, name="twotower", **spec):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    if "version" in spec:
        request.model_spec.version.value = spec.pop("version")
    for key, value in spec.items():
        setattr(request.model_spec, key, value)
    if ids:
        request.inputs["query_id"].CopyFrom(tf.make_tensor_proto(list(ids)))
    return request


def refusal(call, *arguments, **settings):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **settings)
    return error.value.code(), error.value.details()


def test_predict(server, small):
    response = server.prediction.Predict(request_for("query 0", "query 7", "nobody"))
    assert response.model_spec.name == "twotower"
    assert response.model_spec.version.value == 1
    assert response.model_spec.signature_name == "serving_default"
    ids = tf.make_ndarray(response.outputs["candidate_id"])
    scores = tf.make_ndarray(response.outputs["score"])
    assert (ids.shape, scores.shape, scores.dtype) == ((3, 40), (3, 40), np.float32)
    for row, number in enumerate((0, 7)):
        assert [one.decode() for one in ids[row]] == small.sample.best_ids(number)[:40]
        best = small.sample.vectors @ small.sample.queries[number]
        np.testing.assert_allclose(scores[row], np.sort(best)[::-1][:40], rtol=1e-5)
    assert set(ids[2]) == {b""}
    assert len(response.outputs["candidate_id"].string_val) == 120
    assert len(response.outputs["score"].float_val) == 120


@pytest.mark.long
def test_a_client_of_another_server(server, small):
    """`ovmsclient`, of OpenVINO Model Server, by gRPC and HTTP; its messages are its own build."""
    script = """
import json, sys
import ovmsclient
for make, address in zip((ovmsclient.make_grpc_client, ovmsclient.make_http_client), sys.argv[1:]):
    client = make(address)
    outputs = client.predict({"query_id": ["query 0", "nobody"]}, "twotower", 1)
    ids = [[getattr(id, "decode", lambda: id)() for id in row] for row in outputs["candidate_id"]]
    print(json.dumps({
        "ids": ids,
        "scores": outputs["score"].tolist(),
        "status": client.get_model_status("twotower", 1)[1]["state"],
    }))
print(json.dumps(ovmsclient.make_grpc_client(sys.argv[1]).get_model_metadata("twotower", 1)))
"""
    addresses = server.grpc, server.rest.split("//")[1]
    run = [sys.executable, "-c", script, *addresses]
    answered = subprocess.run(
        run, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    ).stdout
    by_grpc, by_http, metadata = map(json.loads, answered.splitlines())
    assert by_grpc["ids"] == by_http["ids"]
    assert by_grpc["ids"] == [small.sample.best_ids(0)[:40], [""] * 40]
    best = np.sort(small.sample.vectors @ small.sample.queries[0])[::-1][:40]
    for answer in (by_grpc, by_http):
        np.testing.assert_allclose(answer["scores"][0], best, rtol=1e-5)
        assert answer["status"] == "AVAILABLE"
    assert metadata["inputs"] == {"query_id": {"shape": [-1], "dtype": "DT_STRING"}}


def test_version_signature_and_output_filter(server, small):
    request = request_for("query 5", version=1, signature_name="query_embedding")
    request.output_filter.append("embedding")
    response = server.prediction.Predict(request)
    assert list(response.outputs) == ["embedding"]
    embedding = tf.make_ndarray(response.outputs["embedding"])
    np.testing.assert_array_equal(embedding, small.sample.queries[5:6])
    request = request_for(signature_name="embedding_search")
    request.inputs["embedding"].CopyFrom(tf.make_tensor_proto(embedding))
    rows = tf.make_ndarray(server.prediction.Predict(request).outputs["candidate_row"])
    assert rows[0].tolist() == small.sample.best(5)[:40]
    values = request.inputs["embedding"]
    values.float_val.extend(embedding[0].tolist())
    values.tensor_content = b""
    rows = tf.make_ndarray(server.prediction.Predict(request).outputs["candidate_row"])
    assert rows[0].tolist() == small.sample.best(5)[:40]


def with_input(dtype, shape, **fields):
    request = request_for()
    tensor = request.inputs["query_id"]
    tensor.dtype = dtype
    for size in shape:
        tensor.tensor_shape.dim.add().size = size
    for name, values in fields.items():
        getattr(tensor, name).extend(values)
    return request


def test_the_last_value_is_repeated(server, small):
    request = with_input(types_pb2.DT_STRING, [3], string_val=[b"query 0", b"query 1"])
    ids = tf.make_ndarray(server.prediction.Predict(request).outputs["candidate_id"])
    assert [row[0].decode() for row in ids] == [
        small.sample.best_ids(number)[0] for number in (0, 1, 1)
    ]


def test_no_rows_give_no_rows(server):
    response = server.prediction.Predict(with_input(types_pb2.DT_STRING, [0]))
    assert tf.make_ndarray(response.outputs["score"]).shape == (0, 40)


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (predict_pb2.PredictRequest(), Code.INVALID_ARGUMENT, "model_spec must name a model"),
        (request_for("a", name="other"), Code.NOT_FOUND, "'other'"),
        (request_for("a", name="../other"), Code.NOT_FOUND, "'../other'"),
        (request_for("a", version=9), Code.NOT_FOUND, "Version 9"),
        (request_for("a", version=-9), Code.NOT_FOUND, "Version -9"),
        (request_for("a", version_label="canary"), Code.INVALID_ARGUMENT, "canary"),
        (request_for("a", signature_name="no"), Code.FAILED_PRECONDITION, "'no'"),
        (request_for(), Code.INVALID_ARGUMENT, "takes 'query_id': string [any], got inputs none"),
        (with_input(types_pb2.DT_INT64, [1], int64_val=[1]), Code.INVALID_ARGUMENT, "string"),
        (with_input(types_pb2.DT_STRING, [1, 1]), Code.INVALID_ARGUMENT, "[any]"),
        (with_input(types_pb2.DT_STRING, [], string_val=[b"a"]), Code.INVALID_ARGUMENT, "[any]"),
        (with_input(types_pb2.DT_STRING, [10**12]), Code.INVALID_ARGUMENT, "rows"),
        (with_input(types_pb2.DT_STRING, [250_000]), Code.INVALID_ARGUMENT, "rows"),
        (with_input(0, [1]), Code.INVALID_ARGUMENT, "dtype 0"),
    ],
)  # fmt: skip
def test_what_is_refused(server, request_, code, message):
    got, details = refusal(server.prediction.Predict, request_)
    assert (got, message in details) == (code, True), details


def test_more_than_one_fault_in_a_request(server):
    request = request_for("a")
    request.inputs["other"].CopyFrom(tf.make_tensor_proto([1.0]))
    code, details = refusal(server.prediction.Predict, request)
    assert (code, "'other'" in details) == (Code.INVALID_ARGUMENT, True)
    request = request_for("a")
    request.output_filter.append("scores")
    code, details = refusal(server.prediction.Predict, request)
    assert (code, "output_filter" in details) == (Code.INVALID_ARGUMENT, True)


def test_bytes_that_are_no_message(server):
    call = server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    code, details = refusal(call, b"\xff\xff\xff")
    assert (code, "protocol buffer" in details) == (Code.INVALID_ARGUMENT, True)
    assert server.prediction.Predict(request_for("query 0")).outputs


def test_a_message_above_the_limit(server):
    code, _ = refusal(server.prediction.Predict, request_for("x" * (1 << 20)))
    assert code == Code.RESOURCE_EXHAUSTED
    assert server.prediction.Predict(request_for("query 0")).outputs


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_message_is_inflated_up_to_the_limit(server, compression):
    predict = server.prediction.Predict
    plain = predict(request_for("query 0", "query 1"))
    assert predict(request_for("query 0", "query 1"), compression=compression) == plain
    code, details = refusal(predict, request_for("x" * (3 << 20)), compression=compression)
    assert (code, "1 MB" in details) == (Code.RESOURCE_EXHAUSTED, True)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_a_compressed_message_is_one_whole_stream(server, compress):
    path = "/tensorflow.serving.PredictionService/Predict"
    predict = server.channel.unary_unary(path, None, predict_pb2.PredictResponse.FromString)
    request = request_for("query 0")
    request.output_filter.append("score")
    packed = compress(request.SerializeToString())
    assert set(predict(packed).outputs) == {"score"}
    for damaged in (packed[:-1], packed + b"x", packed + packed):
        code, details = refusal(predict, damaged)
        assert (code, "one whole protocol buffer" in details) == (Code.INVALID_ARGUMENT, True)


def test_more_calls_than_may_be_under_way_are_refused(server, monkeypatch):
    monkeypatch.setattr(grpc_guard, "MAX_CALLS", 0)
    code, details = refusal(server.prediction.Predict, request_for("query 0"))
    assert (code, "under way" in details) == (Code.RESOURCE_EXHAUSTED, True)
    health = health_pb2_grpc.HealthStub(server.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == 1


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Classify", classification_pb2.ClassificationRequest()),
        ("Regress", regression_pb2.RegressionRequest()),
        ("MultiInference", inference_pb2.MultiInferenceRequest()),
    ],
)
def test_methods_on_examples(server, method, request_):
    code, details = refusal(getattr(server.prediction, method), request_)
    assert code == Code.UNIMPLEMENTED
    assert details.startswith(f"{method} is not implemented")


def test_metadata(server):
    request = get_model_metadata_pb2.GetModelMetadataRequest(
        model_spec=model_pb2.ModelSpec(name="twotower"), metadata_field=["signature_def"]
    )
    response = server.prediction.GetModelMetadata(request)
    assert response.model_spec.version.value == 1
    described = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(described)
    signature = described.signature_def["serving_default"]
    assert signature.inputs["query_id"].dtype == types_pb2.DT_STRING
    assert set(signature.outputs) == {"candidate_id", "score"}
    for fields in ([], ["signature_def", "other"]):
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=model_pb2.ModelSpec(name="twotower"), metadata_field=fields
        )
        code, details = refusal(server.prediction.GetModelMetadata, request)
        assert (code, "metadata_field" in details) == (Code.INVALID_ARGUMENT, True)


def status(server, name="twotower", version=None):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    rows = server.models.GetModelStatus(request).model_version_status
    return {row.version: (row.state, row.status.error_code) for row in rows}


def test_status(server):
    assert status(server) == status(server, version=1) == {1: (State.AVAILABLE, 0)}
    code, details = refusal(status, server, "other")
    assert (code, "'other'" in details) == (Code.NOT_FOUND, True)
    assert refusal(status, server, "twotower", 9)[0] == Code.NOT_FOUND
    empty = get_model_status_pb2.GetModelStatusRequest()
    assert refusal(server.models.GetModelStatus, empty)[0] == Code.INVALID_ARGUMENT


def test_health(server):
    stub = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    request = health_pb2.HealthCheckRequest(service="other")
    assert refusal(stub.Check, request)[0] == Code.NOT_FOUND
    watching = stub.Watch(health_pb2.HealthCheckRequest())
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()
    watching = stub.Watch(request)
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watching.cancel()


def test_request_ids(server):
    _, call = server.prediction.Predict.with_call(
        request_for("query 0"), metadata=(("x-request-id", "abc-7"),)
    )
    assert dict(call.trailing_metadata())["x-request-id"] == "abc-7"
    _, call = server.prediction.Predict.with_call(request_for("query 0"))
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


def test_token(guarded):
    health = health_pb2_grpc.HealthStub(guarded.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == 1
    predict = guarded.prediction.Predict
    bomb = request_for("x" * (3 << 20))  # above the limit, and never read
    status = get_model_status_pb2.GetModelStatusRequest()
    for wrong in ((), (("authorization", "Bearer s3cre"),), (("authorization", "adm1n"),)):
        code, _ = refusal(predict, bomb, metadata=wrong, compression=Gzip)
        assert code == Code.UNAUTHENTICATED
        code, details = refusal(predict, request_for("query 0"), metadata=wrong)
        assert (code, "Bearer TOKEN" in details) == (Code.UNAUTHENTICATED, True)
        assert refusal(guarded.models.GetModelStatus, status, metadata=wrong)[0] == code
    admin = {"Authorization": "Bearer adm1n"}
    text = guarded.get("/monitoring/prometheus/metrics", **admin).body.decode()
    assert 'twotower_refusals_total{entrypoint="GRPC",reason="unauthenticated"}' in text


def reload(server, text, **settings):
    request = model_management_pb2.ReloadConfigRequest()
    text_format.Parse(f"model_config_list {{ {text} }}", request.config)
    return server.models.HandleReloadConfigRequest(request, timeout=60, **settings)


def test_a_reload_needs_the_admin_token(guarded):
    predict, admin = ({"metadata": (("authorization", f"Bearer {token}"),)} for token in TOKENS)
    for metadata in (predict, admin):
        assert guarded.prediction.Predict(request_for("query 0"), **metadata).outputs
    code, _ = refusal(reload, guarded, 'config { name: "twotower" }', **predict)
    assert code == Code.UNAUTHENTICATED
    reload(guarded, 'config { name: "twotower" }', **admin)


def test_no_client_is_told_a_path(small, tmp_path):
    shutil.copytree(small.version, tmp_path / "twotower" / "1")
    (tmp_path / "twotower" / "2").mkdir()
    (tmp_path / "twotower" / "2" / "manifest.json").write_text("{")
    (tmp_path / "twotower" / "3").mkdir()
    with running(tmp_path, poll_seconds=0.05) as server:
        statuses = server.get("/v1/models/twotower").body.decode()
        assert "twotower/2/manifest.json" in statuses
        told = [statuses]
        for text in (
            'config { name: "absent" }',
            'config { name: "new" base_path: "/etc" }',
            'config { name: "twotower" model_version_policy { specific { versions: 2 } } }',
        ):
            told.append(refusal(reload, server, text)[1])
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "twotower"
        told += [str(server.models.GetModelStatus(request))]
    assert not [one for one in told if str(tmp_path) in one]


def test_roll_back_and_labels_by_a_reload(small, tmp_path):
    for number in (1, 2):
        shutil.copytree(small.version, tmp_path / "twotower" / str(number))
    model = 'config { name: "twotower" base_path: "" '
    both = model + "model_version_policy { specific { versions: 1 versions: 2 } } "
    with running(tmp_path, poll_seconds=0.05) as server:
        newest = server.prediction.Predict(request_for("query 0"))
        assert newest.model_spec.version.value == 2
        answer = reload(server, model + "model_version_policy { specific { versions: 1 } } }")
        assert answer.status.error_code == 0
        rolled_back = server.prediction.Predict(request_for("query 0"))
        assert rolled_back.model_spec.version.value == 1
        assert refusal(server.prediction.Predict, request_for("a", version=2))[0] == Code.NOT_FOUND
        labels = 'version_labels { key: "stable" value: 1 } version_labels { key: "new" value: 2 }'
        reload(server, both + labels + "}")
        for label, number in (("stable", 1), ("new", 2)):
            labelled = server.prediction.Predict(request_for("query 0", version_label=label))
            assert labelled.model_spec.version.value == number
        body = {"query_ids": ["query 0"], "k": 1}
        answer = server.post("/v1/models/twotower/labels/stable:retrieve", body)
        assert answer.json["version"] == 1
        check_reloads_that_are_refused(server, model)
        labelled = server.prediction.Predict(request_for("query 0", version_label="new"))
        assert labelled.model_spec.version.value == 2


def test_the_largest_number_of_a_version(small, tmp_path):
    number = 2**63 - 1
    shutil.copytree(small.version, tmp_path / "twotower" / str(number))
    (tmp_path / "twotower" / str(number + 1)).mkdir()
    (tmp_path / "twotower" / ("9" * 250)).mkdir()
    with running(tmp_path, poll_seconds=0.05) as server:
        response = server.prediction.Predict(request_for("query 0", version=number))
        assert response.model_spec.version.value == number
        answer = server.post(
            f"/v1/models/twotower/versions/{number}:predict", {"instances": ["query 0"]}
        )
        assert answer.status == 200
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "twotower"
        [status] = server.models.GetModelStatus(request).model_version_status
        assert (status.version, status.state) == (number, State.AVAILABLE)


def check_reloads_that_are_refused(server, model):
    """Each changes nothing."""
    for text, code in (
        (model + "model_version_policy { specific { versions: 7 } } }", Code.NOT_FOUND),
        (model + 'version_labels { key: "old" value: 7 } }', Code.NOT_FOUND),
        ('config { name: "absent" }', Code.NOT_FOUND),
        ('config { name: "../etc" }', Code.INVALID_ARGUMENT),
        ('config { name: "twotower" base_path: "/etc" }', Code.INVALID_ARGUMENT),
        ('config { name: "twotower" model_platform: "pytorch" }', Code.INVALID_ARGUMENT),
    ):
        got, details = refusal(reload, server, text)
        assert got == code, (text, details)
    empty = model_management_pb2.ReloadConfigRequest()
    code, details = refusal(server.models.HandleReloadConfigRequest, empty)
    assert (code, "model_config_list" in details) == (Code.INVALID_ARGUMENT, True)


def test_a_zero_byte_at_the_end_of_an_id_makes_another_id(server):
    ids = [b"query 0", b"query 0\0"]
    for shape in (2, 3):
        request = with_input(types_pb2.DT_STRING, [shape], string_val=ids)
        answer = tf.make_ndarray(server.prediction.Predict(request).outputs["candidate_id"])
        assert [bool(row[0]) for row in answer] == [True, False, False][:shape]
    body = {"instances": [one.decode() for one in ids]}
    rows = server.post("/v1/models/twotower:predict", body).json["predictions"]
    assert [bool(row["candidate_id"][0]) for row in rows] == [True, False]
    body = {"query_ids": [one.decode() for one in ids], "unknown_queries": "empty", "k": 2}
    results = server.post("/v1/models/twotower:retrieve", body).json["results"]
    assert [one["known"] for one in results] == [True, False]
    body = {**body, "query_ids": ["query 0"]}
    first = results[0]["candidates"][0]["id"]
    [result] = server.post(
        "/v1/models/twotower:retrieve", {**body, "exclude": [f"{first}\0"]}
    ).json["results"]
    assert result["candidates"][0]["id"] == first
