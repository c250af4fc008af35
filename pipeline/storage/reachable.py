"""Whether anything answers at a network address, in seconds: clients of Ray and MLflow go on asking for minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

# Of one attempt to connect or to read; both together, and the search for the name, end within LIMIT_S.
TIMEOUT_S = 5.0
LIMIT_S = 12.0
# What opens a connection of HTTP/2, gRPC's: the preface, and a frame of settings without one.
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS, _TLS_ALERT = 4, 0x15
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def why_unreachable(host: str, port: int, *, protocol: str = "tcp") -> str | None:
    """Why nothing answers at an address; None if something does.

    Args:
        protocol: "tcp": a connection is an answer; "http": anything that is sent back to a request; "grpc": what a gRPC server sends
            first, or one that asks for TLS.
    """
    ask = {"tcp": lambda _: True, "http": _answers_http, "grpc": _answers_grpc}[protocol]
    found: list[str | None] = []

    def attempt() -> None:
        found.append(_attempt(host, port, ask))

    # The search for a name has no time limit of its own.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return found[0] if found else f"no answer within {LIMIT_S:g} s"


def unreachable_uri(uri: str) -> str | None:
    """Why nothing answers at the server of a URI; None if something does, or if the URI names no server that is known."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    try:
        port = parts.port or _PORTS.get(scheme)
    except ValueError as error:
        return str(error)
    if scheme not in _PORTS or not parts.hostname or port is None:
        return None
    return why_unreachable(parts.hostname, port, protocol="http" if scheme == "http" else "tcp")


def _attempt(host: str, port: int, ask: Callable[[socket.socket], bool]) -> str | None:
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as connection:
            return None if ask(connection) else "something listens there, and it is of another kind"
    except TimeoutError:
        return f"no answer within {TIMEOUT_S:g} s"
    except OSError as error:
        return error.strerror or str(error)


def _answers_http(connection: socket.socket) -> bool:
    connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    return bool(connection.recv(1))


def _answers_grpc(connection: socket.socket) -> bool:
    connection.sendall(_HTTP2)
    answer = connection.recv(4)
    return len(answer) == 4 and (answer[3] == _SETTINGS or answer[0] == _TLS_ALERT)
