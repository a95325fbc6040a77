"""Clients that are slow, or many."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmc.runtime.serve.connections import SPARE_CONNECTIONS
from tests.runtime.serve.conftest import Server, serving

MOST, TIMEOUT = 3, 0.8


@pytest.fixture(scope="module")
def strict_server(stub: Path) -> Iterator[Server]:
    with serving(stub, "--limit-concurrency", MOST, "--timeout", TIMEOUT) as server:
        yield server


def connect(server: Server) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    said = b""
    while part := client.recv(1 << 16):
        said += part
    return said


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def dribble(client: socket.socket, seconds: float) -> None:
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        client.sendall(b" ")
        time.sleep(TIMEOUT / 20)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
PARTS = b'Content-Length: 99\r\n\r\n{"prompt":'


def test_a_closed_terminal_ends_it_as_ctrl_c_does(stub: Path) -> None:
    with serving(stub) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(30) == 0


def test_who_says_nothing_is_told_nothing(strict_server: Server) -> None:
    with connect(strict_server) as client:
        assert answer(client) == b""


@pytest.mark.parametrize("begun", [HEAD, HEAD + PARTS, HEAD.replace(b"completions", b"messages") + PARTS])
def test_a_request_that_does_not_arrive_ends(strict_server: Server, begun: bytes) -> None:
    with connect(strict_server) as client:
        client.sendall(begun)
        head, _, body = answer(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    said = json.loads(body)
    assert said.get("type") == "error" if b"messages" in begun else said["error"]["code"] == "request_timeout"


def test_a_request_that_comes_by_the_byte_ends(strict_server: Server) -> None:
    with connect(strict_server) as client:
        client.sendall(HEAD + b"Content-Length: 999\r\n\r\n")
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            dribble(client, 10 * TIMEOUT)


def test_who_asks_before_sending_too_much_is_told_so(strict_server: Server) -> None:
    with connect(strict_server) as client:
        client.sendall(HEAD + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_reads_nothing_ends(strict_server: Server) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = strict_server.address.split(":")
        client.connect((host, int(port)))
        client.settimeout(10)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        time.sleep(2 * TIMEOUT)
        for _ in range(50):
            if strict_server.metric("open_connections") == 1:  # this question's own
                break
            time.sleep(0.1)
        else:
            raise AssertionError("it is still connected")


def test_too_many_connections_are_asked_to_come_again(strict_server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(connect(strict_server))
        with strict_server.open("GET", "/v1/models") as response:
            assert (response.status, response.headers["retry-after"]) == (503, "1")
            assert json.load(response)["error"]["code"] == "too_many_connections"
        assert strict_server.metric("open_connections") > MOST
        others = [stack.enter_context(connect(strict_server)) for _ in range(SPARE_CONNECTIONS + 1)]
        assert is_closed(others[-1])
    assert strict_server.ask("GET", "/v1/models")[0] == 200
