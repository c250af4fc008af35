"""The commands `graphhash bench ...`: the speed of ingestion, clustering, training, evaluation and serving on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Epilog, Lists, Values, group
from pipeline.cli.log_options import bad_rows_option, csv_options, ctr_data_options, kind_options, task_option
from pipeline.cli.output import json_option, print_table, write_json
from pipeline.cli.settings import log_settings
from pipeline.config.choices import CTR_MODELS, FORMATS, LOSSES, MODELS
from pipeline.errors import ConfigError

# The options of a log, which are settings of the section data.
LOG_OPTIONS = (
    "format",
    "split",
    "user_column",
    "item_column",
    "user_kind",
    "item_kind",
    "weight_column",
    "separator",
    "encoding",
    "bad_rows",
)
CTR_LOG_OPTIONS = ("label_column", "schema", "min_count")


_rounds_option = click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed runs per program; medians are reported.",
)
_json_option = json_option("the figures, an object per row printed,")


# The options of a log, with the values that they have without a run folder.
_log_options = group(
    click.option("--format", type=click.Choice(FORMATS), default="auto", show_default=True, help="Format of the log."),
    click.option(
        "--split",
        type=click.Choice(("random", "given")),
        default="random",
        help="random: draw the test set; given: the data set's own test file.  [random]",
    ),
    click.option("--user-column", metavar="NAME", default="user_id", help="Column of user ids.  [user_id]"),
    click.option("--item-column", metavar="NAME", default="item_id", help="Column of item ids.  [item_id]"),
    kind_options,
    csv_options,
    click.option("--weight-column", metavar="NAME", help="Column of weights; without it every row weighs 1."),
    bad_rows_option,
)


@click.group()
def bench() -> None:
    """Measure speed on this machine: ingestion and clustering against other programs, training and evaluation by phase, a server's load.

    \b
    Examples:
      graphhash bench ingest --rows 1000000
      graphhash bench cluster --interactions 100000
      graphhash bench train --data gowalla --split given
    """


@bench.command(
    "cluster",
    cls=Epilog,
    epilog="""
graphhash bench cluster --data gowalla --split given --resolution 1 --resolution 200
graphhash bench cluster --interactions 100000 --interactions 1000000 --plot cost.png --json figures.json
graphhash bench cluster --interactions 10000000 --peer scikit-network --peer networkit --rounds 1
""",
)
@click.option("--data", metavar="PATH", help="A log to cluster as a whole (with --split given its train file).")
@_log_options
@click.option("--interactions", type=int, multiple=True, help="Edges of a planted graph; may be repeated.")
@click.option("--users", type=int, help="Users of the planted graphs.  [a tenth of the interactions]")
@click.option("--items", type=int, help="Items of the planted graphs.  [a fiftieth of the interactions]")
@click.option("--communities", type=int, help="Communities planted.  [a hundredth of the items]")
@click.option("--mixing", default=0.5, show_default=True, help="Share of planted edges between communities.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same planted graphs.")
@click.option(
    "--resolution", type=float, multiple=True, default=(1.0,), help="Of the modularity; may be repeated.  [1]"
)
@click.option(
    "--peer",
    multiple=True,
    metavar="NAME",
    help="A program to compare with: scikit-network, networkit, igraph; scikit-network-fine and igraph-fine take longer for"
    " better communities; may be repeated.  [those installed]",
)
@_rounds_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the programs that have them.  [one per core]")
@click.option("--plot", metavar="FILE", help="Draw seconds against edges.  [bench_cluster.png with several graphs]")
@_json_option
def bench_cluster(
    data: str | None,
    interactions: tuple[int, ...],
    peer: tuple[str, ...],
    plot: str | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Cluster with GraphHash and with other programs, in turns, and print speed, quality and memory.

    Speedup is a program's seconds over those of GraphHash, Q ratio the modularity of GraphHash over the program's: above 1
    GraphHash is ahead. Q is Barber's modularity for all of them. Only the clustering is timed, from a CSR matrix in memory,
    with the transposition that GraphHash makes. Memory is the peak of a fresh process per program, interpreter and graph
    included. `pip install 'graphhash[bench]'` installs scikit-network; networkit and igraph are used where installed.
    """
    if data is None and not interactions:
        raise click.UsageError("give --data PATH or --interactions N")
    from pipeline.bench.clustering import ClusteringBench, bench, by_setting, draw, planted_sizes
    from pipeline.bench.clustering_peers import choose_programs
    from pipeline.config.run_config import DataConfig

    settings = ClusteringBench(
        resolutions=options["resolution"],
        programs=choose_programs(peer),
        rounds=options["rounds"],
        threads=options["threads"],
    )
    sizes = [options[key] for key in ("users", "items", "communities")]
    drawing = {key: options[key] for key in ("mixing", "seed")}
    planted = [planted_sizes(n, *sizes) | drawing for n in interactions]
    log = None
    if data is not None:
        log = DataConfig(str(Path(data).absolute()), validation=0.0, test=0.0, **log_settings(options, LOG_OPTIONS))
    results = bench(log, planted, settings)
    for title, (header, *lines), phases in by_setting(results):
        print(f"\n{title}")
        print_table(header, lines)
        print(phases)
    write_json(json_file, results)
    if plot or len({entry["graph"] for entry in results}) > 1:
        draw(results, Path(plot or "bench_cluster.png"))
        print(f"\nplot: {plot or 'bench_cluster.png'}")


