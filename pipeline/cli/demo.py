"""`graphhash synth`, a synthetic interaction log, and `graphhash demo`, the whole way on one."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Epilog
from pipeline.cli.output import json_option, print_pairs, write_json
from pipeline.config.choices import TASKS

# Small enough for half a minute on two cores, large enough that the methods differ.
DEMO_LOG = ["--users", "4000", "--items", "3000", "--interactions", "120000", "--communities", "40", "--seed", "0"]
DEMO_RUN = ["--seed", "0"]


# Options that one task alone reads.
RETRIEVAL_SIZES = ("users", "items", "interactions")
CTR_SIZES = ("rows", "cardinality", "days", "drift", "positive_rate")


@click.command(
    cls=Epilog,
    epilog="""
graphhash synth log --users 6000 --items 4000 --interactions 200000
graphhash synth big --users 2000000 --items 500000 --interactions 100000000 --communities 5000
graphhash synth impressions --task ctr --rows 1000000 --cardinality 500000
""",
)
@click.argument("out", metavar="OUT")
@click.option(
    "--task",
    type=click.Choice(TASKS),
    default="retrieval",
    show_default=True,
    help="retrieval: pairs of users and items; ctr: labelled samples of 26 categorical columns and 13 numbers.",
)
@click.option("--users", default=10_000, show_default=True, help="retrieval: number of users.")
@click.option("--items", default=5_000, show_default=True, help="retrieval: number of items.")
@click.option("--interactions", default=300_000, show_default=True, help="retrieval: number of rows.")
@click.option("--rows", default=1_000_000, show_default=True, help="ctr: number of samples.")
@click.option("--cardinality", default=10_000_000, show_default=True, help="ctr: most values of the largest column.")
@click.option("--days", default=7, show_default=True, help="ctr: number of days, with as many samples each.")
@click.option(
    "--drift", default=0.05, show_default=True, help="ctr: share of values that are replaced from day to day."
)
@click.option("--positive-rate", default=0.25, show_default=True, help="ctr: share of positive labels.")
@click.option("--communities", default=50, show_default=True, help="Number of planted communities.")
@click.option("--mixing", default=0.2, show_default=True, help="Share of interactions outside the own community.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same log.")
@json_option("the printed figures")
@click.pass_context
def synth(context: click.Context, out: str, task: str, json_file: str | None, **settings: Any) -> None:
    """Make a synthetic log with planted communities in the folder OUT.

    Of a CTR log the best possible log loss is known, and printed.
    """
    for name in CTR_SIZES if task == "retrieval" else RETRIEVAL_SIZES:
        if _is_given(context, name):
            raise click.UsageError(f"--{name.replace('_', '-')} is no option of --task {task}; leave it out")
        settings.pop(name)
    sizes = {
        f"n_{key}": settings.pop(key) for key in (*RETRIEVAL_SIZES, "rows", "days", "communities") if key in settings
    }
    if task == "retrieval":
        from pipeline.logs.synthetic import synth as make

        result = make(Path(out), **sizes, **settings)
    else:
        from pipeline.ctr.synthetic import synth_ctr
        from pipeline.ctr.synthetic_model import LogSettings

        result = synth_ctr(Path(out), LogSettings(**sizes, **settings))
    print_pairs(result)
    write_json(json_file, result)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


@click.command(
    cls=Epilog,
    epilog="""
graphhash demo
graphhash demo /data/graphhash-demo
""",
)
@click.argument("out", metavar="[OUT]", default="demo")
def demo(out: str) -> None:
    """Show the whole way on a synthetic log, in the folder OUT: make it, compare four methods, ask for items."""
    folder, app = Path(out), click.get_current_context().find_root().command
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/mlflow.db")

    def step(*arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        print(f"\n$ graphhash {shlex.join(words)}", flush=True)
        app.main(args=words, prog_name="graphhash", standalone_mode=False)

    step("synth", folder / "log", *DEMO_LOG)
    paths = ("--data", folder / "log", "--out", folder / "run")
    step("run", *paths, "--method", "soft,graph,modulo,full", *DEMO_RUN)
    from graphhash.graph.vocabulary import Vocabulary

    user_id = Vocabulary.load(folder / "run" / "ingest" / "users.parquet").take([0])[0]
    step("recommend", folder / "run" / "bundle", "--user-id", user_id, "-k", 5, "--exclude-seen")
    print(f"\nThe report, with pictures: {folder / 'run' / 'report.html'}")
