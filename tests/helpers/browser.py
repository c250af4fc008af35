"""A page in Chromium on a phone's screen, by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE_WIDTH = 390


@dataclass(frozen=True)
class Visit:
    """What was seen: `values` of the expressions, messages of the console, and a picture (PNG)."""

    values: list[Any]
    console: list[str]
    picture: bytes


def on_a_phone(url: str, *expressions: str) -> Visit:
    """Open the page, wait until it has nothing under way, and evaluate the expressions one after the other; promises are awaited."""
    return asyncio.run(_visit(url, expressions))


async def _visit(url: str, expressions: Sequence[str]) -> Visit:
    import aiohttp

    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(90), aiohttp.ClientSession() as session:
                port = await _port(Path(profile))
                async with session.get(f"http://127.0.0.1:{port}/json") as response:
                    target = next(page for page in await response.json() if page["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return await _look(socket, url, expressions)
        finally:
            process.terminate()
            process.wait(30)


async def _look(socket: Any, url: str, expressions: Sequence[str]) -> Visit:
    number, console, idle = 0, [], set()

    def note(message: dict[str, Any]) -> None:
        method, content = message.get("method"), message.get("params", {})
        if method == "Log.entryAdded":
            console.append(content["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            console.append(str(content))
        elif method == "Page.lifecycleEvent" and content["name"] == "networkIdle":
            idle.add(content["loaderId"])

    async def call(method: str, **parameters: Any) -> Any:
        nonlocal number
        number += 1
        await socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await socket.receive_json()
            note(message)
            if message.get("id") == number:
                return message.get("result", message)

    for domain in ("Page", "Log", "Runtime"):
        await call(f"{domain}.enable")
    await call("Emulation.setDeviceMetricsOverride", width=PHONE_WIDTH, height=844, deviceScaleFactor=1, mobile=True)
    await call("Page.setLifecycleEventsEnabled", enabled=True)
    loader = (await call("Page.navigate", url=url))["loaderId"]
    # Half a second without a request under way.
    while loader not in idle:
        note(await socket.receive_json())
    values = []
    for expression in expressions:
        got = await call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        values.append(got["result"].get("value"))
    picture = await call("Page.captureScreenshot", captureBeyondViewport=True)
    return Visit(values, console, base64.b64decode(picture["data"]))


async def _port(profile: Path) -> int:
    """Chromium writes the port that it took into its profile."""
    while True:
        with suppress(OSError, ValueError, IndexError):
            return int((profile / "DevToolsActivePort").read_text().split()[0])
        await asyncio.sleep(0.05)
