"""Several workers on the same ports, each a process: deaths, reloads, metrics, the end."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

from serving.settings import ServeConfig
from serving.workers import serve

ROOT = Path(__file__).parents[2]
SECONDS = 120  # far longer than anything here takes
WORKERS = 2
START = """
import json
import logging
import sys
from serving import workers
from serving.settings import ServeConfig
logging.getLogger("serving").setLevel(logging.INFO)
settings = json.loads(sys.argv[1])
workers._RETRY_SECONDS, workers._MAX_DEATHS = 0.5, settings.pop("max_deaths", 8)
try:
    sys.exit(workers.serve(ServeConfig(**settings)))
except ValueError as error:
    print(f"refused: {error}", flush=True)
    sys.exit(2)
"""


class Fleet:
    """A supervisor in a process of its own, and the lines that all of them write."""

    def __init__(self, models, **settings):
        settings = {"rest_port": 0, "grpc_port": 0, "lame_duck_seconds": 0, **settings}
        settings |= {"models": str(models), "poll_seconds": 0.1}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.lines = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self):
        self.lines.extend(self.process.stdout)

    def until(self, is_so):
        end = time.monotonic() + SECONDS
        while not (result := is_so()):
            assert time.monotonic() < end, self.lines
            time.sleep(0.02)
        return result

    def started(self):
        [line] = self.until(lambda: self.with_text("Serving "))
        self.rest = line.split("REST ")[1].split(",")[0]
        self.grpc = line.split("gRPC ")[1].strip().rstrip(".")
        return self

    def with_text(self, text):
        return [line for line in self.lines if text in line]

    def pids(self):
        """Of the workers: not that of what multiprocessing starts beside them."""
        me = self.process.pid
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        return [
            int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
        ]

    def get(self, path, data=None):
        with urllib.request.urlopen(self.rest + path, data, timeout=SECONDS) as answer:
            return answer.read().decode()

    def ask(self):
        body = json.dumps({"instances": ["query 0"]}).encode()
        answer = json.loads(self.get("/v1/models/twotower:predict", body))
        return answer["predictions"][0]["candidate_id"]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        status = self.process.wait(SECONDS)
        self._reading.join(SECONDS)
        return status


@contextlib.contextmanager
def fleet(models, **settings):
    started = Fleet(models, workers=WORKERS, **settings)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.end(signal.SIGINT)
        started.process.stdout.close()


@pytest.fixture(scope="module")
def models(small, tmp_path_factory):
    """A directory of models with two versions."""
    models = tmp_path_factory.mktemp("models")
    (models / "twotower").mkdir()
    for number in (1, 2):
        os.symlink(small.version, models / "twotower" / str(number))
    return models


@pytest.fixture(scope="module")
def shared(models):
    with fleet(models) as place:
        yield place.started()


def requests_counted(place):
    families = text_string_to_metric_families(place.get("/monitoring/prometheus/metrics"))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "twotower_requests_total" and sample.labels["status"] == "OK"
    )


@pytest.mark.long
@pytest.mark.clock  # ports
def test_all_answer_and_their_metrics_are_summed(shared, small):
    before = requests_counted(shared)
    for _ in range(40):  # each a connection, which the kernel hands to one of them
        assert shared.ask() == small.sample.best_ids(0)[:40]
    assert {requests_counted(shared) for _ in range(8)} == {before + 40}
    text = shared.get("/monitoring/prometheus/metrics")
    assert text.count("\ntwotower_queue_depth 0.0") == 1
    assert ':tensorflow:serving:request_count{model_name="twotower",status="OK"}' in text
    workers_that_answered = {
        path for pid in shared.pids() for path in counted(pid)
    }  # each has its own file, so that it is a sum
    assert len(workers_that_answered) == WORKERS
    with grpc.insecure_channel(shared.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def counted(pid):
    """The file in which a process counts its requests; none where it is gone."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {line.split()[-1] for line in text.splitlines() if f"counter_{pid}.db" in line}