@bench.command(
    "ingest",
    cls=Epilog,
    epilog="""
graphhash bench ingest --rows 1000000
graphhash bench ingest --rows 10000000 --ids string --rounds 5 --json figures.json
graphhash bench ingest --rows 10000000 --format csv
""",
)
@click.option("--rows", type=click.IntRange(min=1000), default=10_000_000, show_default=True, help="Rows of the log.")
@click.option(
    "--ids",
    type=click.Choice(("integer", "string")),
    default="integer",
    show_default=True,
    help="Ids such as 1000012345, or as user-001000012345.",
)
@click.option(
    "--format", type=click.Choice(("parquet", "csv")), default="parquet", show_default=True, help="Of the log."
)
@_rounds_option
@click.option("--seed", default=0, show_default=True, help="Same seed, same log.")
@json_option("the figures, an object per program,")
def bench_ingest(json_file: str | None, **options: Any) -> None:
    """Ingest a synthetic log with GraphHash and with polars, in turns, and print seconds, rows a second and peak memory by phase.

    GraphHash runs the whole ingest stage, with its checks, splits, checksums and files. polars, where it is installed
    (`pip install 'graphhash[bench]'`), does the core of it in memory: read, a code for each id, pairs without duplicates in order of
    users, and the CSR matrix in both directions. Every run has a fresh process; a log of a thousand rows comes first, untimed.
    """
    from pipeline.bench.ingestion import IngestionBench, bench, table

    results = bench(IngestionBench(**options))
    print_table(*table(results))
    write_json(json_file, results)


