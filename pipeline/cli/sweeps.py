"""The commands of many runs: `graphhash compare` and `graphhash tune`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Epilog, Lists, list_option
from pipeline.cli.log_options import data_options
from pipeline.cli.options import (
    METHOD_NAMES,
    budget_options,
    clustering_options,
    cutoff_option,
    export_options,
    out_option,
    seed_option,
    settings_options,
    training_options,
)
from pipeline.cli.output import print_table, write_json
from pipeline.cli.settings import load
from pipeline.errors import ConfigError

# Settings that an option of each command sets; as an override at the end they would have no effect.
SET_BY = {
    "compare": {
        "run.methods": "--methods",
        "train.model": "--models",
        "train.loss": "--models",
        "data.seed": "--seeds",
        "map.seed": "--seeds",
        "train.seed": "--seeds",
    },
    "tune": {"run.methods": "--method", "train.model": "--model", "train.loss": "--model"},
}
MODEL_NAMES = (
    "mf, neumf, lightgcn: with the BPR loss; softmax, bsl, ccl, directau, ials: mf with that loss; lightgcn_softmax, lightgcn_bsl; "
    "for --task ctr: dlrm, dcnv2, finalnet, deepfm, widedeep."
)


def _flat(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return list(dict.fromkeys(value for part in parts for value in part))


@click.command(
    cls=Lists,
    epilog="""
graphhash compare --data log.parquet --out cmp
graphhash compare --data gowalla --split given --methods soft,graph,full --seeds 0 1 2 --ratios 0.125,0.25 --out cmp
graphhash compare --task ctr --data frappe --models dlrm,dcnv2 --methods double_soft,double_frequency,full --resolution 5 --out cmp
graphhash compare --data ml-1m --methods soft,graph,full --resolution 5 --for full:train.lr=0.01 --out cmp train.patience=10
""",
)
@out_option
@data_options
@list_option("--methods", str, "names", "NAME", f"{METHOD_NAMES}  [soft,graph,double_frequency,full]")
@list_option("--models", str, "names", "NAME", f"{MODEL_NAMES}  [mf; ctr: dlrm]")
@list_option("--seeds", int, "whole numbers", "N", "Each seeds the split, the bucket maps and the training.  [0]")
@list_option(
    "--ratios", float, "numbers", "R", "Budgets in bytes, as a share of the uncompressed tables.  [0.125,0.25]"
)
@list_option("--rows", int, "whole numbers", "N", "Budgets in rows: of user and item table together, exactly.")
@list_option("--resolution", float, "numbers", "G", "Instead of budgets: resolutions of the modularity.  [ctr: 5]")
@clustering_options
@training_options
@cutoff_option
@export_options
@click.option(
    "--for",
    "method_overrides",
    multiple=True,
    metavar="METHOD:SECTION.KEY=VALUE",
    help="A setting of map or train for one method alone, such as a result of `graphhash tune`; may be repeated.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at once.  [as many as CPUs and GPUs allow]")
@settings_options
def compare(
    methods: tuple[Any, ...],
    models: tuple[Any, ...],
    seeds: tuple[Any, ...],
    method_overrides: tuple[str, ...],
    jobs: int | None,
    **options: Any,
) -> None:
    """Train and test every method with every model, seed and budget, and tabulate accuracy against size.

    Writes compare.md, compare.csv, compare.json and compare.png into DIR after every run; the runs themselves are in DIR/runs.
    Finished runs are kept: the same command, or one that asks for more, goes on from there. A run that fails is reported with
    its reason, and the others go on.

    With --ratios each method gets as many rows as its own bucket maps leave of the bytes; with --rows or --resolution all get
    the same rows. `full` depends on no budget and is trained once per model and seed. Lists are separated by commas or spaces.
    Any setting can be overridden at the end as SECTION.KEY=VALUE, for all runs, or with --for, for those of a method.
    """
    _refuse_settings_of_options("compare", options["overrides"])
    requested_budgets = {
        "ratio": _flat(options.pop("ratios")),
        "rows": _flat(options.pop("rows")),
        "resolution": _flat(options.pop("resolution")),
    }
    base = load(options | {"method": "soft"})  # Each point has its own.
    from pipeline.errors import CompareError
    from pipeline.runs.tasks import task_of
    from pipeline.sweeps.compare import compare as compare_runs
    from pipeline.sweeps.grid import choose_budgets, make_grid, parse_method_override
    from pipeline.sweeps.table import header, table

    task = task_of(base)
    points = make_grid(
        _flat(methods) or ["soft", "graph", "double_frequency", "full"],
        _flat(models) or [next(iter(task.models))],
        _flat(seeds) or [0],
        choose_budgets(base, **requested_budgets),
        task.name,
    )
    overrides = [parse_method_override(text) for text in method_overrides]
    written = compare_runs(base, points, overrides=overrides, jobs=jobs)
    measures = task.measures_of(base.evaluate.cutoffs)
    print_table(header(measures, written["summary"]), table(written["summary"], measures))
    write_json(options["json_file"], written)
    out = Path(base.run.out)
    print(f"\ntable: {out / 'compare.md'}\nplot: {out / 'compare.png'}")
    if written["failed"]:
        first = written["failed"][0]
        raise CompareError(
            f"{len(written['failed'])} of {len(points)} runs failed, the first, {first['run']}, because: {first['reason']}; "
            "the others are kept, and the same command tries these again"
        )


@click.command(
    cls=Epilog,
    epilog="""
