"""A client that attacks a service, or one that looks how it is; in a process without TensorFlow.

usage: attack_client.py attack|probe HOST REST_PORT GRPC_ADDRESS SECONDS MESSAGES SLOW PID
It prints a JSON object: codes of each attack, or milliseconds of `/healthz` and megabytes.
"""

import collections
import contextlib
import gzip
import http.client
import json
import socket
import sys
import threading
import time
from pathlib import Path

import grpc

MODEL = "/v1/models/twotower"
GZIP = {"Content-Encoding": "gzip"}
RESTED = 0.05  # seconds between two looks
SLOW_CONNECTIONS = 50


def rest_attacks():
    """Name: method, path, body, headers; at the limits of the configuration, and above them."""
    ids, fewer = (json.dumps([f"query {row % 2000}" for row in range(n)]) for n in (6400, 640))
    many = json.dumps([str(row) for row in range(200_000)])
    allowed = json.dumps([f"candidate {row}" for row in range(100_000)])
    megabytes = 15 << 20

    def values(start, value, end):
        return (start + ",".join([value] * (megabytes // (len(value) + 1))) + end).encode()

    def retrieve(**fields):
        body = ", ".join(f'"{name}": {value}' for name, value in fields.items())
        return "POST", f"{MODEL}:retrieve", f"{{{body}}}".encode(), {}

    def predict(body):
        return "POST", f"{MODEL}:predict", body, {}

    return {
        "ids by allowed": retrieve(query_ids=many, allow=many),
        "ids by allowed, just": retrieve(query_ids=ids, allow=allowed, k=100),
        "ids by excluded, just": retrieve(query_ids=ids, exclude=allowed, k=100),
        "rows by k": retrieve(query_ids=ids, k=1000, index='"exact"'),
        "rows by k, just": retrieve(query_ids=fewer, k=1000, index='"exact"'),
        "all rows": predict(f'{{"instances": {ids}}}'.encode()),
        "empty strings": predict(values('{"instances": [', '""', "]}")),
        "empty lists": predict(values('{"instances": [', "[]", "]}")),
        "numbers": predict(values('{"inputs": [', "0.125", "]}")),
        "one string": predict(b'{"instances": ["' + b"x" * megabytes + b'"]}'),
        "mistakes": ("POST", f"{MODEL}:retrieve", values('{"query_ids": [', "1", "]}"), {}),
        "names": ("POST", f"{MODEL}:retrieve", values('{"x": {', '"a":1', "}}"), {}),
        "inflated": (*predict(gzip.compress(b" " * megabytes))[:3], GZIP),
        "inflated too far": (*predict(gzip.compress(b" " * 2 * megabytes))[:3], GZIP),
        "too large": predict(b" " * (17 << 20)),
        "padded limit": ("GET", f"{MODEL}:sample_queries?limit=0000000019999999", None, {}),
        "long limit": ("GET", f"{MODEL}:sample_queries?limit={'1' * 5000}", None, {}),
        "padded time": ("GET", "/healthz", None, {"X-Timeout-Ms": "0" * 20 + "9" * 5000}),
        "long version": ("GET", f"{MODEL}/versions/{'9' * 19}", None, {}),
        "longer version": ("GET", f"{MODEL}/versions/{'9' * 250}", None, {}),
    }


def ask(address, method, path, body, headers):
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
    except ConnectionError as error:
        return type(error).__name__
    finally:
        connection.close()
    told = answer.status == 200 or "error" in json.loads(content)
    return str(answer.status) if told else f"{answer.status} without a text"


def attack(address, grpc_address, seconds, messages, is_slow):
    end, codes = time.monotonic() + seconds, collections.defaultdict(collections.Counter)
    slow = threading.Thread(target=drip, args=(address, end, codes["slow connections"]))
    if is_slow:
        slow.start()
    by_rest = rest_attacks()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(grpc_address, options) as channel:
        by_grpc = {path.name: path.read_bytes() for path in messages.iterdir()}
        while time.monotonic() < end:
            for name, request in by_rest.items():
                codes[name][ask(address, *request)] += 1
            for name, content in by_grpc.items():
                service, method, compressed, _ = name.split("-")
                call = channel.unary_unary(f"/tensorflow.serving.{service}/{method}")
                compression = grpc.Compression.Gzip if compressed == "gzip" else None
                try:
                    call(content, timeout=2.0, compression=compression)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
                codes[name][code] += 1
    if is_slow:
        slow.join()
    return codes


def drip(address, end, codes):
    """Connections that send a byte a second; how many of them the service has ended."""
    connections = [socket.create_connection(address) for _ in range(SLOW_CONNECTIONS)]
    head = iter(f"GET /healthz HTTP/1.1\r\nX-Slow: {'x' * 10_000}".encode())
    ended = set()
    while time.monotonic() < end:
        byte = bytes([next(head)])
        for connection in connections:
            try:
                connection.sendall(byte)
            except OSError:
                ended.add(connection)
        time.sleep(1.0)
    codes["ended"] = len(ended)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.close()


def probe(address, seconds, pid):
    end, taken, megabytes = time.monotonic() + seconds, [], []
    while time.monotonic() < end:
        start = time.perf_counter()
        status = ask(address, "GET", "/healthz", None, {})
        taken.append(1000.0 * (time.perf_counter() - start))
        assert status == "200", status
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        megabytes.append(resident * 4096 / 1e6)
        time.sleep(RESTED)
    return {"milliseconds": taken, "megabytes": megabytes}


def main():
    what, host, port, grpc_address, seconds, messages, is_slow, pid = sys.argv[1:]
    address = host, int(port)
    if what == "probe":
        told = probe(address, float(seconds), int(pid))
    else:
        told = attack(address, grpc_address, float(seconds), Path(messages), is_slow == "slow")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
