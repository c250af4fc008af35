"""Servers of a bundle over real sockets, and requests to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.bundles.serve import ServeSettings, TlsFiles, bounded_server, build_app
from serving.http.answers import Limits
from serving.http.connections import ConnectionLimits

ROOT = Path(__file__).parents[2]
# To `/v1/recommend` of a small model.
REQUEST = json.dumps({"user_ids": [3], "k": 4}).encode()


def serve_settings(bundle: Path, **options: Any) -> ServeSettings:
    """Settings of a server on a CPU that looks for no newer bundle."""
    return ServeSettings(bundle, Limits(), "cpu", watch_s=0, **options)


@contextmanager
def on_a_thread(
    settings: ServeSettings, connections: ConnectionLimits | None = None, tls: TlsFiles | None = None
) -> Iterator[tuple[str, int]]:
    """A server in this process: (host, port)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = bounded_server(build_app(settings), connections, tls)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serve_command(bundle: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`graphhash serve` in a process of its own: its address, and its process id."""
    command = [sys.executable, "-m", "pipeline", "serve", str(bundle), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "://" in line and " at " in line:
                break
        else:
            raise AssertionError(f"graphhash serve did not start: {lines}")
        # What it says later must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield line.partition(" at ")[2].split()[0], process.pid
    finally:
        process.terminate()
        process.wait(30)


def post(url: str, value: object) -> Any:
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
