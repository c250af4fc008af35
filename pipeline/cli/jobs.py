"""`graphhash submit`, a command as a job of a Ray cluster, and `graphhash register`, a bundle into MLflow's model registry."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli.command import Epilog
from pipeline.cli.output import json_option, write_json
from pipeline.errors import ConfigError


@click.command(
    cls=Epilog,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="""
graphhash submit -- run --data s3://bucket/log.parquet --out s3://bucket/run
graphhash submit --ray-address http://head:8265 -- compare --data /shared/log --methods soft,full --out /shared/cmp
graphhash submit --env MLFLOW_TRACKING_TOKEN --driver-memory-gib 16 -- run --data gs://b/log --out gs://b/run --shards 32
""",
)
@click.option(
    "--ray-address", metavar="URL", help="The cluster's dashboard.  [RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]"
)
@click.option(
    "--working-dir", metavar="DIR", help="Sent with the job.  [this checkout; nothing where GraphHash is installed]"
)
@click.option(
    "--env",
    "variables",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="A variable of the job, seen on the dashboard; without value, as it is here.",
)
@click.option(
    "--driver-cpus",
    "num_cpus",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Reserved for the driver.",
)
@click.option(
    "--driver-gpus",
    "num_gpus",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="The driver runs where one is.",
)
@click.option(
    "--driver-memory-gib",
    "memory_gib",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Reserved for the driver.",
)
@click.option("--python", metavar="PATH", help="Interpreter of the driver, on its machine.  [the one that Ray runs in]")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the job; Ctrl-C stops it.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
def submit(
    ray_address: str | None,
    working_dir: str | None,
    variables: tuple[str, ...],
    python: str | None,
    wait: bool,
    command: tuple[str, ...],
    **reserved: float,
) -> int:
    """Run a command as a job of a Ray cluster: follow its output, and end with its exit code.

    It does what `ray job submit --working-dir . -- python -m pipeline COMMAND --address auto` does, checks the command before it is
    sent, and takes the interpreter that the cluster's Ray runs in. The job goes on with the MLflow run and store of this command's
    environment (MLFLOW_RUN_ID, MLFLOW_TRACKING_URI).
    Data and run folder are on storage that the cluster's machines share, or at URIs: s3://, gs://, file://.
    """
    from pipeline.runs.jobs import Driver
    from pipeline.runs.jobs import submit as send

    app = click.get_current_context().find_root().command
    assert isinstance(app, click.Group)
    driver = Driver(reserved["num_cpus"], reserved["num_gpus"], int(reserved["memory_gib"] * 2**30), python)
    return send(
        checked_command(app, command),
        address=ray_address,
        working_dir=Path(working_dir) if working_dir else None,
        variables=dict(_variable(text) for text in variables),
        driver=driver,
        wait=wait,
    )


@click.command(
    cls=Epilog,
    epilog="""
graphhash register out --name gowalla
graphhash register out/bundle --name gowalla --alias challenger --metric ndcg@20
graphhash register s3://bucket/run/bundle --name gowalla --force
""",
)
@click.argument("bundle", metavar="RUN|BUNDLE")
@click.option("--name", required=True, metavar="NAME", help="The registered model; made when missing.")
@click.option("--alias", default="champion", show_default=True, metavar="ALIAS", help="What the new version is called.")
@click.option("--metric", metavar="NAME", help="What must not be worse.  [recall@20; log_loss for click-through rates]")
@click.option(
    "--experiment", default="graphhash", show_default=True, metavar="NAME", help="For a bundle that no run has stored."
)
@click.option("--force", is_flag=True, help="Do not compare with the version that has the alias.")
@json_option("the printed figures")
def register(
    bundle: str, name: str, alias: str, metric: str | None, experiment: str, force: bool, json_file: str | None
) -> None:
    """Register a bundle with MLflow and give it an alias, unless the version that has it is better.

    The bundle is checked first, every byte of it, and a damaged one is refused, forced or not. Then its metric must not be worse
    than that of the version that has the alias, measured on the same log, split in the same way. Afterwards `models:/NAME@ALIAS`
    loads it. The store is MLFLOW_TRACKING_URI, or ./mlflow.db.
    """
    from pipeline.bundles.register import register_bundle
    from pipeline.storage.uris import bundle_folder, is_uri
    from serving.manifest import MANIFEST

    folder = bundle_folder(bundle)
    if not is_uri(bundle) and not (folder / MANIFEST).exists() and (folder / "bundle").is_dir():
        folder = folder / "bundle"
    result = register_bundle(folder, name, alias=alias, experiment=experiment, metric=metric, force=force)
    before = result["before"]
    was = (
        f", before: version {before['version']}" + ("" if before["value"] is None else f" with {before['value']:.4f}")
        if before
        else ""
    )
    print(f"{result['uri']}: version {result['version']}, {result['metric']} {result['value']:.4f}{was}")
    write_json(json_file, result)


def checked_command(app: click.Group, command: Sequence[str]) -> list[str]:
    """The words of a command for a job, with ``--address auto`` where it takes an address and none is given.

    Raises:
        ConfigError: there is no such command, or a path that would go away with the job.
        click.UsageError: it does not take these options.
    """
    from pipeline.storage.uris import is_uri

    if not command:
        raise ConfigError(
            "no command for the job; write it after --, such as: graphhash submit -- run --data s3://... --out s3://..."
        )
    name, *words = command
    parsed = app.commands.get(name)
    if parsed is None or name == "submit":
        raise ConfigError(
            f"{name!r} cannot run as a job; the commands are {', '.join(n for n in app.commands if n != 'submit')}"
        )
    with parsed.make_context(name, list(words)) as context:
        options = dict(context.params)
    for key in ("out", "run", "bundle"):
        path = options.get(key)
        if isinstance(path, str) and not is_uri(path) and not Path(path).is_absolute():
            raise ConfigError(
                f"{path}: a job runs in a temporary copy of its working directory; give an absolute path on storage that the cluster's "
                "machines share, or a URI such as s3://bucket/run"
            )
    takes_address = any("--address" in option.opts for option in parsed.params if isinstance(option, click.Option))
    return [name, *(("--address", "auto") if takes_address and options.get("address") is None else ()), *words]


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator and name not in os.environ:
        raise ConfigError(f"--env {name}: not set here; set it, or write --env {name}=VALUE")
    return name, value if separator else os.environ[name]
