"""The commands `graphhash bench ...`: how fast clustering, training and evaluation are, here and now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.cli.bench_load import load
from pipeline.cli.options import Epilog, click_options, print_table, task_option, write_json
from pipeline.cli.sweeps import Lists, Values
from pipeline.config.run_config import CTR_MODELS, FORMATS, MODELS
from pipeline.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def _log_options(command: F) -> F:
    """How a log is read."""
    options = (
        click.option(
            "--format", type=click.Choice(FORMATS), default="auto", show_default=True, help="Format of the log."
        ),
        click.option(
            "--split",
            type=click.Choice(("random", "given")),
            default="random",
            help="given: the data set's test file apart.",
        ),
        click.option("--user-column", metavar="NAME", default="user_id", help="Column of user ids.  [user_id]"),
        click.option("--item-column", metavar="NAME", default="item_id", help="Column of item ids.  [item_id]"),
        click.option("--weight-column", metavar="NAME", help="Column of weights; without it every row weighs 1."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Measure speed on this machine, now: clustering against other programs, training and evaluation by phase.

    \b
    Examples:
      graphhash bench cluster --interactions 100000
      graphhash bench train --data gowalla --split given
      graphhash bench load out/bundle
    """


bench.add_command(load)


@bench.command(
    "cluster",
    cls=Epilog,
    epilog="""
graphhash bench cluster --data gowalla --split given --resolution 1 --resolution 200
graphhash bench cluster --interactions 100000 --interactions 1000000 --plot cost.png --json figures.json
graphhash bench cluster --interactions 10000000 --peer scikit-network --peer networkit --rounds 1
""",
)
@click.option("--data", metavar="PATH", help="A log, all of which is clustered (its train file with --split given).")
@_log_options
@click.option("--interactions", type=int, multiple=True, help="Edges of a planted graph; may be given many times.")
@click.option("--users", type=int, help="Users of the planted graphs.  [a tenth of the interactions]")
@click.option("--items", type=int, help="Items of the planted graphs.  [a fiftieth of the interactions]")
@click.option("--communities", type=int, help="Communities planted.  [a hundredth of the items]")
@click.option("--mixing", default=0.5, show_default=True, help="Share of planted edges outside the own community.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same planted graphs.")
@click.option("--resolution", type=float, multiple=True, default=(1.0,), help="May be given many times.  [1]")
@click.option(
    "--peer",
    multiple=True,
    metavar="NAME",
    help="scikit-network, networkit, igraph; scikit-network-fine"
    " and igraph-fine take longer for better labels; may be given many times.  [those installed]",
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs; medians count.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the programs that have them.  [one per core]")
@click.option("--plot", metavar="FILE", help="Draw seconds against edges.  [bench_cluster.png with several graphs]")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures to FILE, an object per row printed.")
def bench_cluster(
    data: str | None,
    interactions: tuple[int, ...],
    resolution: tuple[float, ...],
    peer: tuple[str, ...],
    rounds: int,
    threads: int | None,
    plot: str | None,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Cluster with this program and with others, in turns, and print speed, quality and memory.

    Speedup is their seconds over ours, Q ratio our modularity over theirs: above 1 we are ahead. Q is Barber's
    modularity of everybody's labels by one definition. Timed is the clustering alone, from a CSR matrix in memory,
    our transposition of it included. Memory is the peak of a fresh process per program, interpreter and graph
    included. `pip install 'graphhash[bench]'` installs scikit-network; networkit and igraph join where installed.
    """
    if data is None and not interactions:
        raise click.UsageError("give --data PATH or --interactions N")
    from pipeline.bench.clustering import bench, by_setting, draw, planted_sizes
    from pipeline.bench.clustering_peers import choose_programs
    from pipeline.config.run_config import DataConfig

    programs = choose_programs(peer)
    sizes = [settings.pop(key) for key in ("users", "items", "communities")]
    drawing = {key: settings.pop(key) for key in ("mixing", "seed")}
    planted = [planted_sizes(n, *sizes) | drawing for n in interactions]
    log = data and DataConfig(str(Path(data).absolute()), validation=0.0, test=0.0, **settings)
    results = bench(log, planted, resolutions=resolution, programs=programs, rounds=rounds, threads=threads)
    for title, (header, *lines), phases in by_setting(results):
        print(f"\n{title}")
        print_table(header, lines)
        print(phases)
    write_json(json_file, results)
    if plot or len({entry["graph"] for entry in results}) > 1:
        draw(results, Path(plot or "bench_cluster.png"))
        print(f"\nplot: {plot or 'bench_cluster.png'}")


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
@click_options
@click.option(
    "--method", default="soft,full", show_default=True, metavar="NAME[,NAME]...", help="As in `graphhash run`."
)
@click.option("--model", type=click.Choice((*MODELS, *CTR_MODELS)), help="As in `graphhash run`.  [mf; ctr: dlrm]")
@click.option("--dim", default=64, show_default=True, help="Length of an embedding.")
@click.option("--indices-per-id", type=click.IntRange(min=1), help="Rows read per id.  [the method's]")
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the clustering; more means more rows.  [200; ctr: 5]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1024, show_default=True, help="Interactions per step."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=5, show_default=True, help="Timed of each kind; medians count."
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same maps and training.")
@click.option(
    "--workers",
    type=Values(int, "whole numbers"),
    metavar="N[,N]...",
    help="Compare one method's epochs in this process with Ray Train's, of so many workers, instead.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the figures to FILE, an object per row printed.")
def bench_train(
    method: str,
    workers: tuple[int, ...] | None,
    indices_per_id: int | None,
    resolution: float | None,
    epochs: int,
    json_file: str | None,
    model: str | None,
    task: str | None,
    dim: int,
    batch_size: int,
    seed: int,
    data: str,
    **log: Any,
) -> None:
    """Train and evaluate, in this process, and print how long it takes and on what.

    Per method: an epoch of one step over all interactions, an epoch of batches, and a ranking of the whole catalogue
    for every user with test interactions, seen items left out, top 20. Seconds are medians, without the first time;
    the shares are those of the phases (negatives, forward, backward, the optimiser's step; scores, ranking, metrics).
    With --task ctr: epochs of batches, and the prediction of the test rows, in rows per second.
    Stop what else this machine is doing; where that cannot be, OMP_NUM_THREADS=1 and the CPU seconds say more.

    With --workers the first method alone, without an evaluation: what an epoch costs inside Ray Train, what more workers gain, and how
    long memory takes for the bytes of an epoch; an epoch is faster only where vectors stay in a cache.
    """
    from pipeline.bench import training as bench_train
    from pipeline.bench import workers as bench_workers
    from pipeline.config.run_config import DataConfig, TrainConfig
    from pipeline.maps.methods import METHODS

    methods = [name.strip() for name in method.split(",") if name.strip()]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ConfigError(f"--method={method}: no method {', '.join(map(repr, unknown))}; use {', '.join(METHODS)}")
    if task == "ctr":
        _bench_clicks(methods, indices_per_id, resolution, epochs, json_file, model, dim, batch_size, seed, data, log)
        return
    for key in ("label_column", "schema", "min_count"):
        log.pop(key)
    model = model or "mf"
    settings = TrainConfig(model=model, dim=dim, batch_size=batch_size, seed=seed)
    log_config = DataConfig(str(Path(data).absolute()), validation=0.0, **log)
    how = {
        "settings": settings,
        "indices_per_id": indices_per_id,
        "resolution": resolution or 200.0,
        "rounds": epochs,
    }
    if workers:
        if min(workers) < 1:
            raise ConfigError(f"--workers={','.join(map(str, workers))}: a number of workers is at least 1")
        results = bench_workers.bench_workers(log_config, method=methods[0], workers=workers, **how)
        print_table(*bench_workers.table(results))
    else:
        results = bench_train.bench(log_config, methods=methods, **how)
        print_table(*bench_train.table(results))
    write_json(json_file, results)


def _bench_clicks(
    methods: list[str],
    indices_per_id: int | None,
    resolution: float | None,
    epochs: int,
    json_file: str | None,
    model: str | None,
    dim: int,
    batch_size: int,
    seed: int,
    data: str,
    log: dict[str, Any],
) -> None:
    from pipeline.bench.training_ctr import bench_clicks, table
    from pipeline.config.run_config import RunConfig
    from pipeline.ctr.log import named_shares

    path = str(Path(data).absolute())
    settings = {f"data.{key}": value for key, value in log.items() if value is not None}
    settings |= {
        "run.task": "ctr",
        "data.path": path,
        "run.methods": tuple(methods),
        "train.model": model or "dlrm",
        "train.dim": dim,
    }
    settings |= {
        "train.batch_size": batch_size,
        "cluster.resolution": resolution or 5.0,
        "map.indices_per_id": indices_per_id,
    }
    settings |= dict.fromkeys(("data.seed", "map.seed", "train.seed"), seed)
    config = RunConfig.from_flat(named_shares(path, log["format"]) | settings)
    results = bench_clicks(config, rounds=epochs)
    print_table(*table(results))
    write_json(json_file, results)
