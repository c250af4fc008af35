"""The command line: `graphhash COMMAND`, or `python -m pipeline COMMAND`.

Built on click, whose decorators let the stage commands share their options. Commands only turn options into a
`RunConfig`, call one function, and print; what is heavy is imported inside them, so that `--help` answers at once.

Exit codes: 0 done, 1 the data, a file or a service is at fault, 2 the command line or the configuration is,
130 interrupted. Errors are one line on stderr; GRAPHHASH_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.bench import bench
from pipeline.cli.bundle import bench_serve, check, recommend
from pipeline.cli.jobs import register, submit
from pipeline.cli.options import (
    Epilog,
    cluster_options,
    common_options,
    data_options,
    export_options,
    load,
    out_option,
    print_table,
    resume_option,
    say,
    train_options,
    write_json,
)
from pipeline.cli.serve import serve
from pipeline.cli.sweeps import compare, tune
from pipeline.cli.triton import triton
from pipeline.cli.update import update
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.runs.run import Outcome

# Small enough for three minutes on two cores, large enough that the methods differ.
DEMO_LOG = "--users 4000 --items 3000 --interactions 120000 --communities 40 --seed 0".split()
DEMO_RUN = "--seed 0".split()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="graphhash", message="%(version)s")
def app() -> None:
    """Make the embedding tables of a recommender smaller by clustering its user-item graph.

    `graphhash run` does everything: it reads an interaction log, clusters users and items, trains a model on tables
    of a fraction of the rows, tests it, and writes an ONNX bundle and a report. The stage commands do a part of it
    in the same run folder. All of them skip what is unchanged. The run folder remembers its settings: with --data a
    command starts from the defaults, without it from the settings of the folder.
    """


@app.command(
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
    _print_pairs(result)
    write_json(json_file, result)


@app.command(
    cls=Epilog,
    epilog="""
graphhash run --data log.parquet --out out
graphhash run --data gowalla --split given --resolution 200 --method soft,graph --out out
graphhash run --data 'logs/*.csv' --user-column uid --item-column sku --rows 20000 --out out train.patience=10
graphhash run --task ctr --data frappe --resolution 5 --method double_soft,double_frequency,full --out out
""",
)
@out_option
@data_options
@cluster_options
@train_options
@export_options
@common_options
def run(**_: Any) -> None:
    """Do everything: ingest, cluster, train, evaluate, export, report.

    Leaves metrics.json, report.html, the bundle and every stage's output in the run folder. Any setting can be given
    at the end as SECTION.KEY=VALUE. With --task ctr the log is one of clicks.
    """
    outcome, config, json_file = _until("report")
    _print_metrics(outcome.metrics, config)
    write_json(json_file, outcome.metrics)
    out = config.run.remote or config.run.out
    print(f"\nbundle: {out}/bundle\nreport: {out}/report.html")


@app.command(
    cls=Epilog,
    epilog="""
graphhash ingest --data log.parquet --out out
graphhash ingest --data ratings.csv --user-column userId --item-column movieId --bad-rows skip --out out
""",
)
@out_option
@data_options
@common_options
def ingest(**_: Any) -> None:
    """Read the log, number its users and items, split it, and write the graph to disk."""
    outcome, _config, json_file = _until("ingest")
    _print_pairs(outcome.ingest)
    write_json(json_file, outcome.ingest)


@app.command(
    cls=Epilog,
    epilog="""
graphhash cluster --out out --resolution 200
graphhash cluster --out out --resolution 200 --cluster-method leiden --levels 1,20,200
graphhash cluster --data train.txt --validation 0 --test 0 --resolution 200 --out out
""",
)
@out_option
@data_options
@cluster_options
@common_options
def cluster(**_: Any) -> None:
    """Cluster users and items, and print modularity, rows and sizes.

    Only the training interactions are clustered; --validation 0 --test 0 makes that all of them.
    """
    outcome, _config, json_file = _until("cluster")
    _print_pairs({key: value for key, value in outcome.cluster.items() if key != "history"})
    write_json(json_file, outcome.cluster)


@app.command(
    cls=Epilog,
    epilog="""
graphhash train --out out --method soft,full --lr 0.005
graphhash train --data log.parquet --ratio 0.16 --out out train.patience=10
graphhash train --out out --resume
graphhash train --data log.parquet --out out --workers 2
""",
)
@out_option
@data_options
@cluster_options
@train_options
@resume_option
@common_options
def train(**_: Any) -> None:
    """Train one model per method, each in an MLflow run of its own.

    A training that was stopped or killed goes on from its last checkpoint when the command is given again.
    """
    outcome, _config, json_file = _until("train")
    for metrics in outcome.metrics:
        _print_pairs(metrics)
    write_json(json_file, outcome.metrics)


@app.command(
    cls=Epilog,
    epilog="""
graphhash evaluate --out out
graphhash evaluate --out out --method soft,graph --json figures.json
""",
)
@out_option
@data_options
@cluster_options
@train_options
@common_options
def evaluate(**_: Any) -> None:
    """Measure recall and NDCG (ctr: log loss, AUC and calibration) on the test, and count every byte."""
    outcome, config, json_file = _until("evaluate")
    _print_metrics(outcome.metrics, config)
    write_json(json_file, outcome.metrics)


@app.command(
    cls=Epilog,
    epilog="""
