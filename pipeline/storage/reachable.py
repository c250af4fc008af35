"""Whether anything answers at a network address, in seconds: clients of Ray and MLflow go on asking for minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

# Of one attempt to connect or to read; both together, and the search for the name, end within LIMIT_S.
TIMEOUT_S = 5.0
LIMIT_S = 12.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Types of HTTP/2's frames, RFC 9113, section 6, and flags of them.
_DATA, _HEADERS, _SETTINGS, _GOAWAY = 0, 1, 4, 7
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x4, 0x8, 0x20
_LARGEST_FRAME = 2**14
_TLS_ALERT = 0x15
# ":status 200" in HPACK's static table, RFC 7541, appendix A.
_STATUS_200 = 0x88
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def why_unreachable(host: str, port: int, *, protocol: str = "tcp") -> str | None:
    """Why nothing answers at an address; None if something does.

    Args:
        protocol: "tcp": a connection is an answer; "http": anything that is sent back to a request; "grpc": a reply of a gRPC server,
            whatever its status, or one that asks for TLS.
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
    """Whether a call gets a reply: gRPC says with HTTP's status 200 even that it knows no such method; other servers have another one."""
    headers = bytes((0x83, 0x86))  # POST, http
    headers += _literal(4, b"/ray.rpc.NodeInfoGcsService/CheckAlive") + _literal(1, b"ray")
    headers += bytes((0x0F, 0x10)) + _sized(b"application/grpc") + b"\0" + _sized(b"te") + _sized(b"trailers")
    connection.sendall(
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, bytes(5))
    )
    while True:
        head = _receive(connection, 1)
        if head == bytes((_TLS_ALERT,)):
            return True
        head += _receive(connection, 8)
        size = int.from_bytes(head[:3], "big")
        if len(head) < 9 or size > _LARGEST_FRAME or head[3] == _GOAWAY:
            return False
        payload = _receive(connection, size)
        if head[3] == _HEADERS:
            start = (1 if head[4] & _PADDED else 0) + (5 if head[4] & _PRIORITY else 0)
            block = payload[start:]
            while block and block[0] & 0xE0 == 0x20:  # A new size of the table of headers.
                block = block[1:]
            return block[:1] == bytes((_STATUS_200,))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(name: int, value: bytes) -> bytes:
    """A header whose name is in HPACK's static table."""
    return bytes((name,)) + _sized(value)


def _sized(value: bytes) -> bytes:
    return bytes((len(value),)) + value


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer where the connection ends."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data
