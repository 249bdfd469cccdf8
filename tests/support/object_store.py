"""A real S3 server on loopback, in a process of its own, and a gate before it that can be shut."""

import contextlib
import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import fsspec
import pytest

SECRET = "a-secret-of-the-tests"


@contextlib.contextmanager
def running_store():
    """The environment in which clients reach an empty server; it ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert server.poll() is None, "moto.server ended: is the extra `dev` installed?"
            time.sleep(0.05)
        fsspec.filesystem("s3").clear_instance_cache()  # clients of an earlier server
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": ",".join(filter(None, ["127.0.0.1", os.environ.get("NO_PROXY")])),
        }
    finally:
        server.terminate()
        server.wait()


class Gate:
    """Passes requests to a store, but for what `judge` says of a method and a path.

    It returns the HTTP status to answer in place of the store, or 0; it may wait.
    """

    def __init__(self):
        self.judge = lambda method, path: 0
        self.requests = []


@contextlib.contextmanager
def gate_before(environment):
    """A gate, and the environment in which clients go through it."""
    port = int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
    gate = Gate()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            gate.requests.append((self.command, path))
            status, headers, content = gate.judge(self.command, path), [], b""
            if not status:
                store = http.client.HTTPConnection("127.0.0.1", port)
                store.request(self.command, self.path, body, dict(self.headers))
                answer = store.getresponse()
                status, headers, content = answer.status, answer.getheaders(), answer.read()
                store.close()
            self.send_response_only(status)
            kept = [h for h in headers if h[0].lower() not in ("connection", "transfer-encoding")]
            if "content-length" not in (name.lower() for name, _ in kept):
                kept.append(("Content-Length", str(len(content))))
            for header in kept:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that were killed
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield gate, environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def gated_store(bucket):
    """A gate before a new store with a bucket, and a client; the environment leads to the gate."""
    with (
        running_store() as environment,
        gate_before(environment) as (gate, gated),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in gated.items():
            patch.setenv(name, value)
        client = fsspec.filesystem("s3", use_listings_cache=False)
        client.mkdir(bucket)
        yield gate, client


def empty(gate, client, bucket):
    """Opens a gate and empties the bucket behind it; returns the gate."""
    gate.judge = lambda method, path: 0
    if paths := client.find(bucket):
        client.rm(paths)
    return gate
