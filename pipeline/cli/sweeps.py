"""The commands of many trainings: `graphhash compare` and `graphhash tune`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    METHOD_NAMES,
    Epilog,
    budget_options,
    clustering_options,
    data_options,
    export_options,
    load,
    out_option,
    print_table,
    seed_option,
    settings_options,
    training_options,
    write_json,
)
from pipeline.config.run_config import RunConfig, parse_override
from pipeline.errors import ConfigError

# Settings that an option of each command stands for; given at the end they would have no effect.
SET_BY = {
    "compare": {"run.methods": "--methods", "train.model": "--models", "train.loss": "--models", **dict.fromkeys(("data.seed", "map.seed", "train.seed"), "--seeds")},
    "tune": {"run.methods": "--method", "train.model": "--model", "train.loss": "--model"},
}  # fmt: skip
MODEL_NAMES = "mf, neumf, lightgcn, with BPR; directau, ials: mf with these losses; ctr: dlrm, dcnv2, deepfm, widedeep."


class Lists(Epilog):
    """A command whose options of several values take them after commas, after spaces, or again and again."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {name for option in self.params if isinstance(option.type, Values) for name in option.opts}
        joined: list[str] = []
        takes_more = False
        for arg in args:
            # An override holds a `=`, and no value of a list does.
            if takes_more and not arg.startswith("-") and "=" not in arg:
                joined[-1] += f",{arg}" if joined[-1] not in names else ""
                if joined[-1] in names:
                    joined.append(arg)
                continue
            takes_more = arg.partition("=")[0] in names
            joined.append(arg)
        return super().parse_args(ctx, joined)


class Values(click.ParamType):
    """Values of one kind, separated by commas."""

    def __init__(self, kind: Callable[[str], Any], words: str) -> None:
        self.kind, self.name = kind, words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        try:
            return tuple(self.kind(part) for part in parts)
        except ValueError:
            self.fail(f"{value!r} holds what is not {self.name}", param, ctx)


def _list_option(name: str, kind: Callable[[str], Any], words: str, metavar: str, text: str) -> Callable[..., Any]:
    return click.option(name, type=Values(kind, words), multiple=True, metavar=f"{metavar}[,{metavar}]...", help=text)


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
@_list_option("--methods", str, "names", "NAME", f"{METHOD_NAMES}  [soft,graph,double_frequency,full]")
@_list_option("--models", str, "names", "NAME", f"{MODEL_NAMES}  [mf; ctr: dlrm]")
@_list_option("--seeds", int, "whole numbers", "N", "Each seeds a split, the maps and a training.  [0]")
@_list_option("--ratios", float, "numbers", "R", "Budgets: bytes kept over bytes of the full tables.  [0.125,0.25]")
@_list_option("--rows", int, "whole numbers", "N", "Budgets: rows of both tables together, exactly.")
@_list_option("--resolution", float, "numbers", "G", "No budgets: resolutions of the modularity.  [ctr: 5]")
@clustering_options
@training_options
@export_options
@click.option(
    "--for",
    "own",
    multiple=True,
    metavar="METHOD:SECTION.KEY=VALUE",
    help="A setting of map or train for one method, such as what `graphhash tune` found; may be given many times.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Trainings at once.  [as many as CPUs and GPUs allow]")
