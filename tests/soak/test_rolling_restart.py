"""Servers replace each other under load, as in a rolling restart: no request is lost."""

import http.client
import json
import threading
import time

import pytest
from saved_models import write_affine

from benchmarks import load

pytestmark = pytest.mark.soak

RESTARTS, CLIENTS = 5, 4
LOOK_SECONDS, LAME_DUCK_SECONDS = 1.0, 3.0
BODY = json.dumps({"instances": [[0.0, 0.0]]})


class Balancer:
    """Sends requests to a server that was ready when it last looked, once a second."""

    def __init__(self):
        self.servers, self.ready = [], []

    def look(self, stop):
        while not stop.is_set():
            self.ready = [server for server in list(self.servers) if is_ready(server)]
            stop.wait(LOOK_SECONDS)

    def ask(self):
        status, body = request(self.ready[-1], "POST", "/v1/models/adder:predict", BODY)
        assert (status, json.loads(body)["predictions"][0]["amount"]) == (200, 1.0)


def request(server, method, path, body=None):
    connection = http.client.HTTPConnection(*server.rest, timeout=30)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def is_ready(server):
    try:
        return request(server, "GET", "/readyz")[0] == 200
    except OSError:
        return False


def start(models, balancer):
    serving = load.served(models, "--lame_duck_seconds", str(LAME_DUCK_SECONDS))
    balancer.servers.append(serving.__enter__())
    return serving


def test_a_rolling_restart_loses_no_request(tmp_path):
    write_affine(tmp_path / "models" / "adder" / "1", 1.0)
    balancer, stop, failures, answered = Balancer(), threading.Event(), [], []

    def client():
        while not stop.is_set():
            try:
                balancer.ask()
                answered.append(time.monotonic())
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=balancer.look, args=(stop,))]
    threads += [threading.Thread(target=client) for _ in range(CLIENTS)]
    serving = start(tmp_path / "models", balancer)
    try:
        threads[0].start()
        while not balancer.ready:
            time.sleep(0.05)
        for thread in threads[1:]:
            thread.start()
        for _ in range(RESTARTS):
            following = start(tmp_path / "models", balancer)
            serving.__exit__(None, None, None)  # SIGTERM, and waits for the end
            serving = following
            balancer.servers.pop(0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        serving.__exit__(None, None, None)
    print(f"{len(answered)} requests over {RESTARTS} restarts, {len(failures)} lost")
    assert not failures
    assert len(answered) > 100 * RESTARTS
