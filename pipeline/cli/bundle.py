"""``graphhash recommend``, ``predict``, ``check`` and ``bench serve``: what a bundle answers, what it is, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from graphhash.errors import DataError
from pipeline.cli.command import Epilog
from pipeline.cli.log_options import csv_options
from pipeline.cli.output import json_option, print_table, write_json
from pipeline.cli.settings import log_settings

if TYPE_CHECKING:
    from pipeline.logs.csv import CsvFormat


@click.command(
    cls=Epilog,
    epilog="""
graphhash recommend out/bundle --user-id 42 -k 10
graphhash recommend out/bundle --user-id anna --user-id ben --exclude-seen
graphhash recommend out/bundle --users-file users.txt --exclude 17,99 --json answers.json
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--user-id", "user_ids", multiple=True, metavar="ID", help="A raw user id; may be given many times.")
@click.option("--users-file", metavar="FILE", help="Raw user ids, one a line, as they stand.")
@click.option("-k", default=20, show_default=True, type=click.IntRange(min=1), help="Items per user.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="ID,ID...",
    help="Raw item ids never to recommend, as they stand between the commas; may be given many times.",
)
@click.option("--exclude-file", metavar="FILE", help="Raw item ids never to recommend, one a line, as they stand.")
@click.option("--exclude-seen", is_flag=True, help="Leave out what a user had in training (needs the run folder).")
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--threads", type=int, help="Threads of ONNX Runtime.  [one per core]")
@json_option("the answers")
def recommend(
    bundle: str,
    user_ids: tuple[str, ...],
    users_file: str | None,
    k: int,
    exclude: tuple[str, ...],
    exclude_file: str | None,
    exclude_seen: bool,
    provider: Literal["auto", "cpu", "cuda"],
    threads: int | None,
    json_file: str | None,
) -> None:
    """Ask an exported bundle for items, by raw user id. Users it does not know get its fallback, and are marked."""
    from pipeline.bundles.recommend import read_ids
    from pipeline.bundles.recommend import recommend as answer_users
    from pipeline.storage.uris import bundle_folder

    def ids_of(file: str | None) -> tuple[str, ...]:
        try:
            return () if file is None else tuple(read_ids(Path(file)))
        except DataError as error:
            raise click.UsageError(str(error)) from error

    user_ids += ids_of(users_file)
    if not user_ids:
        raise click.UsageError("give --user-id ID or --users-file FILE")
    excluded = [part for given in exclude for part in given.split(",") if part]
    answers = answer_users(
        bundle_folder(bundle),
        user_ids,
        k,
        exclude=[*excluded, *ids_of(exclude_file)],
        exclude_seen=exclude_seen,
        provider=provider,
        threads=threads,
    )
    for answer in answers:
        print(f"user {answer['user_id']}" + ("" if answer["known"] else " (out of vocabulary: the OOV row answers)"))
        rows = [(str(i + 1), str(item["item_id"]), f"{item['score']:.4f}") for i, item in enumerate(answer["items"])]
        print_table(("rank", "item", "score"), rows)
    write_json(json_file, answers)


