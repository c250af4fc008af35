"""`graphhash synth`, a synthetic interaction log, and `graphhash demo`, the whole way on one."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Epilog
from pipeline.cli.output import print_pairs, write_json

# Small enough for three minutes on two cores, large enough that the methods differ.
DEMO_LOG = ["--users", "4000", "--items", "3000", "--interactions", "120000", "--communities", "40", "--seed", "0"]
DEMO_RUN = ["--seed", "0"]


@click.command(
    cls=Epilog,
    epilog="""
graphhash synth log --users 6000 --items 4000 --interactions 200000
graphhash synth big --users 2000000 --items 500000 --interactions 100000000 --communities 5000
""",
)
@click.argument("out", metavar="OUT")
@click.option("--users", default=10_000, show_default=True, help="Number of users.")
@click.option("--items", default=5_000, show_default=True, help="Number of items.")
@click.option("--interactions", default=300_000, show_default=True, help="Number of rows.")
@click.option("--communities", default=50, show_default=True, help="Number of planted communities.")
@click.option("--mixing", default=0.2, show_default=True, help="Share of interactions outside the own community.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same log.")
@click.option("--json", "json_file", metavar="FILE", help="Write the printed figures to FILE as well.")
def synth(out: str, json_file: str | None, **settings: Any) -> None:
    """Make a synthetic interaction log with planted communities in the folder OUT."""
    from pipeline.logs.synthetic import synth as make

    sizes = {f"n_{key}": settings.pop(key) for key in ("users", "items", "interactions", "communities")}
    result = make(Path(out), **sizes, **settings)
    print_pairs(result)
    write_json(json_file, result)


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
