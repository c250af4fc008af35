"""``graphhash serve`` on the command line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Literal

import click

from pipeline.cli.options import Epilog

_log = logging.getLogger(__name__)


@click.command(
    cls=Epilog,
    epilog="""
graphhash serve out/bundle
graphhash serve out/bundle --port 9000 --replicas 4 --threads 2
graphhash serve out/bundle --no-ray --host 0.0.0.0
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: everybody who reaches this machine.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--ray/--no-ray", default=True, show_default=True, help="--no-ray: one process, without Ray Serve.")
@click.option(
    "--replicas", default=1, show_default=True, type=click.IntRange(min=1), help="Processes behind Ray Serve."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.  [the cores, shared by the replicas]"
)
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option(
    "--max-batch",
    default=1000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Users, or rows, of a request and of a run.",
)
@click.option("--max-k", default=1000, show_default=True, type=click.IntRange(min=1), help="Items per user.")
@click.option("--max-body-mib", default=4.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option(
    "--timeout",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds for a body, and for an answer.",
)
@click.option(
    "--watch",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds between looks for a newer bundle; 0: none.",
)
def serve(
    bundle: str,
    host: str,
    port: int,
    ray: bool,
    replicas: int,
    threads: int | None,
    provider: Literal["auto", "cpu", "cuda"],
    max_batch: int,
    max_k: int,
    max_body_mib: float,
    timeout: float,
    watch: float,
) -> None:
    """Answer over HTTP from an exported bundle: recommendations, scores, health, metrics, and a page at /; of a CTR model, probabilities.

    POST /v1/recommend {"user_ids": [42], "k": 20, "exclude": [[7]]} and POST /v1/score {"user_id": 42, "item_ids": [7, 8]}; of a CTR
    model POST /v1/predict {"rows": [{"user_id": 42, ...}]}. /docs describes all fields. When the bundle's folder, or a link in its place,
    is replaced, the new bundle answers within --watch seconds plus its loading, and no request is dropped. A bundle that fails its check
    or takes ids of other types is refused, one that cannot be loaded is tried again, and meanwhile the old one answers (/readyz says why).
    There is no authentication: put a proxy that has it in front before --host opens the server to others. Ctrl-C stops.
    """
    from pipeline.bundles.serve import ServeSettings, serve_alone, serve_on_ray
    from serving.http.answers import Limits

    if not ray and replicas > 1:
        raise click.UsageError(f"--replicas {replicas} needs Ray Serve: leave --no-ray out")
    limits = Limits(max_body_bytes=int(max_body_mib * 2**20), max_users=max_batch, max_k=max_k, timeout_s=timeout)
    settings = ServeSettings(Path(bundle).absolute(), limits, provider, replicas, threads, watch)

    def ready(url: str) -> None:
        _log.info("%s at %s (page), %s/docs; Ctrl-C stops", bundle, url, url)

    try:
        (serve_on_ray if ray else serve_alone)(settings, host, port, ready)
    except KeyboardInterrupt:
        _log.info("stopped")
        sys.exit(0)
