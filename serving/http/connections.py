"""HTTP connections with bounds: bytes and time of a request's head, time to read an answer, and their number.

uvicorn bounds the requests that run (`limit_concurrency`), idle connections (`timeout_keep_alive`) and, with h11 alone, the head's bytes.
With httptools a connection may send a head of any size for any time. `bounded_protocol` gives that protocol these bounds:

    limits = ConnectionLimits()
    BoundedServer(uvicorn.Config(app, http=bounded_protocol(limits), ws="none"), limits).run()

A connection of TLS begins with a handshake, before the protocol hears of it; asyncio gives it 60 seconds, and `BoundedServer` less. Such a
connection ends with the client's confirmation, and what comes until then is read: where the client is at fault it is cut off soon.

Bodies are bounded by `serving.http.gate`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.http.gate import error_body


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of a server's connections."""

    max_connections: int = 512
    """Open ones. A process may have 1024 open files by default on Linux, and each connection is one."""
    max_header_bytes: int = 32 * 2**10
    """Request line and headers together; also what a chunked body may hold between two pieces, and behind the last."""
    header_timeout_s: float = 10.0
    """From the connection, or from the first byte of a later request, to the end of its headers; also of a TLS handshake."""
    write_timeout_s: float = 30.0
    """How long a client may leave an answer unread."""
    keep_alive_s: int = 5
    """Between an answer and the first byte of the next request."""
    linger_s: float = 1.0
    """From a refusal, or the end of an idle connection, to its cut: a client of TLS may go on sending meanwhile."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection. Subclasses made by `bounded_protocol` have the limits of one server."""

    limits: ClassVar[ConnectionLimits]
    # Connections that have not sent a whole head yet, oldest first.
    without_request: ClassVar[dict[BoundedProtocol, None]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._n_overhead = 0  # Bytes since the last request, or piece of a body, that was complete.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # What uvicorn is given.
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and not self._take_place():
            self._refuse(503, "too many connections; try again", retry=True)
            return
        self.without_request[self] = None
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.without_request.pop(self, None)
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._n_overhead += len(data)
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_head_timer()
        super().data_received(data)
        if self._n_overhead > self.limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(431, f"the request's head is larger than {self.limits.max_header_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        self.without_request.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._n_overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._n_overhead = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # close() would wait for a client that does not read its answer.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()
        self._cut_off()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _head_is_late(self) -> None:
        if self._n_overhead:
            self._refuse(408, f"the request's head did not arrive within {self.limits.header_timeout_s:g} s")
        else:
            self.transport.close()
            self._cut_off()

    def _cut_off(self) -> None:
        """End a connection that is closing, soon."""
        self.loop.call_later(self.limits.linger_s, self.transport.abort)

    def _take_place(self) -> bool:
        """Close the oldest connection that has not sent a request; whether there was one."""
        oldest = next(iter(self.without_request), None)
        if oldest is None:
            return False
        self.without_request.pop(oldest)
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _refuse(self, status: int, message: str, *, retry: bool = False) -> None:
        body = error_body(message)
        again = b"retry-after: 1\r\n" if retry else b""
        self.transport.write(
            STATUS_LINE[status] + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body) + again
            + b"connection: close\r\n\r\n" + body
        )  # fmt: skip
        self.transport.close()
        self._cut_off()


class BoundedServer(uvicorn.Server):
    """uvicorn's server with a bound on the handshake of TLS.

    Args:
        config: with ``http=bounded_protocol(limits)``.
    """

    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._limits = limits

    async def startup(self, sockets: list[Any] | None = None) -> None:
        if not self.config.is_ssl:
            await super().startup(sockets)
            return
        # uvicorn has no option for it.
        loop: Any = asyncio.get_running_loop()
        loop.create_server = partial(loop.create_server, ssl_handshake_timeout=self._limits.header_timeout_s)
        try:
            await super().startup(sockets)
        finally:
            del loop.create_server


def bounded_protocol(limits: ConnectionLimits) -> type[BoundedProtocol]:
    """The protocol class of one server, for uvicorn's option `http`."""
    return type("ServerProtocol", (BoundedProtocol,), {"limits": limits, "without_request": {}})
