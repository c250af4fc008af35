"""``graphhash bench load`` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.cli.options import Epilog, print_table, write_json


@click.command(
    "load",
    cls=Epilog,
    epilog="""
graphhash bench load http://127.0.0.1:8000 --seconds 30 --clients 16
graphhash bench load out/bundle --no-ray --json load.json
graphhash bench load out/bundle --reload-to tomorrow/bundle --seconds 60
""",
)
@click.argument("target", metavar="URL|BUNDLE")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--clients", default=8, show_default=True, type=click.IntRange(min=1), help="Requests at a time.")
@click.option("--users", default=1, show_default=True, type=click.IntRange(min=1), help="Users of a request.")
@click.option("-k", default=20, show_default=True, type=click.IntRange(min=1), help="Items per user.")
@click.option("--reload-to", metavar="BUNDLE", help="After half of the time this bundle takes the place of the first.")
@click.option("--ray/--no-ray", default=True, show_default=True, help="For a BUNDLE: as for graphhash serve.")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(min=1), help="For a BUNDLE.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures to FILE as well.")
def load(
    target: str,
    seconds: float,
    clients: int,
    users: int,
    k: int,
    reload_to: str | None,
    ray: bool,
    replicas: int,
    json_file: str | None,
) -> None:
    """Ask a server for recommendations as fast as it answers: requests per second, p50, p95, p99, failures.

    URL is a running `graphhash serve`; for a BUNDLE one is started, and stopped at the end. Known users are drawn at
    random. A request fails if it is not answered, not with status 200, or not with the items asked for; exit code 1
    says that one has. The clients run here, so on one machine they take their share of it.
    """
    from pipeline.bench.load import bench_load, served
    from serving.bundle import check_bundle

    settings = {"seconds": seconds, "clients": clients, "users": users, "k": k}
    if "://" in target:
        if reload_to is not None:
            raise click.UsageError("--reload-to needs a BUNDLE: replace the folder of a running server yourself")
        result = bench_load(target, **settings)
    else:
        for bundle in filter(None, (target, reload_to)):
            check_bundle(bundle)
        options = ["--replicas", str(replicas)] if ray else ["--no-ray"]
        with served(Path(target), options) as (url, pid, replace):
            at_half = None if reload_to is None else lambda: replace(Path(reload_to))
            result = bench_load(url, at_half=at_half, pid=pid, **settings)
    names = ("requests", "failed", "requests_per_s", "p50_ms", "p95_ms", "p99_ms", "max_ms")
    print_table(
        ("requests", "failed", "a second", "p50 ms", "p95 ms", "p99 ms", "max ms"), [[f"{result[n]}" for n in names]]
    )
    for name, answers in result["bundles"].items():
        print(f"bundle {name}: {answers} answers")
    if "reload_s" in result:
        print(
            "the new bundle never answered"
            if result["reload_s"] is None
            else f"new bundle after {result['reload_s']} s"
        )
    if "resident_mib" in result:
        print("resident MiB at the start, half and end: " + ", ".join(map(str, result["resident_mib"])))
    for reason, count in result["failures"].items():
        print(f"{count} x {reason}")
    write_json(json_file, result)
    if result["failed"] or result.get("reload_s", 0) is None:
        sys.exit(1)
