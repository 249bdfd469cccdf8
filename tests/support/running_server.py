"""A server with real sockets in a thread of the test process, and a plain HTTP client for it."""

import asyncio
import contextlib
import json
import threading
import urllib.error
import urllib.request
from typing import NamedTuple

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from serving import server
from serving.settings import ServeConfig

READY_SECONDS = 60


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        assert set(self.json) == {"error"}, self.body
        return self.json["error"]


class Running:
    """Where a server is, and how to talk to it."""

    def __init__(self, at, loop, stop, thread):
        self.rest, self.grpc = at.rest, at.grpc
        self._loop, self._stop, self._thread = loop, stop, thread
        self.host, port = at.rest.split("//")[1].split(":")
        self.rest_port = int(port)
        self.channel = grpc.insecure_channel(at.grpc)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def stop(self):
        """What a signal does."""
        self._loop.call_soon_threadsafe(self._stop.put_nowait, 15)

    def wait_until_stopped(self):
        self._thread.join(READY_SECONDS)
        assert not self._thread.is_alive(), "the server did not stop"

    def ask(self, method, path, body=None, headers=None):
        """One request; `body` is JSON unless it is bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.rest + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as answer:
            return Answer(answer.code, dict(answer.headers), answer.read())

    def get(self, path, **headers):
        return self.ask("GET", path, headers=headers)

    def post(self, path, body, **headers):
        return self.ask("POST", path, body, headers)


@contextlib.contextmanager
def running(models, **settings):
    """A server over a directory of models on free ports; it is drained at the end."""
    config = ServeConfig(
        str(models), rest_port=0, grpc_port=0, **{"lame_duck_seconds": 0, **settings}
    )
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Queue(), threading.Event()
    told, failures = [], []

    def announce(at, names):
        told.append(at)
        ready.set()

    def work():
        try:
            loop.run_until_complete(server.run(config, stop, announce))
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(READY_SECONDS), "the server was not ready in time"
        assert not failures, failures
        place = Running(told[0], loop, stop, thread)
        with place.channel:
            yield place
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.put_nowait, 15)
        thread.join(READY_SECONDS)
        assert not thread.is_alive(), "the server did not stop"
        assert not failures, failures
        loop.close()
