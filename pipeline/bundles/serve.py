"""The HTTP server of a bundle: replicas of the app behind Ray Serve, or one process without Ray.

The apps are in `serving.http`; this module only starts and stops them. Every replica watches the bundle's folder by
itself, so a newer bundle reaches all of them without a restart.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ServeError

if TYPE_CHECKING:
    from serving.http.answers import Limits

APPLICATION = "graphhash"
# What a stopping server gives the requests that are under way.
GRACE_S = 10
# prometheus_client's variable: the figures of several processes of one machine, added up.
_METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class ServeSettings:
    """All that a replica needs to know; sent to other processes."""

    bundle: Path
    limits: Limits
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: int = 1
    threads: int | None = None
    """CPU threads of one run of the model; None shares the cores out among the replicas."""
    watch_s: float = 2.0

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.replicas)


def build_app(settings: ServeSettings) -> Any:
    """The ASGI app over the bundle, which is loaded here; BundleError when it cannot be used."""
    from serving.http.app import create_app
    from serving.http.ctr_app import create_ctr_app
    from serving.http.live_bundle import LiveBundle
    from serving.retriever import Retriever
    from serving.scorer import Scorer
    from serving.tasks import model_class

    where = settings.bundle, settings.provider, settings.threads_each
    if model_class(settings.bundle) is Scorer:
        return create_ctr_app(LiveBundle(Scorer, *where), settings.limits, watch_s=settings.watch_s)
    return create_app(LiveBundle(Retriever, *where), settings.limits, watch_s=settings.watch_s)


def serve_alone(settings: ServeSettings, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Answer from this process until SIGINT or SIGTERM, finish what is under way, and raise the signal again.

    Args:
        port: 0 takes a free one.
        ready: called with the address once requests are answered.

    Raises:
        ServeError: the address cannot be bound.
        BundleError: the bundle cannot be used.
    """
    import uvicorn

    with _bound(host, port) as listener:
        config = uvicorn.Config(
            build_app(settings), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S
        )
        server = uvicorn.Server(config)

        def tell() -> None:
            while not server.started:
                time.sleep(0.01)
            ready(_url(host, listener.getsockname()[1]))

        threading.Thread(target=tell, daemon=True).start()
        server.run(sockets=[listener])


def serve_on_ray(settings: ServeSettings, host: str, port: int, ready: Callable[[str], None]) -> None:
    """As :func:`serve_alone`, from `settings.replicas` processes behind Ray Serve, on a Ray that goes with them."""
    with ray_serve(settings, host, port) as url:
        ready(url)
        threading.Event().wait()


@contextmanager
def ray_serve(settings: ServeSettings, host: str, port: int) -> Iterator[str]:
    """Replicas answer at the address that is yielded, for the length of the block; errors as for `serve_alone`."""
    import ray

    from pipeline.distributed.session import ray_session
    from serving import open_bundle

    # The replicas would fail in other processes, again and again; here the reason can be told.
    provider = open_bundle(settings.bundle, settings.provider, settings.threads_each).provider
    with _bound(host, port) as listener:
        port = listener.getsockname()[1]
    figures = tempfile.mkdtemp(prefix="graphhash-metrics-")
    joined = ray.is_initialized()
    try:
        with ray_session(num_cpus=max(os.cpu_count() or 1, settings.replicas)):
            serve = _import_ray_serve()
            serve.start(
                http_options={"host": host, "port": port, "request_timeout_s": settings.limits.timeout_s + GRACE_S}
            )
            serve.run(_deployment(serve, settings, provider, figures), name=APPLICATION, route_prefix="/")
            try:
                yield _url(host, port)
            finally:
                # Lets the replicas finish what is under way; the rest goes with Ray.
                with suppress(Exception):
                    serve.delete(APPLICATION)
                    if joined:
                        serve.shutdown()
    finally:
        shutil.rmtree(figures, ignore_errors=True)


def _deployment(serve: Any, settings: ServeSettings, provider: str, figures: str) -> Any:
    import ray

    def build() -> Any:
        return build_app(settings)

    n_gpus = ray.cluster_resources().get("GPU", 0) if provider == "cuda" else 0
    replica = serve.deployment(
        name="replica",
        num_replicas=settings.replicas,
        # The app bounds what waits by itself, and batches what Serve's own bound would hold back.
        max_ongoing_requests=settings.limits.max_waiting + 100,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": min(1, n_gpus / settings.replicas),
            "runtime_env": {"env_vars": {_METRICS_DIR: figures}} if settings.replicas > 1 else {},
        },
    )
    return replica(serve.ingress(build)()).bind()


def _import_ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ServeError(
            f"Ray Serve cannot be imported ({error.name or error} is missing); install graphhash again, or serve with --no-ray"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; the refusal of the system as a ServeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by connections. Otherwise a body waits for the acknowledgement of its head, for 40 ms: asyncio sets it for sockets
        # of its own.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ServeError(f"cannot listen at {host}:{port}: {reason}; choose another --port or --host") from error
        yield listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
