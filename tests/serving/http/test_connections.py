"""Connections that are slow, endless, many or never read: refused in time, and nobody else waits for them."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pipeline.bundles.serve import ServeSettings
from serving.http.answers import Limits
from serving.http.connections import ConnectionLimits
from tests.helpers.http_server import REQUEST, on_a_thread, serve_command, serve_settings
from tests.helpers.small_models import small_model

ROOT = Path(__file__).parents[3]


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    connection.settimeout(30)
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_answered(address: tuple[str, int]) -> bool:
    client = http.client.HTTPConnection(*address, timeout=30)
    client.request("POST", "/v1/recommend", REQUEST, {"Content-Type": "application/json"})
    return client.getresponse().status == 200


@pytest.mark.parametrize("place", ["request line", "one header", "many headers", "trailer", "chunk extension"])
def test_an_endless_head_is_refused_from_the_limit_on(folder, place):
    starts = {
        "request line": (b"GET /?", b"x"),
        "one header": (b"GET / HTTP/1.1\r\nHost: x\r\na: ", b"x"),
        "many headers": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n"),
        "trailer": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\na: ", b"x"),
        "chunk extension": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
    }
    start, more = starts[place]
    sent = 0
    with on_a_thread(serve_settings(folder)) as address, socket.create_connection(address, timeout=30) as client:
        client.sendall(start)
        try:
            while sent < 50 * 2**20:
                sent += client.send(more * 2000)
        except OSError:
            pass  # The server has closed.
        assert is_answered(address)
    assert sent < 20 * 2**20, "what lies in the buffers of both sides, and no more"


def test_the_refusal_of_a_long_head_is_one_line(folder):
    with on_a_thread(serve_settings(folder), ConnectionLimits(max_header_bytes=1000)) as address:
        with socket.create_connection(address) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 1500)
            answer = answer_of(client)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"error": "the request's head is larger than 1000 bytes"}
        with socket.create_connection(address) as client:
            client.sendall(b"nonsense\r\n\r\n")
            answer = answer_of(client)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "Invalid HTTP request received."


def test_a_body_of_many_small_chunks_is_no_long_head(folder):
    body = json.dumps({"user_ids": [3], "k": 4, "exclude": [[7] * 2000]}).encode()
    with (
        on_a_thread(serve_settings(folder), ConnectionLimits(max_header_bytes=1000)) as address,
        socket.create_connection(address) as client,
    ):
        client.sendall(
            b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for byte in body:
            client.sendall(b"1\r\n%c\r\n" % byte)
        client.sendall(b"0\r\n\r\n")
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")


def test_a_head_that_comes_slowly_is_not_waited_for(folder):
    limits = ConnectionLimits(header_timeout_s=0.5)
    with on_a_thread(serve_settings(folder), limits) as address:
        with socket.create_connection(address) as slow, socket.create_connection(address) as silent:
            slow.sendall(b"GET /healthz HTTP/1.1\r\n")
            with socket.create_connection(address) as blank:
                # Line ends before a request are no request.
                try:
                    while True:
                        blank.sendall(b"\r\n")
                        time.sleep(0.05)
                except OSError:
                    pass
            answer = answer_of(slow)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the request's head did not arrive within 0.5 s" in answer
            assert answer_of(silent) == b""
        # The head of a later request has no more time than the first.
        with socket.create_connection(address) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            client.sendall(b"GET")
            assert b"HTTP/1.1 408 " in answer_of(client)


def test_half_open_connections_leave_and_keep_nobody_out(folder):
    limits = ConnectionLimits(max_connections=50, header_timeout_s=60)
    with on_a_thread(serve_settings(folder), limits) as address:
        half_open = [socket.create_connection(address) for _ in range(400)]
        try:
            assert is_answered(address)
            closed = 0
            for client in half_open[:300]:
                client.settimeout(30)
                try:
                    closed += client.recv(1) == b""
                except ConnectionResetError:
                    closed += 1
            assert closed == 300
        finally:
            for client in half_open:
                client.close()


def test_connections_with_requests_under_way_are_not_closed_for_new_ones(folder):
    limits = ConnectionLimits(max_connections=5)
    with on_a_thread(serve_settings(folder), limits) as address:
        busy = [http.client.HTTPConnection(*address, timeout=30) for _ in range(5)]
        for client in busy:
            client.putrequest("POST", "/v1/recommend")
            client.putheader("Content-Type", "application/json")
            client.putheader("Content-Length", str(len(REQUEST)))
            client.endheaders()
        time.sleep(0.3)  # For the heads to arrive.
        with socket.create_connection(address) as client:
            answer = answer_of(client)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        assert b"too many connections" in answer
        for client in busy:
            client.send(REQUEST)
            assert client.getresponse().status == 200


def test_an_answer_that_is_not_read_is_given_up(tmp_path):
    small_model(users="string", items="string", n_items=4000).export(tmp_path / "bundle")
    limits = ConnectionLimits(write_timeout_s=0.5)
    with on_a_thread(ServeSettings(tmp_path / "bundle", Limits(max_k=4000), "cpu", watch_s=0), limits) as address:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            body = json.dumps({"user_ids": ["a"] * 100, "k": 4000}).encode()
            client.sendall(
                b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            answer = client.recv(500)
            time.sleep(2)
            answer += answer_of(client)
        length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert 0 < len(answer) < length


def test_no_request_fails_beside_slow_clients_and_an_endless_header(folder):
    with serve_command(folder, "--provider", "cpu", "--watch", "0") as (url, pid):
        process = psutil.Process(pid)
        assert is_answered((urlsplit(url).hostname, urlsplit(url).port))
        before = process.memory_info().rss
        command = [sys.executable, str(ROOT / "examples" / "slow_clients.py"), url, "3", "7", "99"]
        got = subprocess.run([*command, "--seconds", "3", "--slow", "100"], capture_output=True, text=True, timeout=120)
        grown = process.memory_info().rss - before
    assert got.returncode == 0, got.stderr
    figures = json.loads(got.stdout)
    assert (figures["failed"], figures["reasons"]) == (0, [])
    assert figures["requests"] > 0
    assert figures["slow_connections"] >= 100
    assert grown < 100 * 2**20