@bench.command(
    "train",
    cls=Lists,
    epilog="""
graphhash bench train --data gowalla --split given
graphhash bench train --data gowalla --split given --method soft,graph,full --batch-size 4096 --json figures.json
graphhash bench train --task ctr --data frappe --model dlrm --method graph,double_soft,full
graphhash bench train --data log.parquet --user-column user --item-column item --model lightgcn --epochs 3
graphhash bench train --data gowalla --split given --method soft --workers 1 2
""",
)
@click.option("--data", metavar="PATH", required=True, help="A log: a file, a folder or a quoted glob.")
@_log_options
@task_option
@ctr_data_options
@click.option(
    "--method", default="soft,full", show_default=True, metavar="NAME[,NAME]...", help="As in `graphhash run`."
)
@click.option("--model", type=click.Choice((*MODELS, *CTR_MODELS)), help="As in `graphhash run`.  [mf; ctr: dlrm]")
@click.option("--loss", type=click.Choice(LOSSES), help="As in `graphhash run`.  [bpr]")
@click.option("--dim", default=64, show_default=True, help="Embedding dimension.")
@click.option(
    "--indices-per-id",
    type=click.IntRange(min=1),
    help="Table rows read per id: the number of hash functions.  [the method's]",
)
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the clustering; a higher one gives more table rows.  [200; ctr: 5]",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1024, show_default=True, help="Examples per step.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed epochs per training, after one that is not timed; medians are reported.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same bucket maps and training.")
@click.option(
    "--workers",
    type=Values(int, "whole numbers"),
    metavar="N[,N]...",
    help="Instead, compare the first method's epochs in this process with those of N workers of Ray Train.",
)
@_json_option
def bench_train(
    method: str, workers: tuple[int, ...] | None, json_file: str | None, task: str | None, **options: Any
) -> None:
    """Train and evaluate, in this process, and print seconds and the share of every phase.

    Per method: epochs of one step over all interactions (bpr, ials), epochs of batches, and a ranking of all items for every user
    with test interactions, top 20 without seen items. With --task ctr: epochs of batches, and the prediction of the test rows.
    Seconds are medians; phases are negatives, forward, backward and the optimiser's step, or scores, ranking and metrics.
    Other programs on this machine disturb the figures; CPU seconds under OMP_NUM_THREADS=1 suffer least.

    With --workers the first method is trained, without an evaluation: the table shows what an epoch costs inside Ray Train, what
    more workers gain, and the time that memory takes for the bytes of an epoch, a lower bound where vectors do not stay in a cache.
    """
    from pipeline.maps.methods import METHODS

    methods = [name.strip() for name in method.split(",") if name.strip()]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ConfigError(f"--method={method}: no method {', '.join(map(repr, unknown))}; use {', '.join(METHODS)}")
    if workers and min(workers) < 1:
        raise ConfigError(f"--workers={','.join(map(str, workers))}: a number of workers is at least 1")
    results, (header, lines) = TRAINING_BENCHES[task or "retrieval"](methods, workers, options)
    print_table(header, lines)
    write_json(json_file, results)


# Figures, and the table of them: a header and a line each.
Figures = tuple[list[dict[str, Any]], tuple[tuple[str, ...], list[tuple[str, ...]]]]


def _bench_retrieval(methods: Sequence[str], workers: tuple[int, ...] | None, options: dict[str, Any]) -> Figures:
    from pipeline.bench import training as bench_train
    from pipeline.bench import workers as bench_workers
    from pipeline.config.run_config import DataConfig, TrainConfig

    log = DataConfig(str(Path(options["data"]).absolute()), validation=0.0, **log_settings(options, LOG_OPTIONS))
    train = {key: options[key] for key in ("dim", "batch_size", "seed")}
    chosen = {key: options[key] for key in ("model", "loss") if options[key] is not None}
    settings = bench_train.BenchSettings(
        methods=methods,
        train=TrainConfig(**train, **chosen),
        indices_per_id=options["indices_per_id"],
        resolution=options["resolution"] or 200.0,
        rounds=options["epochs"],
    )
    if workers:
        results = bench_workers.bench_workers(log, settings, workers)
        return results, bench_workers.table(results)
    results = bench_train.bench(log, settings)
    return results, bench_train.table(results)


def _bench_ctr(methods: Sequence[str], workers: tuple[int, ...] | None, options: dict[str, Any]) -> Figures:
    from pipeline.bench.training_ctr import bench_ctr, table
    from pipeline.config.run_config import RunConfig
    from pipeline.runs.tasks import task_of

    if workers:
        raise ConfigError("--workers is not supported with --task ctr; leave it out")
    log = log_settings(options, (*LOG_OPTIONS, *CTR_LOG_OPTIONS))
    settings = {f"data.{key}": value for key, value in log.items()}
    settings |= {
        "run.task": "ctr",
        "data.path": str(Path(options["data"]).absolute()),
        "run.methods": tuple(methods),
        "train.model": options["model"] or "dlrm",
        "train.dim": options["dim"],
        "train.batch_size": options["batch_size"],
        "cluster.resolution": options["resolution"] or 5.0,
        "map.indices_per_id": options["indices_per_id"],
    }
    settings |= dict.fromkeys(("data.seed", "map.seed", "train.seed"), options["seed"])
    config = RunConfig.from_flat(settings)
    config = RunConfig.from_flat({**task_of(config).data_defaults(config), **settings})
    results = bench_ctr(config, rounds=options["epochs"])
    return results, table(results)


TRAINING_BENCHES = {"retrieval": _bench_retrieval, "ctr": _bench_ctr}