@click.command(
    cls=Epilog,
    epilog="""
graphhash predict ctr/bundle --data today.parquet --out scored.parquet
graphhash predict ctr/bundle --data "days/*.csv" --out scored.csv --keep user_id,item_id --column p_click
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--data", "log", required=True, metavar="PATH", help="Rows to score: a file, folder or glob (csv, tsv, parquet)."
)
@click.option("--out", required=True, metavar="FILE", help="File to write: .parquet, .csv or .tsv.")
@click.option("--column", default="probability", show_default=True, metavar="NAME", help="Its column of predictions.")
@click.option("--keep", metavar="NAME,NAME...", help="Columns of the rows to write beside them.  [all]")
@csv_options
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.  [one per core]")
def predict(
    bundle: str,
    log: str,
    out: str,
    column: str,
    keep: str | None,
    provider: Literal["auto", "cpu", "cuda"],
    threads: int | None,
    **csv: Any,
) -> None:
    """Score rows with an exported CTR bundle: writes them with a column of click probabilities.

    Raw values go in as they are in the log; labels are not needed. Rows are read in batches, so a log may be larger than the memory.
    """
    from pipeline.bundles.predict import predict_files
    from pipeline.storage.uris import bundle_folder

    predicted = predict_files(
        bundle_folder(bundle),
        log,
        Path(out),
        column=column,
        keep=None if keep is None else [name.strip() for name in keep.split(",")],
        layout=_csv_layout(csv),
        provider=provider,
        threads=threads,
    )
    print(f"{out}: {predicted.text()}")


def _csv_layout(csv: dict[str, Any]) -> CsvFormat:
    """How csv files are written, by the options of :data:`csv_options`."""
    from pipeline.logs.csv import CsvFormat

    settings = log_settings(csv, ("separator", "encoding"))
    return CsvFormat(**settings | {"columns": settings.get("columns") or ()})


@click.command(
    cls=Epilog,
    epilog="""
graphhash check out/bundle
graphhash check out/bundle --provider cuda --json findings.json
graphhash check ctr/bundle --against today.parquet
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--against",
    metavar="FILE",
    help="ctr: labelled samples (csv, tsv, parquet): log loss, AUC, and calibration by tenths of the predictions.",
)
@click.option("--label-column", metavar="NAME", help="With --against: its labels.  [as in training]")
@csv_options
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@json_option("the findings")
def check(
    bundle: str,
    against: str | None,
    label_column: str | None,
    provider: Literal["auto", "cpu", "cuda"],
    json_file: str | None,
    **csv: Any,
) -> None:
    """Verify everything about a bundle, and explain it: files, hashes, inputs, types, ranges of maps, a trial request, providers.

    Ends with code 1 and one line at the first thing that is wrong. With --against it also predicts labelled samples, such as those of
    today, and compares: a click bundle drifts when its mean prediction leaves the share of positive labels.
    """
    from pipeline.bundles.check import check as findings_of
    from pipeline.storage.uris import bundle_folder

    folder = bundle_folder(bundle)
    findings: list[dict[str, Any]] = []
    for finding in findings_of(folder, provider):
        print(f"ok  {finding.what:<16} {finding.text}", flush=True)
        findings.append({"what": finding.what, "text": finding.text})
    if against is not None:
        from pipeline.bundles.against import check_against

        found = check_against(folder, against, label=label_column, layout=_csv_layout(csv), provider=provider)
        print(f"    {'against':<16} {found.text()}\n")
        header, *rows = found.table()
        print_table(header, rows)
        findings.append({"what": "against", "text": found.text(), "figures": found.as_dict()})
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
@click.option(
    "--against",
    metavar="BUNDLE",
    help="Another bundle, such as one of method full: the table as it would be without us.",
)
@click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a request.  [one per core]")
@click.option("-k", default=20, show_default=True, type=click.IntRange(min=1), help="Items per user; ctr: no matter.")
@click.option(
    "--requests",
    default=200,
    show_default=True,
    type=click.IntRange(min=5),
    help="Timed requests of one user each; larger ones fewer.",
)
@click.option("--seed", default=0, show_default=True, help="Draws the users, or values of rows.")
@click.option(
    "--plot", metavar="FILE", default="bench_serve.png", show_default=True, help="Draw latency and throughput."
)
@click.option("--markdown", metavar="FILE", help="Write the table to FILE as markdown.")
@json_option("the figures, an object per row printed,")
def bench_serve(
    bundle: str,
    against: str | None,
    provider: Literal["auto", "cpu", "cuda"],
    threads: int | None,
    k: int,
    requests: int,
    seed: int,
    plot: str,
    markdown: str | None,
    json_file: str | None,
) -> None:
    """Time a bundle's answers, from raw ids to raw ids, for 1 to 256 users a request; of a CTR model, rows and probabilities.

    Next to it run the bundle of --against and, where the bundle lies in its run folder, the trained model in PyTorch eager, by turns,
    so that a slow minute of the machine hits all of them. Resident memory is measured in a fresh process per bundle: what loading it
    adds, and what requests of 1 and of 256 users leave behind (proportional set size).
    """
    from pipeline.bench.serving import BenchOptions, bench, draw, markdown_table, size_table
    from pipeline.storage.uris import bundle_folder

    options = BenchOptions(provider=provider, threads=threads, k=k, n_requests=requests, seed=seed)
    results = bench(bundle_folder(bundle), bundle_folder(against) if against else None, options=options)
    header, *rows = size_table(results)
    print_table(header, rows)
    print()
    header, *rows = markdown_table(results)
    print_table(header, rows)
    draw(results, Path(plot))
    print(f"\nplot: {plot}")
    if markdown is not None:
        from pipeline.bench.serving import as_markdown

        Path(markdown).write_text(as_markdown(results), encoding="utf-8")
    write_json(json_file, results)