graphhash tune --data log.parquet --method soft --ratio 0.25 --out tuned
graphhash tune --data gowalla --split given --method graph --space train.lr=0.005..0.1 --trials 40 --sampler tpe --out tuned
graphhash tune --data ml-1m --method soft --space map.hops=2 --space map.indices_per_id=4..16 --out tuned train.epochs=200
graphhash run --config tuned/best.toml --out out
""",
)
@out_option
@data_options
@click.option("--method", metavar="NAME", default="soft", show_default=True, help=f"One of: {METHOD_NAMES}")
@click.option("--model", metavar="NAME", help=f"{MODEL_NAMES}  [mf; ctr: dlrm]")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Settings to try; the first are the method's defaults.",
)
@click.option(
    "--sampler",
    type=click.Choice(("random", "tpe")),
    default="random",
    show_default=True,
    help="random: the same trials for a seed, however many run at once; tpe: after ten random ones, trials near the best so far"
    " (Optuna's TPE), which pays off from some thirty trials on and repeats with --jobs 1 alone.",
)
@click.option(
    "--space",
    multiple=True,
    metavar="SECTION.KEY=VALUES",
    help="Search a setting over a,b,c or over low..high; may be repeated.  [train.lr within a factor of 4 of the"
    " method's, train.l2_total=0.0001..0.2 (ctr: 0.1..100), and map.hops=auto,1,2,1+2 for soft methods]",
)
@budget_options
@clustering_options
@training_options
@export_options
@click.option("--jobs", type=click.IntRange(min=1), help="Trials at once.  [as many as CPUs and GPUs allow]")
@seed_option
@settings_options
def tune(
    method: str,
    model: str | None,
    trials: int,
    sampler: str,
    space: tuple[str, ...],
    jobs: int | None,
    **options: Any,
) -> None:
    """Search for a method's hyperparameters by validation recall (ctr: AUC); the test set is never read.

    Writes best.toml, for `graphhash run --config`, and trials.csv into DIR. Optuna chooses the settings of each trial. Every trial
    is trained to its own end: the learning rate falls to 0 over the epochs, so half-way nobody is ahead yet. Finished trials are
    kept in DIR/trials: the same command, or one with more --trials, goes on from there.

    Weight decay and learning rates are drawn log-uniformly. --space replaces the range of a setting that is searched anyway, and
    `--space train.lr=0.05` fixes it.
    """
    _refuse_settings_of_options("tune", options["overrides"])
    from pipeline.config.run_config import RunConfig
    from pipeline.runs.plan import check_methods
    from pipeline.runs.tasks import task_of
    from pipeline.sweeps.grid import model_settings
    from pipeline.sweeps.space import default_space, parse_space
    from pipeline.sweeps.trials import table
    from pipeline.sweeps.tune import SearchSettings, score_key
    from pipeline.sweeps.tune import tune as run_search

    base = load(options | {"method": method})
    check_methods([method], base.run.task)
    task = task_of(base)
    base = RunConfig.from_flat(base.flat() | dict(model_settings(model or next(iter(task.models)), task.name)))
    searched = default_space(base) | dict(parse_space(text) for text in space)
    found = run_search(base, SearchSettings(searched, trials, base.train.seed, sampler), jobs=jobs)
    print_table(*table(found["trials"], searched, score_key(base)))
    write_json(options["json_file"], found)
    print(f"\nbest: graphhash run --config {shlex.quote(found['best'])} --out DIR")


def _refuse_settings_of_options(command: str, overrides: Sequence[str]) -> None:
    from pipeline.config.keys import parse_override

    for text in overrides:
        key, _ = parse_override(text)
        if key in SET_BY[command]:
            raise ConfigError(f"{text}: graphhash {command} takes {key} from {SET_BY[command][key]}; give it there")
