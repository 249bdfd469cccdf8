"""Attacks at the limits of the configuration: the service stays alive, small, and right."""

import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
)

from benchmarks import load
from benchmarks.service import synthetic_bundle
from serving.publish.publish import publish

pytestmark = pytest.mark.soak

SECONDS, CLIENTS = 60, 4
CANDIDATES, QUERIES, DIMENSIONS = 15_000, 2_000, 64
SCRIPT = Path(__file__).parent.parent / "support" / "attack_client.py"

FULL = {"429", "503", "504"}  # of REST, where others have come first
ANSWERED = {"200", *FULL}
REFUSED = {
    "ids by allowed, just": ANSWERED,
    "ids by excluded, just": ANSWERED,
    "rows by k, just": ANSWERED,
    "all rows": ANSWERED,
    "too large": {"413"},
    "inflated too far": {"413", "429", "504"},
    "long version": {"400", "404"},
    "longer version": {"400", "404"},
    "slow connections": {"ended"},
    "PredictionService-Predict-gzip-just": {"INVALID_ARGUMENT", "DEADLINE_EXCEEDED"},
    "PredictionService-Predict-gzip-above": {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"},
    "PredictionService-Predict-plain-rows": {"INVALID_ARGUMENT", "DEADLINE_EXCEEDED"},
    "PredictionService-Predict-plain-product": {"INVALID_ARGUMENT", "DEADLINE_EXCEEDED"},
    "ModelService-GetModelStatus-plain-all": {"OK", "DEADLINE_EXCEEDED"},
    "ModelService-HandleReloadConfigRequest-plain-half": {
        *("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND", "FAILED_PRECONDITION")
    },
}


def predict_request(value, shape):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "twotower"
    tensor = request.inputs["query_id"]
    tensor.dtype = tf.string.as_datatype_enum
    tensor.string_val.append(value)
    tensor.tensor_shape.dim.add().size = shape
    return request


def reload_request(number):
    request = model_management_pb2.ReloadConfigRequest()
    policy = f"model_version_policy {{ specific {{ versions: {number} }} }}"
    text_format.Parse(
        f'model_config_list {{ config {{ name: "twotower" {policy} }} }}', request.config
    )
    return request


def write_messages(path):
    """What the clients send by gRPC: SERVICE-METHOD-COMPRESSION-NAME."""
    path.mkdir()
    status = get_model_status_pb2.GetModelStatusRequest()
    status.model_spec.name = "twotower"
    for name, request in {
        "PredictionService-Predict-gzip-just": predict_request(b"x" * (15 << 20), 1),
        "PredictionService-Predict-gzip-above": predict_request(b"x" * (60 << 20), 1),
        "PredictionService-Predict-plain-rows": predict_request(b"x" * 30_000, 1 << 18),
        "PredictionService-Predict-plain-product": predict_request(b"x" * 3_000_000, 6400),
        "ModelService-GetModelStatus-plain-all": status,
        "ModelService-HandleReloadConfigRequest-plain-half": reload_request(2),
    }.items():
        (path / name).write_bytes(request.SerializeToString())
    return path


def predicted(server):
    connection = http.client.HTTPConnection(*server.rest, timeout=30)
    body = {"instances": [f"query {row}" for row in range(20)]}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/models/twotower:predict", json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def client(server, what, seconds, messages, is_slow=False):
    arguments = [what, *map(str, server.rest), server.grpc, str(seconds), str(messages)]
    arguments += ["slow" if is_slow else "-", str(server.pid)]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True
    )


def told(process):
    output, _ = process.communicate(timeout=SECONDS + 300)
    assert process.returncode == 0
    return json.loads(output)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A version, one that is half copied, and directories that are called absurdly."""
    root, rng = tmp_path_factory.mktemp("attacked"), np.random.default_rng(0)
    vectors, queries = (
        rng.normal(size=(rows, DIMENSIONS)).astype(np.float32) for rows in (CANDIDATES, QUERIES)
    )
    version = publish(synthetic_bundle(root, vectors, queries), root / "models")
    shutil.copytree(version, version.parent / "2", ignore=shutil.ignore_patterns("variables"))
    for digits in (19, 20, 250):
        (version.parent / ("9" * digits)).mkdir()
    return root / "models"


def test_under_attack_a_service_is_alive_and_small_and_right_afterwards(models, tmp_path):
    messages = write_messages(tmp_path / "messages")
    with load.served(models, "--state_dir", str(tmp_path)) as server:
        before = predicted(server)
        assert before[0] == 200
        probing = client(server, "probe", SECONDS + 4, messages)
        time.sleep(2.0)
        attacking = [
            client(server, "attack", SECONDS, messages, is_slow=number == 0)
            for number in range(CLIENTS)
        ]
        codes = [told(one) for one in attacking]
        seen = told(probing)
        status, after = predicted(server)
        with grpc.insecure_channel(server.grpc) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            stub.HandleReloadConfigRequest(reload_request(1), timeout=30.0)
    milliseconds, megabytes = np.array(seen["milliseconds"]), np.array(seen["megabytes"])
    growth = megabytes.max() - megabytes[0]
    print(
        f"/healthz of {len(milliseconds)}: p50 {np.median(milliseconds):.1f} ms, "
        f"p99 {np.percentile(milliseconds, 99):.0f} ms, most {milliseconds.max():.0f} ms; "
        f"memory {megabytes[0]:.0f} MB, +{growth:.0f} MB at most, "
        f"+{megabytes[-1] - megabytes[0]:.0f} MB at the end"
    )
    for counts in codes:
        print(json.dumps(counts))
    for counts in codes:
        for name, found in counts.items():
            assert set(found) <= REFUSED.get(name, {"400", "429", "504"}), (name, found)
    assert codes[0]["slow connections"]["ended"] == 50
    assert (status, after) == before
    assert np.percentile(milliseconds, 99) <= 250
    assert milliseconds.max() <= 1000
    assert growth < 300
