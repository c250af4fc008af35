"""Loads a running `graphhash serve` while slow clients and an endless header lean on it; Python's standard library alone.

    graphhash serve out/bundle --port 8000
    python examples/slow_clients.py http://127.0.0.1:8000 42 43 44 --seconds 60 --slow 100

Slow clients send a byte of a request's head every half second, and connect again when the server closes. The endless header is sent as fast
as the server takes it. Meanwhile `--workers` threads ask for recommendations. The result is one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


@dataclass
class Load:
    """The clients of one test, and what they have counted."""

    host: str
    port: int
    bodies: list[bytes]
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    slow_connections: int = 0
    endless_bytes: int = 0

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=30)

    def ask(self) -> None:
        """Ask for recommendations until the end, over one connection."""
        client = http.client.HTTPConnection(self.host, self.port, timeout=30)
        n = 0
        while not self.stop.is_set():
            start, reason = time.perf_counter(), ""
            try:
                headers = {"Content-Type": "application/json"}
                client.request("POST", "/v1/recommend", self.bodies[n % len(self.bodies)], headers)
                response = client.getresponse()
                response.read()
                if response.status != 200:
                    reason = f"status {response.status}"
            except (OSError, http.client.HTTPException) as error:
                reason = repr(error)
                client.close()
            n += 1
            with self.lock:
                self.seconds.append(time.perf_counter() - start)
                if reason:
                    self.failures.append(reason)

    def be_slow(self) -> None:
        """Send a head byte by byte, again and again."""
        while not self.stop.is_set():
            with suppress(OSError), self.connect() as connection:
                with self.lock:
                    self.slow_connections += 1
                for i in range(10**6):
                    connection.sendall(HEAD[i : i + 1] or b"x")
                    if self.stop.wait(0.5):
                        return

    def be_endless(self) -> None:
        """Send a header without an end, again and again."""
        while not self.stop.is_set():
            with suppress(OSError), self.connect() as connection:
                connection.sendall(HEAD)
                while not self.stop.is_set():
                    sent = connection.send(b"x" * 65536)
                    with self.lock:
                        self.endless_bytes += sent
            self.stop.wait(0.05)

    def run(self, seconds: float, workers: int, slow: int, endless: int) -> dict[str, float | list[str]]:
        """Let all clients run together, and sum up."""
        threads = [threading.Thread(target=self.ask) for _ in range(workers)]
        threads += [threading.Thread(target=self.be_slow) for _ in range(slow)]
        threads += [threading.Thread(target=self.be_endless) for _ in range(endless)]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join()
        taken = sorted(self.seconds)
        return {
            "requests": len(taken),
            "failed": len(self.failures),
            "reasons": sorted(set(self.failures))[:5],
            "p50_ms": round(1000 * taken[len(taken) // 2], 2),
            "p99_ms": round(1000 * taken[int(0.99 * len(taken))], 2),
            "slow_connections": self.slow_connections,
            "endless_mib": round(self.endless_bytes / 2**20, 1),
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Load a running `graphhash serve` beside slow clients.")
    parser.add_argument("server", help="such as http://127.0.0.1:8000")
    parser.add_argument("user_ids", nargs="+")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=4, help="threads that ask")
    parser.add_argument("--slow", type=int, default=100, help="slow clients")
    parser.add_argument("--endless", type=int, default=1, help="clients with an endless header")
    parser.add_argument("--text", action="store_true", help="send ids as text")
    options = parser.parse_args(arguments)
    address = urlsplit(options.server)
    assert address.hostname
    users = options.user_ids if options.text else [int(word) for word in options.user_ids]
    bodies = [json.dumps({"user_ids": [user], "k": 20}).encode() for user in users]
    load = Load(address.hostname, address.port or 80, bodies)
    print(json.dumps(load.run(options.seconds, options.workers, options.slow, options.endless)))


if __name__ == "__main__":
    main()
