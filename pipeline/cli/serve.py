"""``graphhash serve`` on the command line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import Epilog

if TYPE_CHECKING:
    from pipeline.bundles.serve import ServeSettings

_log = logging.getLogger(__name__)


@click.command(
    cls=Epilog,
    epilog="""
graphhash serve out/bundle
graphhash serve out/bundle --explain --titles titles.csv
graphhash serve s3://bucket/runs/a/bundle --host 0.0.0.0 --allow-host shop.example --token-file tokens.txt
graphhash serve out/bundle --ray --port 9000 --replicas 4 --threads 2
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: everybody who reaches this machine.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option(
    "--ray/--no-ray", default=False, show_default=True, help="--ray: replicas behind Ray Serve, not one process."
)
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(min=1), help="Processes; needs --ray.")
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
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name that requests may ask for, such as shop.example or *.shop.example; may be given many times.  "
    "[on loopback: its names; else all]",
)
@click.option(
    "--token-file", metavar="FILE", help="Bearer tokens, one a line; requests need one, health routes do not."
)
@click.option("--tls-certificate", metavar="FILE", help="PEM file with the certificate and its chain: https.")
@click.option("--tls-key", metavar="FILE", help="PEM file with the certificate's private key.")
@click.option("--max-connections", type=click.IntRange(min=1), help="Open ones.  [512]")
@click.option("--explain", is_flag=True, help="/v1/explain and the page show buckets, and known user ids.")
@click.option("--titles", metavar="FILE", help="CSV file with the columns item_id and title, for the page.")
def serve(
    bundle: str, host: str, port: int, ray: bool, tls_certificate: str | None, tls_key: str | None, **options: Any
) -> None:
    """Answer over HTTP from an exported bundle: recommendations, scores, health, metrics, and a page at /; of a CTR model, probabilities.

    BUNDLE is a folder or a URI. POST /v1/recommend {"user_ids": [42], "k": 20, "exclude": [[7]]} and POST /v1/score {"user_id": 42,
    "item_ids": [7, 8]}; of a CTR model POST /v1/predict {"rows": [{"user_id": 42, ...}]}. /docs describes all fields. When the bundle's
    folder, or a link in its place, is replaced, the new bundle answers within --watch seconds plus its loading, and no request is dropped.
    A bundle that fails its check or takes ids of other types is refused, one that cannot be loaded is tried again, and meanwhile the old
    one answers (/readyz says why). Ctrl-C stops.
    """
    from pipeline.bundles.serve import TlsFiles, serve_alone, serve_on_ray

    if not ray and options["replicas"] > 1:
        raise click.UsageError(f"--replicas {options['replicas']} needs Ray Serve: add --ray")
    if (tls_certificate is None) != (tls_key is None):
        raise click.UsageError("--tls-certificate and --tls-key belong together: give both")
    if ray and (tls_certificate or options["max_connections"]):
        raise click.UsageError(
            "Ray's proxy holds the connections: leave --tls-certificate and --max-connections out, or --ray"
        )
    settings = _settings(bundle, host, options)

    def ready(url: str) -> None:
        _log.info("%s at %s (page), %s/docs; Ctrl-C stops", bundle, url, url)

    try:
        if ray:
            serve_on_ray(settings, host, port, ready)
        else:
            from serving.http.connections import ConnectionLimits

            tls = TlsFiles(Path(tls_certificate), Path(tls_key)) if tls_certificate and tls_key else None
            most = options["max_connections"]
            connections = ConnectionLimits(most) if most else None
            serve_alone(settings, host, port, ready, connections=connections, tls=tls)
    except KeyboardInterrupt:
        _log.info("stopped")
        sys.exit(0)


def _settings(bundle: str, host: str, options: dict[str, Any]) -> ServeSettings:
    """What the replicas need to know, out of the command's options."""
    from pipeline.bundles.serve import ServeSettings
    from pipeline.storage.uris import is_uri
    from serving.http.access import LOOPBACK_HOSTS, Access, read_tokens
    from serving.http.answers import Limits
    from serving.http.app import RetrievalOptions
    from serving.http.titles import read_titles

    hosts = options["allowed_hosts"] or (LOOPBACK_HOSTS if host in LOOPBACK_HOSTS else None)
    token_file, titles = options["token_file"], options["titles"]
    shown = None
    if options["explain"] or titles:
        shown = RetrievalOptions(options["explain"], read_titles(Path(titles)) if titles else {})
    return ServeSettings(
        bundle=bundle if is_uri(bundle) else Path(bundle).absolute(),
        limits=Limits(
            max_body_bytes=int(options["max_body_mib"] * 2**20),
            max_users=options["max_batch"],
            max_k=options["max_k"],
            timeout_s=options["timeout"],
        ),
        provider=options["provider"],
        replicas=options["replicas"],
        threads=options["threads"],
        watch_s=options["watch"],
        access=Access(hosts, read_tokens(Path(token_file)) if token_file else ()),
        options=shown,
    )
