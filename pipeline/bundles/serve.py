"""The HTTP server of a bundle: replicas of the app behind Ray Serve, or one process without Ray.

The apps are in `serving.http`; this module only starts and stops them. Every replica watches the bundle's folder by
itself, so a newer bundle reaches all of them without a restart.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import ssl
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
    import uvicorn

    from serving.http.access import Access
    from serving.http.answers import Limits
    from serving.http.app import RetrievalOptions
    from serving.http.connections import ConnectionLimits

APPLICATION = "graphhash"
# What a stopping server gives the requests that are under way.
GRACE_S = 10
# prometheus_client's variable: the figures of several processes of one machine, added up.
_METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class TlsFiles:
    """Files in PEM format; the certificate with the chain behind it."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class ServeSettings:
    """All that a replica needs to know; sent to other processes."""

    bundle: Path | str
    """A folder, or a URI of one, which each replica copies."""
    limits: Limits
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: int = 1
    threads: int | None = None
    """CPU threads of one run of the model; None shares the cores out among the replicas."""
    watch_s: float = 2.0
    access: Access | None = None
    """Who may ask; None: everybody."""
    options: RetrievalOptions | None = None
    """Of a retrieval bundle; None: no explanations, no titles."""

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.replicas)


def build_app(settings: ServeSettings) -> Any:
    """The ASGI app over the bundle, which is loaded here.

    Raises:
        BundleError: it cannot be used.
        DataError: nothing is at its URI, or it cannot be read.
        ServeError: the settings are for a bundle of the other task.
    """
    from pipeline.storage.uris import bundle_folder, is_uri
    from serving.http.app import create_app
    from serving.http.ctr_app import create_ctr_app
    from serving.http.live_bundle import LiveBundle
    from serving.retriever import Retriever
    from serving.scorer import Scorer
    from serving.tasks import model_class

    where = str(settings.bundle)
    folder = bundle_folder(where)
    fetch = (lambda: bundle_folder(where)) if is_uri(where) else None
    is_ctr = model_class(folder) is Scorer
    if is_ctr and settings.options is not None:
        raise ServeError(f"{where}: a CTR bundle, which has neither explanations nor titles; leave the options out")
    common: dict[str, Any] = {"access": settings.access, "watch_s": settings.watch_s}
    if is_ctr:
        scorer = LiveBundle(Scorer, folder, settings.provider, settings.threads_each, fetch=fetch)
        return create_ctr_app(scorer, settings.limits, **common)
    retriever = LiveBundle(Retriever, folder, settings.provider, settings.threads_each, fetch=fetch)
    return create_app(retriever, settings.limits, options=settings.options, **common)


def bounded_server(
    app: Any, connections: ConnectionLimits | None = None, tls: TlsFiles | None = None
) -> uvicorn.Server:
    """uvicorn's server with bounded connections.

    Raises:
        ServeError: certificate and key cannot be used.
    """
    import uvicorn

    from serving.http.connections import BoundedServer, ConnectionLimits, bounded_protocol

    connections = connections or ConnectionLimits()
    if tls is not None:
        _check_tls(tls)
    config = uvicorn.Config(
        app,
        http=bounded_protocol(connections),
        ws="none",
        # A warning per malformed request would let strangers fill the log.
        log_level="error",
        access_log=False,
        timeout_keep_alive=connections.keep_alive_s,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
    )
    return BoundedServer(config, connections)


def serve_alone(
    settings: ServeSettings,
    host: str,
    port: int,
    ready: Callable[[str], None],
    *,
    connections: ConnectionLimits | None = None,
    tls: TlsFiles | None = None,
) -> None:
    """Answer from this process until SIGINT or SIGTERM, finish what is under way, and raise the signal again.

    Args:
        port: 0 takes a free one.
        ready: called with the address once requests are answered.
        connections: their bounds; None: the defaults.
        tls: for https.

    Raises:
        ServeError: the address cannot be bound, or the TLS files cannot be used.
        BundleError: the bundle cannot be used.
    """
    with _bound(host, port) as listener:
        server = bounded_server(build_app(settings), connections, tls)

        def tell() -> None:
            while not server.started:
                time.sleep(0.01)
            ready(_url(host, listener.getsockname()[1], "http" if tls is None else "https"))

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
    from pipeline.storage.uris import bundle_folder
    from serving import open_bundle

    # The replicas would fail in other processes, again and again; here the reason can be told.
    provider = open_bundle(bundle_folder(str(settings.bundle)), settings.provider, settings.threads_each).provider
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
            f"Ray Serve cannot be imported ({error.name or error} is missing); pip install 'graphhash[ray]', or serve without --ray"
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


def _check_tls(tls: TlsFiles) -> None:
    def refuse_password() -> str:
        raise ServeError(f"{tls.key}: protected by a password, which nobody can type here; remove it (openssl pkey)")

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tls.certificate, tls.key, refuse_password)
    except OSError as error:  # Of OpenSSL's errors, too.
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ServeError(
            f"{tls.certificate}, {tls.key}: no certificate with its key ({reason}); give PEM files that belong together"
        ) from error


def _url(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
