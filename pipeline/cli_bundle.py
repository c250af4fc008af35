"""``graphhash check`` and ``graphhash bench serve``: what a bundle is, and how fast it answers."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli_options import Epilog, print_table, say, write_json


@click.command(
    cls=Epilog,
    epilog="""
graphhash check out/bundle
graphhash check out/bundle --provider cuda --json findings.json
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--json", "json_file", metavar="FILE", help="Write the findings to FILE as well.")
def check(bundle: str, provider: str, json_file: str | None) -> None:
    """Verify everything about a bundle, and explain it: files, hashes, inputs, types, ranges of maps, a trial request, providers.

    Ends with code 1 and one line at the first thing that is wrong.
    """
    from pipeline.bundle_check import check as findings_of

    findings = []
    for finding in findings_of(Path(bundle), provider):
        print(f"ok  {finding.what:<16} {finding.text}", flush=True)
        findings.append({"what": finding.what, "text": finding.text})
    write_json(json_file, findings)


@click.command(
    "serve",
    cls=Epilog,
    epilog="""
graphhash bench serve out/bundle
graphhash bench serve out/bundle --against full/bundle --threads 2 --plot latency.png --json figures.json
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--against", metavar="BUNDLE", help="Another bundle, such as one of method full: the table as it would be without us.")
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a request.  [one per core]")
@click.option("-k", default=20, show_default=True, type=click.IntRange(min=1), help="Items per user; ctr: no matter.")
@click.option("--requests", default=200, show_default=True, type=click.IntRange(min=5), help="Timed requests of one user each; larger ones fewer.")
@click.option("--seed", default=0, show_default=True, help="Draws the users, or values of rows.")
@click.option("--plot", metavar="FILE", default="bench_serve.png", show_default=True, help="Draw latency and throughput.")
@click.option("--markdown", metavar="FILE", help="Write the table to FILE as markdown.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures to FILE, an object per row printed.")
def bench_serve(
    bundle: str,
    against: str | None,
    provider: str,
    threads: int | None,
    k: int,
    requests: int,
    seed: int,
    plot: str,
    markdown: str | None,
    json_file: str | None,
) -> None:
    """Time a bundle's answers, from raw ids to raw ids, for 1 to 256 users a request; of a click-through model, rows and probabilities.

    Next to it run the bundle of --against and, where the bundle lies in its run folder, the trained model in PyTorch eager, by turns, so that
    a slow minute of the machine hits all of them. Resident memory is measured in a fresh process per bundle: what loading it adds, and what
    requests of 1 and of 256 users leave behind (proportional set size).
    """
    from pipeline.bench_serve import bench, draw, markdown_table, size_table

    results = bench(
        Path(bundle), against and Path(against), provider=provider, threads=threads, k=k, n_requests=requests, seed=seed, say=say
    )
    header, *rows = size_table(results)
    print_table(header, rows)
    print()
    header, *rows = markdown_table(results)
    print_table(header, rows)
    draw(results, Path(plot))
    print(f"\nplot: {plot}")
    if markdown is not None:
        from pipeline.bench_serve import as_markdown

        Path(markdown).write_text(as_markdown(results), encoding="utf-8")
    write_json(json_file, results)
