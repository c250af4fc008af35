"""Requests to an ASGI app in this process, over one event loop, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    n_received: int
    """Parts of the body that the app has read."""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one line of an error; fails for anything else."""
        text = self.json()["error"]
        assert self.json().keys() == {"error"}
        assert text
        assert "\n" not in text
        assert "Traceback" not in text
        return text


class AsgiClient:
    def __init__(self, app: Any) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()

    def run(self, work: Coroutine) -> Any:
        return self.loop.run_until_complete(work)

    def post(self, path: str, value: Any, **headers: str) -> Answer:
        return self.send("POST", path, value if isinstance(value, bytes) else json.dumps(value).encode(), **headers)

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        return self.run(self.request(method, path, body, **headers))

    async def request(self, method: str, path: str, body: bytes | AsyncIterator[bytes] = b"", **headers: str) -> Answer:
        """`headers` as keywords: content_type="text/plain"; JSON is the default. A stream is sent without a length."""
        given = {"content_type": "application/json"} | headers
        if isinstance(body, bytes):
            given = {"content_length": str(len(body))} | given
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surrogatepass"),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        parts = _parts(body)
        received = 0
        sent: list[dict] = []

        async def receive() -> dict:
            nonlocal received
            received += 1
            return await anext(parts, {"type": "http.disconnect"})

        async def send(message: dict) -> None:
            sent.append(message)

        try:
            await self.app(scope, receive, send)
        finally:
            await parts.aclose()
        start, *rest = sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, b"".join(m.get("body", b"") for m in rest), received)


async def _parts(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[dict]:
    if isinstance(body, bytes):
        yield {"type": "http.request", "body": body, "more_body": False}
        return
    async for part in body:
        yield {"type": "http.request", "body": part, "more_body": True}
    yield {"type": "http.request", "body": b"", "more_body": False}
