"""Connections over real sockets that are slow to send."""

import http.client
import socket

import pytest

from serving.rest import guard

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(autouse=True)
def short_heads(monkeypatch):
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)


@pytest.mark.parametrize(
    "before",
    [b"", b"GET /healthz", REQUEST + b"GET", b"POST /none HTTP/1.1\r\nContent-Length: 99\r\n\r\n"],
)
def test_a_connection_ends_where_no_request_is_complete_in_time(server, before):
    with socket.create_connection((server.host, server.rest_port), timeout=30) as connection:
        connection.sendall(before)
        try:
            while True:  # a byte now and then does not help
                connection.settimeout(0.05)
                try:
                    if not connection.recv(1000):
                        break
                except TimeoutError:
                    connection.settimeout(30)
                    connection.sendall(b"x")
        except ConnectionError:
            pass  # ended while it was sent to


def test_an_idle_connection_stays(server):
    with socket.create_connection((server.host, server.rest_port), timeout=30) as connection:
        for _ in range(2):
            connection.sendall(REQUEST)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.read()) == (200, b"ok\n")
            connection.settimeout(1.0)  # longer than half a request may take
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(30)