graphhash export --out out
graphhash export --out out --precision float16
graphhash export --out out --runtime compressed
graphhash export --out out --triton models
""",
)
@out_option
@data_options
@cluster_options
@train_options
@export_options
@click.option(
    "--triton", metavar="DIR", help="Write it into this Triton model repository as well (see graphhash triton)."
)
@common_options
def export(triton: str | None, **_: Any) -> None:
    """Write the first method's model as a bundle: one ONNX graph from raw user ids to raw item ids (ctr: from raw columns to probabilities)."""
    outcome, config, json_file = _until("export")
    _print_metrics(outcome.metrics, config)
    write_json(json_file, outcome.metrics)
    print(f"\nbundle: {config.run.remote or config.run.out}/bundle")
    if triton is not None:
        from pipeline.bundles.triton import write_triton

        for folder in write_triton(Path(config.run.out) / "bundle", Path(triton)):
            print(f"Triton model: {folder}")


@app.command(
    cls=Epilog,
    epilog="""
graphhash demo
graphhash demo /data/graphhash-demo
""",
)
@click.argument("out", metavar="[OUT]", default="demo")
def demo(out: str) -> None:
    """Show the whole way on a synthetic log, in the folder OUT: make it, compare four methods, ask for items."""
    folder = Path(out)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/mlflow.db")

    def step(*arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        print(f"\n$ graphhash {shlex.join(words)}", flush=True)
        app.main(args=words, prog_name="graphhash", standalone_mode=False)

    step("synth", folder / "log", *DEMO_LOG)
    step(
        "run",
        "--data",
        folder / "log",
        "--out",
        folder / "run",
        "--method",
        "soft,graph,modulo,full",
        *DEMO_RUN,
    )
    from graphhash.graph.vocabulary import Vocabulary

    user_id = Vocabulary.load(folder / "run" / "ingest" / "users.parquet").take([0])[0]
    step("recommend", folder / "run" / "bundle", "--user-id", user_id, "-k", 5, "--exclude-seen")
    print(f"\nThe report, with pictures: {folder / 'run' / 'report.html'}")


bench.add_command(bench_serve)
app.add_command(bench)
app.add_command(submit)
app.add_command(register)
app.add_command(check)
app.add_command(recommend)
app.add_command(compare)
app.add_command(tune)
app.add_command(serve)
app.add_command(triton)
app.add_command(update)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` replace those of the process."""
    _exit_on_sigterm()
    try:
        code = app.main(args=arguments, prog_name="graphhash", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (click.ClickException, ConfigError) as error:
        _fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 2)
    except (click.Abort, KeyboardInterrupt, SystemExit) as error:
        # Ray Train turns Ctrl-C into SystemExit(1); nobody else leaves that way but our own SIGTERM.
        if isinstance(error, SystemExit) and error.code != 1:
            raise
        _fail("interrupted; finished stages are kept, and the same command goes on from them", 130)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nothing is wrong, and nothing can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # Ray hands on a task's error as a subclass whose text is the remote traceback; `cause` is the error itself.
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
        if os.environ.get("GRAPHHASH_DEBUG") == "1" or not _is_expected(cause):
            raise
        _fail(str(cause), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _is_expected(error: Exception) -> bool:
    """Whether an error speaks to the user: one of ours, the operating system's, or a bad value that we refused."""
    from graphhash.errors import DataError
    from pipeline.errors import (
        CompareError,
        JobError,
        RegistryError,
        RunFolderError,
        ServeError,
        TrackingError,
        TuneError,
    )
    from serving.bundle import BundleError

    ours = (
        DataError,
        BundleError,
        RunFolderError,
        TrackingError,
        CompareError,
        TuneError,
        RegistryError,
        JobError,
        ServeError,
    )
    if isinstance(error, (*ours, OSError)):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    # A ValueError of another library is a defect of ours, and its traceback is wanted.
    return isinstance(error, ValueError) and raised_in.partition(".")[0] in (
        "graphhash",
        "pipeline",
        "serving",
    )


def _fail(message: str, code: int) -> None:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()] or ["no reason given"]
    print("graphhash: error: " + " ".join(lines), file=sys.stderr)
    sys.exit(code)


def _exit_on_sigterm() -> None:
    def stop(_signal: int, _frame: object) -> None:
        raise SystemExit(143)

    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:
        pass  # Not the main thread: whoever owns it decides.


def _until(stage: str) -> tuple[Outcome, RunConfig, str | None]:
    """Run the stages up to `stage` with the current command's options. Returns outcome, settings and `--json`."""
    options = click.get_current_context().params
    config = load(options)
    from pipeline.runs.run import run as run_stages

    resume = {"resume": options["resume"]} if options.get("resume") is not None else {}
    return run_stages(config, until=stage, say=say, **resume), config, options["json_file"]


def _print_metrics(metrics: Sequence[dict[str, Any]], config: RunConfig) -> None:
    """One line per method; `-` where there was nothing to test with."""
    from pipeline.runs.tasks import task_of

    task = task_of(config)
    rows = [
        (
            entry["method"],
            f"{entry['rows']:,}",
            f"{entry['bytes']:,}",
            f"{100 * entry['bytes_ratio']:.1f} %",
            *task.of_measures(entry),
            f"{entry['seconds']['train']:.0f}",
        )
        for entry in metrics
    ]
    print_table(("method", "rows", "bytes", "of full", *(m.title for m in task.measures), "train s"), rows)


def _print_pairs(values: dict[str, Any], indent: str = "") -> None:
    """A dict as `name  value` lines, nested ones indented."""
    width = max((len(key) for key, value in values.items() if not isinstance(value, dict)), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _print_pairs(value, indent + "  ")
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        text = f"{value:.6g}" if isinstance(value, float) else text
        print(f"{indent}{key.ljust(width)}  {text}")
