"""Both servers together: slow requests, overload, leaving clients, shutting down, processes."""

import asyncio
import contextlib
import datetime
import ipaddress
import itertools
import json
import logging
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from gated_model import GatedModel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running_server import READY_SECONDS, running
from tensorflow_serving.apis import (
    model_management_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving import server, workers
from serving.monitoring.logs import REQUESTS
from serving.settings import ServeConfig

ROOT = Path(__file__).parents[2]
PREDICT = "/v1/models/gated:predict"
SECONDS = 30  # far longer than anything here takes


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A model whose answers wait for a gate, and the directory of its version."""
    model = GatedModel()
    models = tmp_path_factory.mktemp("gated")
    (models / "gated").mkdir()
    model.save(models / "gated" / "1")
    model.models = models
    yield model
    model.gate.set()


@pytest.fixture
def slow(gated):
    """A server where one request runs at a time and one may wait; its gate starts closed."""
    settings = {"num_batch_threads": 1, "max_batch_size": 1, "max_enqueued_batches": 1}
    with running(gated.models, poll_seconds=0.05, **settings) as place:
        place.gate = gated
        gated.close_gate()
        yield place
        gated.gate.set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def request_for(*values):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "gated"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.array(values, np.float32)))
    return request


def fill(place, pool):
    """One request in the model and one in the queue, from two clients."""
    first = pool.submit(place.post, PREDICT, {"instances": [1.0]})
    assert place.gate.arrived.acquire(timeout=SECONDS)
    second = pool.submit(place.prediction.Predict, request_for(2.0))
    until(place, "twotower_queue_depth 1.0")
    return first, second


@contextlib.contextmanager
def ending(place):
    """Ends a lame duck also where a test fails."""
    try:
        yield
    finally:
        place.stop()


def until(place, line):
    """Waits for a line of the metrics."""
    waiting = threading.Event()
    for _ in range(SECONDS * 100):
        if line in place.get("/monitoring/prometheus/metrics").body.decode().splitlines():
            return
        waiting.wait(0.01)
    raise AssertionError(f"{line} did not appear")


def test_overload_is_refused_at_once(slow, pool):
    first, second = fill(slow, pool)
    answer = slow.post(PREDICT, {"instances": [3.0]})
    assert (answer.status, "try again later" in answer.error) == (503, True)
    assert answer.headers["retry-after"] == "1"
    with pytest.raises(grpc.RpcError) as refused:
        slow.prediction.Predict(request_for(4.0))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert slow.get("/healthz").status == 200
    slow.gate.gate.set()
    assert first.result(SECONDS).json == {"predictions": [1.0]}
    assert tf.make_ndarray(second.result(SECONDS).outputs["y"]).tolist() == [2.0]


def test_deadlines_pass_while_a_request_waits(slow, pool):
    first = pool.submit(slow.post, PREDICT, {"instances": [1.0]})
    assert slow.gate.arrived.acquire(timeout=SECONDS)
    answer = slow.post(PREDICT, {"instances": [2.0]}, **{"X-Timeout-Ms": "30"})
    assert (answer.status, "deadline" in answer.error) == (504, True)
    with pytest.raises(grpc.RpcError) as refused:
        slow.prediction.Predict(request_for(3.0), timeout=0.03)
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    slow.gate.gate.set()
    assert first.result(SECONDS).status == 200
    assert slow.post(PREDICT, {"instances": [4.0]}).json == {"predictions": [4.0]}
    assert slow.gate.arrived.acquire(timeout=SECONDS)  # of the last one, and of no other
    assert not slow.gate.arrived.acquire(blocking=False)


def test_the_services_own_deadline(gated):
    with running(gated.models, poll_seconds=0.05, deadline_ms=50) as place:
        gated.close_gate()
        answer = place.post(PREDICT, {"instances": [1.0]}, **{"X-Timeout-Ms": "60000"})
        with pytest.raises(grpc.RpcError) as refused:
            place.prediction.Predict(request_for(1.0))
        gated.gate.set()
    assert answer.status == 504
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_clients_that_leave_give_up_their_place(slow, pool):
    first = pool.submit(slow.post, PREDICT, {"instances": [1.0]})
    assert slow.gate.arrived.acquire(timeout=SECONDS)
    body = b'{"instances": [2.0]}'
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((slow.host, slow.rest_port)) as connection:
        connection.sendall(head.encode() + body)
        until(slow, "twotower_queue_depth 1.0")
    until(slow, 'twotower_requests_total{api="predict",model="gated",status="CANCELLED"} 1.0')
    call = slow.prediction.Predict.future(request_for(3.0))  # there is room for it again
    until(slow, 'twotower_stage_seconds_count{api="predict",model="gated",stage="decode"} 3.0')
    call.cancel()
    until(slow, 'twotower_requests_total{api="predict",model="gated",status="CANCELLED"} 2.0')
    slow.gate.gate.set()
    assert first.result(SECONDS).status == 200
    assert slow.post(PREDICT, {"instances": [4.0]}).json == {"predictions": [4.0]}
    assert slow.gate.arrived.acquire(timeout=SECONDS)
    assert not slow.gate.arrived.acquire(blocking=False)  # nothing ran for those who left


def test_stopping_ends_what_runs_and_takes_nothing_new(gated, pool):
    with running(gated.models, poll_seconds=0.05) as place:
        gated.close_gate()
        running_one = pool.submit(place.post, PREDICT, {"instances": [1.0]})
        assert gated.arrived.acquire(timeout=SECONDS)
        place.stop()
        until(place, "twotower_ready 0.0")
        assert place.get("/readyz").status == 503
        assert place.get("/healthz").status == 200
        answer = place.post(PREDICT, {"instances": [2.0]})
        assert (answer.status, "shutting down" in answer.error) == (503, True)
        with pytest.raises(grpc.RpcError) as refused:
            place.prediction.Predict(request_for(3.0))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        gated.gate.set()
        assert running_one.result(SECONDS).json == {"predictions": [1.0]}
        place.wait_until_stopped()
        with pytest.raises(OSError, match="refused"):
            place.get("/healthz")


def test_a_leaving_server_is_not_ready_and_answers_on(gated):
    settings = {"poll_seconds": 0.05, "lame_duck_seconds": SECONDS * 10}
    with running(gated.models, **settings) as place, ending(place):
        place.stop()
        until(place, "twotower_ready 0.0")
        assert place.get("/readyz").status == 503
        health = health_pb2_grpc.HealthStub(place.channel)
        told = health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
        assert told == health_pb2.HealthCheckResponse.NOT_SERVING
        assert place.post(PREDICT, {"instances": [1.0]}).json == {"predictions": [1.0]}
        assert place.prediction.Predict(request_for(2.0), timeout=SECONDS).outputs
        place.stop()
        place.wait_until_stopped()


def test_reloads_that_wait_hold_up_neither_a_right_one_nor_the_end(small, tmp_path, pool):
    shutil.copytree(small.version, tmp_path / "twotower" / "1")
    half_copied = tmp_path / "twotower" / "2"
    shutil.copytree(small.version / "assets.extra", half_copied / "assets.extra")
    with running(tmp_path, poll_seconds=0.05) as place:
        waiting = [pool.submit(reload_to, place, 2) for _ in range(8)]
        until(place, 'twotower_version_state{model="twotower",version="2"} 10.0')
        ended = as_completed(waiting, SECONDS)  # which of them came last is not known
        for one in itertools.islice(ended, 7):
            assert one.exception().code() == grpc.StatusCode.ABORTED
        reload_to(place, 1)
        assert next(ended).exception().code() == grpc.StatusCode.ABORTED
        last = pool.submit(reload_to, place, 2)
        place.stop()
        place.wait_until_stopped()
        assert last.exception(SECONDS).code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
        )


def reload_to(place, version):
    request = model_management_pb2.ReloadConfigRequest()
    config = request.config.model_config_list.config.add(name="twotower")
    config.model_version_policy.specific.versions.append(version)
    place.models.HandleReloadConfigRequest(request, timeout=SECONDS * 10)


def test_a_second_signal_does_not_wait(gated, pool):
    with running(gated.models, poll_seconds=0.05, drain_seconds=SECONDS * 10) as place:
        gated.close_gate()
        left = pool.submit(place.post, PREDICT, {"instances": [1.0]})
        assert gated.arrived.acquire(timeout=SECONDS)
        place.stop()
        until(place, "twotower_ready 0.0")
        place.stop()
        failure = left.exception(SECONDS)
        assert failure or left.result().status == 500
        gated.gate.set()  # the batch itself cannot be interrupted
        place.wait_until_stopped()


def test_a_port_in_use_is_an_error_of_one_line(gated):
    with running(gated.models, poll_seconds=0.05) as other:
        taken = {"rest_port": other.rest_port, "grpc_port": int(other.grpc.split(":")[1])}
        for field, port in taken.items():
            config = ServeConfig(str(gated.models), **{"rest_port": 0, "grpc_port": 0, field: port})
            at_once = asyncio.Queue()
            at_once.put_nowait(signal.SIGTERM)  # if it can listen after all, it does not stay
            with pytest.raises(ValueError, match=rf"cannot listen on .*--{field}") as error:
                asyncio.run(server.run(config, at_once, print))
            assert "\n" not in str(error.value)
        assert other.get("/readyz").status == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 that signs itself, and its key: PEM files."""
    x509 = pytest.importorskip("cryptography.x509", reason="it makes the certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder().issuer_name(name).subject_name(name).serial_number(1)
    builder = builder.public_key(key.public_key()).not_valid_before(now)
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    signed = builder.sign(key, hashes.SHA256())
    files = tmp_path_factory.mktemp("tls") / "cert.pem", tmp_path_factory.mktemp("tls") / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return tuple(map(str, files))


def test_rest_and_grpc_by_tls(gated, certificate):
    settings = {"tls_certificate": certificate[0], "tls_key": certificate[1]}
    with running(gated.models, poll_seconds=0.05, **settings) as place:
        assert place.rest.startswith("https://")
        trusted = ssl.create_default_context(cafile=certificate[0])
        with urllib.request.urlopen(f"{place.rest}/healthz", context=trusted) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            place.get("/healthz")
        credentials = grpc.ssl_channel_credentials(Path(certificate[0]).read_bytes())
        with grpc.secure_channel(place.grpc, credentials) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            assert stub.Predict(request_for(2.0), timeout=SECONDS).outputs
        with pytest.raises(grpc.RpcError):
            place.prediction.Predict(request_for(2.0), timeout=1)


def test_a_certificate_that_is_none_is_told_in_one_line(gated, certificate, tmp_path):
    (tmp_path / "key.pem").write_text("no key")
    for key in (tmp_path / "none.pem", tmp_path / "key.pem"):
        settings = {"tls_certificate": certificate[0], "tls_key": str(key)}
        config = ServeConfig(str(gated.models), rest_port=0, grpc_port=0, **settings)
        with pytest.raises(ValueError, match="must be PEM files that belong together") as error:
            asyncio.run(server.run(config, asyncio.Queue(), print))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be given together"):
        ServeConfig("models", tls_key="key.pem")


@pytest.mark.parametrize(("token", "warned"), [("", True), ("s3cret", False)])
def test_a_server_that_is_open_warns_and_one_that_cannot_start_leaves_nothing(
    gated, capsys, token, warned
):
    root, mask = logging.getLogger(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    before = root.handlers, list(logging.getLogger(REQUESTS).filters)
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        config = ServeConfig(str(gated.models), host="0.0.0.0", rest_port=port, token=token)
        with pytest.raises(ValueError, match=r"REST API cannot listen on .* --rest_port"):
            workers.serve(config)
    assert ("set $TWOTOWER_TOKEN" in capsys.readouterr().out) == warned
    assert (root.handlers, logging.getLogger(REQUESTS).filters) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_an_address_of_another_machine(small):
    config = ServeConfig(str(small.models), host="192.0.2.1", rest_port=0, grpc_port=0)
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1"):
        asyncio.run(server.run(config, asyncio.Queue(), print))


START = """
import logging
import sys
from serving.settings import ServeConfig
from serving.workers import serve
logging.getLogger("serving").setLevel(logging.INFO)  # as the command `twotower` does
config = ServeConfig(sys.argv[1], rest_port=int(sys.argv[2]), grpc_port=0, lame_duck_seconds=0)
sys.exit(serve(config))
"""


def start(models, port=0):
    """A server in its own process, and where its REST API is."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(models), str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    for line in process.stdout:
        if line.startswith("Serving "):
            break
    else:
        raise AssertionError(f"the server ended with {process.wait()}")
    return process, line.split("REST ")[1].split(",")[0]


def ask(address):
    body = json.dumps({"instances": ["query 0"]}).encode()
    request = urllib.request.Request(f"{address}/v1/models/twotower:predict", body)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["predictions"][0]["candidate_id"]


@pytest.mark.long
def test_a_process_ends_well_on_sigterm(small):
    process, address = start(small.models)
    with process:
        assert ask(address) == small.sample.best_ids(0)[:40]
        process.send_signal(signal.SIGTERM)
        assert process.wait(READY_SECONDS) == 0
        rest = process.stdout.read()
    assert "Stopping" in rest
    assert "Traceback" not in rest


@pytest.mark.long
@pytest.mark.clock  # ports
def test_a_killed_process_starts_again_on_its_port(small):
    process, address = start(small.models)
    with process:
        assert ask(address)
        process.kill()
    process, again = start(small.models, int(address.rsplit(":", 1)[1]))
    with process:
        assert again == address
        assert ask(again) == small.sample.best_ids(0)[:40]
        process.send_signal(signal.SIGINT)
        assert process.wait(READY_SECONDS) == 0
