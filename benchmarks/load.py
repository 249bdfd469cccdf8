"""Load on a running service: clients in a closed loop, or requests at given times.

Clients use the stubs of the package tensorflow-serving-api and plain HTTP over kept connections;
a latency ends when the whole answer has been read (and, by gRPC, parsed).
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

SIGNATURE = "serving_default"
_ADDRESSES = re.compile(r"REST http://([^ :]+):(\d+), gRPC ([^ ]+)\.$")

Call = Callable[[list[str]], None]  # asks about raw ids of queries; raises where it is refused


class Server(NamedTuple):
    """A `twotower serve` in a process of its own."""

    pid: int
    rest: tuple[str, int]
    grpc: str


class Load(NamedTuple):
    """What clients saw.

    Attributes:
      started: when each answered request began, `time.perf_counter()`, ascending.
      latencies: seconds, in the same order.
      failed: requests that were refused or broke.
      seconds: how long it took in all.
    """

    started: np.ndarray
    latencies: np.ndarray
    failed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Of the latencies, in milliseconds."""
        return 1000.0 * float(np.percentile(self.latencies, percent))


@contextlib.contextmanager
def served(models: Path, *flags: str) -> Iterator[Server]:
    """A service over a directory of models, on free ports; stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "twotower", "serve", "--models", str(models)]
    command += ["--rest_port", "0", "--grpc_port", "0", "--lame_duck_seconds", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield _when_ready(process.stdout, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _when_ready(lines: IO[str], pid: int) -> Server:
    """Waits for the line that says where the service listens; its log goes on being read."""
    for line in lines:
        if found := _ADDRESSES.search(line.rstrip()):
            threading.Thread(target=lambda: collections.deque(lines, 0), daemon=True).start()
            host, port, grpc_address = found.groups()
            return Server(pid, (host, int(port)), grpc_address)
    raise RuntimeError("The service ended before it could answer.")


def in_process(model: tf.Module) -> Call:
    """Calls a SavedModel; its answer is read as arrays."""
    function = model.signatures[SIGNATURE]

    def call(ids: list[str]) -> None:
        for output in function(query_id=tf.constant(ids)).values():
            output.numpy()

    return call


@contextlib.contextmanager
def by_grpc(server: Server, name: str, connections: int = 1) -> Iterator[Call]:
    """`PredictionService/Predict`, by so many connections in turn, one for each thread."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    local = threading.local()
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(server.grpc, options))
            for _ in range(connections)
        ]
        stubs = map(prediction_service_pb2_grpc.PredictionServiceStub, itertools.cycle(channels))

        def call(ids: list[str]) -> None:
            if not hasattr(local, "stub"):
                local.stub = next(stubs)
            request = predict_pb2.PredictRequest()
            request.model_spec.name = name
            tensor = request.inputs["query_id"]
            tensor.dtype = tf.string.as_datatype_enum
            tensor.tensor_shape.dim.add().size = len(ids)
            tensor.string_val.extend(one.encode() for one in ids)
            response = local.stub.Predict(request, timeout=30.0)
            if len(response.outputs["candidate_id"].string_val) < len(ids):
                raise RuntimeError("An answer has too few results.")

        yield call


@contextlib.contextmanager
def by_rest(server: Server, name: str) -> Iterator[Call]:
    """`POST /v1/models/NAME:predict` in columns, a connection for each thread."""
    local = threading.local()
    opened: list[http.client.HTTPConnection] = []

    def call(ids: list[str]) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(*server.rest, timeout=30.0)
            opened.append(local.connection)
        body = json.dumps({"inputs": {"query_id": ids}})
        local.connection.request("POST", f"/v1/models/{name}:predict", body)
        answer = local.connection.getresponse()
        content = answer.read()
        if answer.status != 200 or not content.startswith(b'{"outputs"'):
            raise RuntimeError(f"{answer.status}: {content[:200]!r}")

    try:
        yield call
    finally:
        for connection in opened:
            connection.close()


def closed_loop(
    call: Call, ids: list[str], batch: int, clients: int, seconds: float, seed: int = 0
) -> Load:
    """As fast as `clients` can, each with one request at a time.

    Args:
      call: one request.
      ids: queries to draw from.
      batch: queries of a request.
      clients: threads.
      seconds: when they stop asking.
      seed: of the draws.
    """
    results: list[tuple[float, float]] = []
    failures: list[Exception] = []
    start = time.perf_counter()

    def work(client: int) -> None:
        drawn = np.random.default_rng([seed, client]).integers(len(ids), size=(64, batch))
        requests = [[ids[place] for place in row] for row in drawn]
        turn = 0
        while (begun := time.perf_counter()) < start + seconds:
            try:
                call(requests[turn % len(requests)])
                results.append((begun, time.perf_counter() - begun))
            except Exception as error:
                failures.append(error)
            turn += 1

    _join([threading.Thread(target=work, args=(client,)) for client in range(clients)])
    return _load(results, failures, time.perf_counter() - start)


def open_loop(
    call: Call, ids: list[str], rate: float, clients: int, seconds: float, seed: int = 0
) -> Load:
    """One query a request at random times, `rate` a second on average (a Poisson process).

    A latency begins when the request was due, also where every client was busy then.
    """
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1.0 / rate, size=int(rate * seconds)))
    chosen = [ids[place] for place in rng.integers(len(ids), size=len(due))]
    turns, lock = iter(range(len(due))), threading.Lock()
    results: list[tuple[float, float]] = []
    failures: list[Exception] = []
    start = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            time.sleep(max(0.0, start + due[turn] - time.perf_counter()))
            try:
                call([chosen[turn]])
                results.append((start + due[turn], time.perf_counter() - start - due[turn]))
            except Exception as error:
                failures.append(error)

    _join([threading.Thread(target=work) for _ in range(clients)])
    return _load(results, failures, time.perf_counter() - start)


def cpu_seconds(pid: int) -> float:
    """That a process has spent until now, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def workers(pid: int) -> list[int]:
    """The processes that answer: the children of a supervisor, or the only one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"spawn_main" in command] or [pid]


def proportional_bytes(pid: int) -> int:
    """Memory of a process; what it shares with others counts by its share (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("Pss:")]
    return 1024 * int(kilobytes)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _load(results: list[tuple[float, float]], failures: list[Exception], seconds: float) -> Load:
    for failure in failures[:3]:
        print(f"A request failed: {failure!r}", file=sys.stderr)
    started, latencies = np.array(sorted(results)).reshape(-1, 2).T
    return Load(started, latencies, len(failures), seconds)
