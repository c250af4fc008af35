"""The stage commands, from `graphhash ingest` to `graphhash export`, and `graphhash run`, which does all of them and writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import Epilog
from pipeline.cli.log_options import data_options
from pipeline.cli.options import (
    cluster_options,
    common_options,
    cutoff_option,
    export_options,
    out_option,
    resume_option,
    train_options,
)
from pipeline.cli.output import json_option, print_pairs, print_table, write_json
from pipeline.cli.settings import load
from pipeline.errors import ConfigError
from pipeline.storage.uris import below

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.runs.run import RunResult


@click.command(
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
@cutoff_option
@export_options
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print every stage with the reason to compute it, and the seconds and memory that it will take; compute nothing.",
)
@common_options
def run(dry_run: bool, **_: Any) -> None:
    """Do everything: ingest, cluster, train, evaluate, export, report.

    Leaves metrics.json, report.html, the bundle and every stage's output in the run folder. Any setting can be given
    at the end as SECTION.KEY=VALUE. With --task ctr the log is one of clicks.
    """
    if dry_run:
        options = click.get_current_context().params
        _print_plan(load(options), options["json_file"])
        return
    outcome, config, json_file = _until("report")
    _print_metrics(outcome.metrics, config)
    write_json(json_file, outcome.metrics)
    out = config.run.remote or config.run.out
    print(f"\nbundle: {below(out, 'bundle')}\nreport: {below(out, 'report.html')}")


@click.command(
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
    print_pairs(outcome.ingest)
    write_json(json_file, outcome.ingest)


@click.command(
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
    print_pairs({key: value for key, value in outcome.cluster.items() if key != "history"})
    write_json(json_file, outcome.cluster)


@click.command(
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
        print_pairs(metrics)
    write_json(json_file, outcome.metrics)


@click.command(
    cls=Epilog,
    epilog="""
graphhash evaluate --out out
graphhash evaluate --out out --method soft,graph --json figures.json
graphhash evaluate --out out --k 10,20,50
graphhash evaluate --out out --method soft --recommendations top.parquet --test-interactions test.parquet
""",
)
@out_option
@data_options
@cluster_options
@train_options
@cutoff_option
@click.option(
    "--recommendations",
    metavar="FILE",
    help="Write what the test measures as parquet: user_id, item_id, rank, score; raw ids, as many ranks as the largest --k.",
)
@click.option("--test-interactions", metavar="FILE", help="Write the test as parquet: user_id, item_id; raw ids.")
@common_options
def evaluate(recommendations: str | None, test_interactions: str | None, **_: Any) -> None:
    """Measure recall, NDCG and their like (ctr: log loss, AUC and calibration) on the test, and count every byte."""
    config = load(click.get_current_context().params)
    if recommendations or test_interactions:
        _check_recommendations(config, recommendations)
    outcome, config, json_file = _until("evaluate")
    _print_metrics(outcome.metrics, config)
    write_json(json_file, outcome.metrics)
    if not (recommendations or test_interactions):
        return
    from pipeline.retrieval.recommendations import write_recommendations, write_test_interactions
    from pipeline.runs.trained import with_defaults_of_ingested
    from pipeline.task import StageContext

    context = StageContext(with_defaults_of_ingested(config), Path(config.run.out))
    if recommendations:
        n_rows = write_recommendations(context, config.run.methods[0], Path(recommendations))
        print(f"\nrecommendations: {recommendations}, {n_rows:,} rows")
    if test_interactions:
        n_rows = write_test_interactions(context, Path(test_interactions))
        print(f"test interactions: {test_interactions}, {n_rows:,} rows")


def _check_recommendations(config: RunConfig, file: str | None) -> None:
    """Raise ConfigError where there is no ranking to write, or more than one."""
    if config.run.task != "retrieval":
        raise ConfigError(
            f"run.task={config.run.task} ranks nothing; leave --recommendations and --test-interactions out"
        )
    if file and len(config.run.methods) > 1:
        raise ConfigError(
            f"--recommendations {file} takes one method, the run has {','.join(config.run.methods)}; name it with --method"
        )


@click.command(
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
    """Write the first method's model as a bundle: one ONNX graph from raw user ids to raw item ids.

    With --task ctr the graph goes from raw columns to probabilities.
    """
    outcome, config, json_file = _until("export")
    _print_metrics(outcome.metrics, config)
    write_json(json_file, outcome.metrics)
    print(f"\nbundle: {below(config.run.remote or config.run.out, 'bundle')}")
    if triton is not None:
        from pipeline.bundles.triton import write_triton

        for folder in write_triton(Path(config.run.out) / "bundle", Path(triton)):
            print(f"Triton model: {folder}")


@click.command(
    cls=Epilog,
    epilog="""
graphhash status out
graphhash status s3://bucket/run
""",
)
@click.argument("out", metavar="RUN")
@json_option("the printed lines")
def status(out: str, json_file: str | None) -> None:
    """Print the stages of a run folder: up to date, or the reason to compute them. Nothing is computed."""
    _print_status(load({"out": out, "work": None, "config_file": None, "overrides": ()}), json_file)


def _print_plan(config: RunConfig, json_file: str | None) -> None:
    """Every stage as `status` has it, and what those that have to be computed will take."""
    from pipeline.progress import silenced
    from pipeline.runs.forecast import run_forecast
    from pipeline.runs.status import run_status

    lines = run_status(config)
    print(*lines, sep="\n", flush=True)
    with silenced():
        told = run_forecast(config)
    for line in told:
        print(line)
    write_json(json_file, [*lines, *told])


def _print_status(config: RunConfig, json_file: str | None) -> None:
    from pipeline.runs.status import run_status

    lines = run_status(config)
    print(*lines, sep="\n")
    write_json(json_file, lines)


def _until(stage: str) -> tuple[RunResult, RunConfig, str | None]:
    """Run the stages up to `stage` with the current command's options. Returns outcome, settings and `--json`."""
    options = click.get_current_context().params
    config = load(options)
    from pipeline.runs.run import run as run_stages

    choices: dict[str, Any] = {"resume": options["resume"]} if options.get("resume") is not None else {}
    # What is trained is evaluated and exported as it is.
    if stage in ("evaluate", "export"):
        choices["keep_trained"] = True
    return run_stages(config, until=stage, **choices), config, options["json_file"]


def _print_metrics(metrics: Sequence[dict[str, Any]], config: RunConfig) -> None:
    """One line per method, and below why a figure is `-` and what is wrong with a method."""
    from pipeline.runs.tasks import task_of
    from pipeline.task import measures_as_text, remarks

    measures = task_of(config).measures_of(config.evaluate.cutoffs)
    rows = [
        (
            entry["method"],
            f"{entry['rows']:,}",
            f"{entry['bytes']:,}",
            f"{100 * entry['bytes_ratio']:.1f} %",
            *measures_as_text(measures, entry),
            f"{entry['seconds']['train']:.0f}",
        )
        for entry in metrics
    ]
    print_table(("method", "rows", "bytes", "of full", *(m.title for m in measures), "train s"), rows)
    for line in remarks(measures, metrics):
        print(line)
