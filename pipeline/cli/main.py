"""The command line: `graphhash COMMAND`, or `python -m pipeline COMMAND`.

Built on click, whose decorators let the stage commands share their options. Commands only turn options into a
`RunConfig`, call one function, and print; heavy modules are imported inside them, so that `--help` answers at once.
Exit codes and one-line errors are in `pipeline.cli.exit_codes`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from pipeline.cli.bench import bench
from pipeline.cli.bundle import bench_serve, check, predict, recommend
from pipeline.cli.demo import demo, synth
from pipeline.cli.exit_codes import exit_codes
from pipeline.cli.jobs import register, submit
from pipeline.cli.serve import serve
from pipeline.cli.stages import cluster, evaluate, export, ingest, run, status, train
from pipeline.cli.sweeps import compare, tune
from pipeline.cli.triton import triton
from pipeline.cli.update import update
from pipeline.errors import TrackingError
from pipeline.extras import remedy
from pipeline.progress import progress_printed


class Commands(click.Group):
    """The commands. An error of MLflow, or its absence, also names --no-mlflow where the command takes it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TrackingError, ModuleNotFoundError) as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            options = {option for p in getattr(command, "params", ()) for option in p.secondary_opts}
            text = remedy(error) if isinstance(error, ModuleNotFoundError) else str(error)
            of_mlflow = isinstance(error, TrackingError) or (error.name or "").partition(".")[0] == "mlflow"
            if text is None or not of_mlflow or "--no-mlflow" not in options:
                raise
            raise TrackingError(f"{text}, or go without: --no-mlflow") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="graphhash", message="%(version)s")
def app() -> None:
    """Make the embedding tables of a recommender smaller by clustering its user-item graph.

    `graphhash run` does everything: it reads an interaction log, clusters users and items, trains a model on tables
    of a fraction of the rows, tests it, and writes an ONNX bundle and a report. The stage commands do a part of it
    in the same run folder. All of them skip what is unchanged. The run folder remembers its settings: with --data a
    command starts from the defaults, without it from the settings of the folder.
    """


bench.add_command(bench_serve)
for command in (
    *(synth, run, status, ingest, cluster, train, evaluate, export, demo),
    *(bench, submit, register, check, recommend, predict, compare, tune, serve, triton, update),
):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` replace those of the process."""
    code: object = None
    with exit_codes(), progress_printed():
        code = app.main(args=arguments, prog_name="graphhash", standalone_mode=False)
    sys.exit(code if isinstance(code, int) else 0)