@settings_options
def compare(
    methods: tuple[Any, ...],
    models: tuple[Any, ...],
    seeds: tuple[Any, ...],
    ratios: tuple[Any, ...],
    rows: tuple[Any, ...],
    resolution: tuple[Any, ...],
    own: tuple[str, ...],
    jobs: int | None,
    **options: Any,
) -> None:
    """Train and test methods, models, seeds and budgets against each other, and say which is best.

    Leaves compare.md, compare.csv, compare.json and compare.png in DIR, anew after every training, and every training in
    DIR/runs. Finished ones are kept: the same command, or one that asks for more, goes on from there. One that fails is
    reported with its reason, and the others go on.

    With --ratios a method gets as many rows as its own maps leave of the bytes; with --rows or --resolution all get the same
    rows. `full` depends on no budget and is trained once per model and seed. Values of a list are separated by commas or
    spaces. Any setting can be given at the end as SECTION.KEY=VALUE; it holds for all trainings, one given with --for for those of
    a method.
    """
    _refuse_what_options_set("compare", options["overrides"])
    base = load(options)
    from pipeline.errors import CompareError
    from pipeline.runs.tasks import task_of
    from pipeline.sweeps.compare import budgets_of, make_cells, parse_method_setting
    from pipeline.sweeps.compare import compare as compare_cells
    from pipeline.sweeps.table import header, table

    names = _flat(methods) or ["soft", "graph", "double_frequency", "full"]
    budgets = budgets_of(base, ratio=_flat(ratios), rows=_flat(rows), resolution=_flat(resolution))
    task = task_of(base)
    cells = make_cells(names, _flat(models) or [next(iter(task.models))], _flat(seeds) or [0], budgets, task.name)
    result = compare_cells(base, cells, own=[parse_method_setting(text) for text in own], jobs=jobs)
    print_table(header(task), table(result["summary"], task))
    write_json(options["json_file"], result)
    out = Path(base.run.out)
    print(f"\ntable: {out / 'compare.md'}\nplot: {out / 'compare.png'}")
    if result["failed"]:
        first = result["failed"][0]
        raise CompareError(
            f"{len(result['failed'])} of {len(cells)} cells failed, the first, {first['run']}, because: {first['reason']}; "
            "the others are kept, and the same command tries these again"
        )


@click.command(
    cls=Epilog,
    epilog="""
graphhash tune --data log.parquet --method soft --ratio 0.25 --out tuned
graphhash tune --data gowalla --split given --method graph --space train.lr=0.005..0.1 --trials 40 --out tuned
graphhash tune --data ml-1m --method soft --space map.hops=2 --space map.indices_per_id=4..16 --out tuned train.epochs=200
graphhash run --config tuned/best.toml --out out
""",
)
@out_option
@data_options
@click.option("--method", metavar="NAME", default="soft", show_default=True, help=f"One of: {METHOD_NAMES}")
@click.option("--model", metavar="NAME", help=f"{MODEL_NAMES}  [mf; ctr: dlrm]")
@click.option(
    "--trials", type=click.IntRange(min=1), default=20, show_default=True, help="The first is the method's default."
)
@click.option(
    "--space",
    multiple=True,
    metavar="SECTION.KEY=VALUES",
    help="Choose the setting from a,b,c or from low..high; may be given many times.  [train.lr within a factor of 4 of the"
    " method's, train.decay=0.0001..0.2 (clicks: 0.1..100), and map.hops=auto,1,2,1+2 for soft methods]",
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
    space: tuple[str, ...],
    jobs: int | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Search for a method's settings by validation recall (ctr: AUC); the test is never looked at.

    Leaves best.toml, for `graphhash run --config`, and trials.csv in DIR. Settings are drawn at random, by Ray Tune, and each
    is trained to its own end: the learning rate falls to 0 over the epochs, so half-way nobody is ahead yet. Finished trials
    are kept in DIR/trials: the same command, or one with more --trials, goes on from there.

    Weight decay and learning rates are drawn by logarithm. --space replaces the range of a setting that is searched anyway, and
    `--space train.lr=0.05` fixes it.
    """
    _refuse_what_options_set("tune", options["overrides"])
    from pipeline.runs.plan import check_methods
    from pipeline.runs.tasks import task_of
    from pipeline.sweeps.compare import model_settings
    from pipeline.sweeps.tune import default_space, parse_space, score_key, table
    from pipeline.sweeps.tune import tune as search

    base = load(options | {"method": method, "seed": seed})
    check_methods([method], base.run.task)
    task = task_of(base)
    base = RunConfig.from_flat(base.flat() | dict(model_settings(model or next(iter(task.models)), task.name)))
    chosen = default_space(base) | dict(parse_space(text) for text in space)
    result = search(base, chosen, trials, seed=base.train.seed, jobs=jobs)
    print_table(*table(result["trials"], chosen, score_key(base)))
    write_json(options["json_file"], result)
    print(f"\nbest: graphhash run --config {shlex.quote(result['best'])} --out DIR")


def _refuse_what_options_set(command: str, overrides: Sequence[str]) -> None:
    for text in overrides:
        key, _ = parse_override(text)
        if key in SET_BY[command]:
            raise ConfigError(f"{text}: graphhash {command} takes {key} from {SET_BY[command][key]}; give it there")
