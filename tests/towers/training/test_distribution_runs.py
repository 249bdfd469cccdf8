"""`twotower train` on several devices and several workers: the run of one process, file by file."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from towers.training.checkpoints import RunRecorder
from towers.training.settings import TrainConfig
from towers.training.train import train

COMMAND = [sys.executable, str(Path(__file__).parents[3] / "twotower.py"), "train"]
FIELDS = {"dim": 8, "batch_size": 64, "epochs": 2, "temperature": 0.5, "method": "xir"}
OPTIONS = ("cache_size=32",)


def config_of(prepared, run, **settings):
    return TrainConfig(data=str(prepared), run=str(run), options=OPTIONS, **(FIELDS | settings))


def start(prepared, run, *flags, task=""):
    flags = [*flags, "--data", str(prepared), "--run", str(run), "--options", *OPTIONS]
    for name, value in FIELDS.items():
        flags = [f"--{name}", str(value), *flags]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | ({"TF_CONFIG": task} if task else {})
    return subprocess.Popen(
        [*COMMAND, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(processes):
    try:
        for process in processes:
            text, _ = process.communicate(timeout=300)
            assert process.returncode == 0, text.decode()[-3000:]
    finally:
        for process in processes:
            process.kill()


def state_of(run):
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(run / "checkpoints")))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    return {name: reader.get_tensor(name) for name in names}


def assert_same(run, other):
    one, two = state_of(run), state_of(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    losses = [
        [entry["loss"] for entry in json.loads((at / "training.json").read_text())["history"]]
        for at in (run, other)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(config_of(prepared, run))
    return run


@pytest.mark.long
@pytest.mark.clock  # ports
def test_two_workers_train_as_one_process_and_the_first_one_writes(prepared, alone, tmp_path):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    for server in servers:
        server.close()
    tasks = [
        json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
        for index in range(2)
    ]
    run = tmp_path / "run"
    flags = ["--strategy", "multi_worker"]
    finish([start(prepared, run, *flags, task=task) for task in tasks])
    assert_same(alone, run)
    names = [
        sorted(p.name for p in at.rglob("*") if "tfevents" not in p.name) for at in (alone, run)
    ]
    assert names[0] == names[1]


@pytest.mark.long
def test_a_run_goes_on_in_mid_epoch_with_other_devices(prepared, alone, tmp_path, monkeypatch):
    run = tmp_path / "run"
    steps = json.loads((alone / "training.json").read_text())["steps"]

    def stop(self, batch, logs=None):
        if int(self.model.iteration.numpy()) == steps // 2 + 3:
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(RunRecorder, "on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(prepared, run))
    finish([start(prepared, run, "--strategy", "mirrored", "--devices", "2")])
    assert_same(alone, run)
