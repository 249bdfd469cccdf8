"""The service is killed again and again, during load, reloads, arrivals and pruning.

Nothing half-written is taken for finished, and no accepted reload is lost.
"""

import json
import os
import random
import shutil
import signal
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from saved_models import write_affine
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from benchmarks import load
from serving.runtime.configuration import KEPT

pytestmark = pytest.mark.soak

KILLS, SEED, CLIENTS = 20, 10, 3
LONGEST_LIFE = 4.0  # seconds from ready to the kill
FIRST_VERSIONS = 4
FLAGS = ("--poll_seconds", "0.1", "--prune_versions", "3")


class Operator:
    """Puts versions in place file by file, reloads, and knows what was accepted."""

    def __init__(self, library, home, rng):
        self._library, self._home, self._rng = library, home, rng
        self.newest = 0
        self.accepted = None
        self.unanswered = set()  # asked for since
        self.count = 0

    def arrive(self):
        """A new version, slowly: the service sees the half of it."""
        number = self.newest + 1
        source = self._library / str(number)
        write_affine(source, float(number))
        for path in sorted(source.rglob("*"), key=lambda path: path.name == "saved_model.pb"):
            target = self._home / str(number) / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                shutil.copyfile(path, target)
                time.sleep(0.01)
        self.newest = number

    def reload(self, models):
        """Serves one of the newest versions."""
        number = self._rng.randint(self.newest - 2, self.newest)
        request = model_management_pb2.ReloadConfigRequest()
        config = request.config.model_config_list.config.add(name="adder")
        config.model_version_policy.specific.versions.append(number)
        self.unanswered.add(number)
        models.HandleReloadConfigRequest(request, timeout=10)
        self.accepted, self.count = number, self.count + 1
        self.unanswered = set()


def available(models):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "adder"
    rows = models.GetModelStatus(request, timeout=10).model_version_status
    return {row.version for row in rows if row.state == row.AVAILABLE}


def predict(channel, answers):
    """Asks until the service is gone; a version answers with its own number."""
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "adder"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.zeros((1, 2), np.float32)))
    while True:
        try:
            response = stub.Predict(request, timeout=10)
        except grpc.RpcError as error:
            answers.append(error.code())
            return
        [amount] = tf.make_ndarray(response.outputs["amount"])
        answers.append(amount == response.model_spec.version.value)


def check_disk(home):
    """What the service writes is whole: its directories are, and the reload that it keeps."""
    for path in home.iterdir():
        if path.name.isdecimal():
            assert (path / "saved_model.pb").is_file(), path
            assert (path / "variables" / "variables.index").is_file(), path
    kept = home.parent / KEPT
    assert not kept.exists() or json.loads(kept.read_text())["models"]


def live_and_die(server, operator, seconds):
    """One life under load; returns what clients were told."""
    answers = []
    with grpc.insecure_channel(server.grpc) as channel:
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        served = available(models)
        if operator.accepted:
            assert len(served) == 1
            assert served <= {operator.accepted, *operator.unanswered}
            [operator.accepted], operator.unanswered = served, set()
        clients = [
            threading.Thread(target=predict, args=(channel, answers)) for _ in range(CLIENTS)
        ]
        killer = threading.Timer(seconds, os.kill, (server.pid, signal.SIGKILL))
        for thread in (*clients, killer):
            thread.start()
        try:
            while True:
                operator.reload(models)
                if operator.count % 3 == 0:
                    operator.arrive()
        except grpc.RpcError as error:
            refusal = error
        for thread in (*clients, killer):
            thread.join()
    assert refusal.code() == grpc.StatusCode.UNAVAILABLE, refusal
    return answers


def test_kills_lose_no_reload_and_leave_nothing_half_written(tmp_path):
    rng = random.Random(SEED)
    home = tmp_path / "models" / "adder"
    home.mkdir(parents=True)
    operator = Operator(tmp_path / "library", home, rng)
    for _ in range(FIRST_VERSIONS):
        operator.arrive()
    answers = []
    for _ in range(KILLS):
        with load.served(tmp_path / "models", *FLAGS) as server:
            answers += live_and_die(server, operator, rng.uniform(0.05, LONGEST_LIFE))
        check_disk(home)
    with load.served(tmp_path / "models", *FLAGS) as server:
        with grpc.insecure_channel(server.grpc) as channel:
            served = available(model_service_pb2_grpc.ModelServiceStub(channel))
        assert served <= {operator.accepted, *operator.unanswered}
    lost = [one for one in answers if not isinstance(one, np.bool_ | bool)]
    print(f"{len(answers)} answers, {operator.count} reloads, {operator.newest} versions")
    assert all(one for one in answers if isinstance(one, np.bool_ | bool))
    assert len(lost) == KILLS * CLIENTS
    assert set(lost) == {grpc.StatusCode.UNAVAILABLE}
    assert operator.count > KILLS