@pytest.mark.long
@pytest.mark.clock
def test_cleaners_of_temporary_files_find_the_folder_of_the_workers_locked(shared):
    """They remove what nobody touches for days, such as the files that say who is ready."""
    pid = shared.pids()[0]
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    [counts] = {line.split()[-1] for line in lines if line.endswith(f"/counter_{pid}.db")}
    folder = os.open(Path(counts).parent, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


@pytest.mark.long
@pytest.mark.clock
def test_a_reload_that_one_gets_reaches_all(shared):
    request = model_management_pb2.ReloadConfigRequest()
    config = request.config.model_config_list.config.add(name="twotower")
    for number in (1, 2):
        config.model_version_policy.specific.versions[:] = [number]
        with grpc.insecure_channel(shared.grpc) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            stub.HandleReloadConfigRequest(request, timeout=SECONDS)

        def version():
            path = "/v1/models/twotower:sample_queries"
            return json.loads(shared.get(path))["version"]

        shared.until(lambda: {version() for _ in range(16)} == {number})  # noqa: B023


@pytest.mark.long
@pytest.mark.clock
def test_a_killed_worker_is_replaced_while_the_others_answer(shared):
    failed, asked, stop = [], [], threading.Event()

    def ask_on_and_on():
        while not stop.is_set():
            asked.append(None)
            try:
                shared.ask()
            except OSError as error:  # a connection to the one that is killed
                failed.append(error)

    before = shared.pids()
    thread = threading.Thread(target=ask_on_and_on)
    thread.start()
    try:
        os.kill(before[0], signal.SIGKILL)
        pids = shared.until(
            lambda: (p := shared.pids())[:] and before[0] not in p and len(p) == 2 and p
        )
        [new] = set(pids) - set(before)
        shared.until(lambda: f"counter_{new}.db" in Path(f"/proc/{new}/maps").read_text())
        enough = len(asked) + 100
        shared.until(lambda: len(asked) > enough)
    finally:
        stop.set()
        thread.join(SECONDS)
    # The request that was with it, and the next one where the kernel had not yet taken its port.
    assert len(failed) <= 2
    assert shared.with_text("ended with status -9: another one takes its place")
    assert set(before) - {before[0]} <= set(shared.pids())
    assert shared.get("/readyz") == "ok\n"


@pytest.mark.long
@pytest.mark.clock
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(models, number):
    with fleet(models) as place:
        place.started()
        pids = place.pids()
        assert len(pids) == WORKERS
        assert place.end(number) == 0
        assert len(place.with_text("Stopping: ")) == WORKERS
        assert not place.with_text("Traceback")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.long
@pytest.mark.clock
@pytest.mark.parametrize("workers", [1, WORKERS])
def test_a_signal_at_the_start_is_not_lost(models, workers):
    place = Fleet(models, workers=workers)
    blocked = 1 << (signal.SIGINT - 1)

    def is_blocked():
        status = Path(f"/proc/{place.process.pid}/status").read_text()
        [mask] = [line for line in status.splitlines() if line.startswith("SigBlk:")]
        return int(mask.split()[1], 16) & blocked

    place.until(place.pids if workers > 1 else is_blocked)
    assert place.end(signal.SIGINT) == 0
    assert not place.with_text("Traceback")
    place.process.stdout.close()


@pytest.mark.long
@pytest.mark.clock
def test_workers_that_die_again_and_again_end_the_service(models):
    with fleet(models) as place:

        def kill_all():
            for pid in place.pids() if place.process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return place.process.poll() is not None

        place.until(kill_all)
        place._reading.join(SECONDS)
        assert place.process.returncode == 1
        [line] = place.with_text("workers died within")
        assert json.loads(line)["level"] == "critical"


@pytest.mark.long
@pytest.mark.clock
def test_a_worker_that_cannot_take_the_place_of_another_one_says_why(models, tmp_path):
    file = tmp_path / "models.config"
    file.write_text('model_config_list { config { name: "twotower" } }')
    content = file.read_text()
    with fleet(models, config_file=str(file), max_deaths=2) as place:
        pids = place.started().pids()
        file.write_text("model_config_list {")  # which those that run go on without
        os.kill(pids[0], signal.SIGKILL)  # the one death that counts
        place.until(lambda: len(place.with_text("ended with status 2")) > 1)
        line = place.with_text("cannot start")[0]
        assert f"config_file {file} cannot be read" in json.loads(line)["message"]
        assert place.ask()[0]
        file.write_text(content)
        place.until(lambda: sum(bool(counted(pid)) for pid in place.pids()) == WORKERS)


@pytest.mark.long
@pytest.mark.clock
def test_workers_whose_supervisor_is_killed_end(models):
    with fleet(models) as place:
        pids = place.started().pids()
        place.process.kill()
        place.process.wait(SECONDS)
        place.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.long
@pytest.mark.clock
def test_workers_whose_supervisor_is_killed_at_their_start_end(models):
    with fleet(models) as place:
        pids = place.until(place.pids)
        place.process.kill()
        place.process.wait(SECONDS)
        place.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.long
@pytest.mark.clock
def test_a_port_of_other_workers_is_an_error_of_one_line(shared, models):
    for flag, address in (("rest_port", shared.rest), ("grpc_port", shared.grpc)):
        other = Fleet(models, workers=WORKERS, **{flag: int(address.rsplit(":", 1)[1])})
        assert other.process.wait(SECONDS) == 2
        other._reading.join(SECONDS)
        [line] = other.with_text("refused: ")
        assert f"choose another --{flag}" in line
        other.process.stdout.close()
    assert shared.get("/readyz") == "ok\n"


@pytest.mark.long
@pytest.mark.clock
def test_what_no_worker_can_start_with_is_told_once(models, tmp_path):
    config = tmp_path / "models.config"
    config.write_text("model_config_list { config {")
    other = Fleet(models, workers=WORKERS, config_file=str(config))
    assert other.process.wait(SECONDS) == 2
    other._reading.join(SECONDS)
    assert len(other.with_text("cannot be read")) == 1
    assert not other.with_text("Traceback")
    other.process.stdout.close()


def test_ports_of_workers_are_tried_before_a_process_starts(models):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ServeConfig(str(models), workers=WORKERS, rest_port=0, grpc_port=port)
        with pytest.raises(ValueError, match=r"gRPC API cannot listen on .* --grpc_port"):
            serve(config)
