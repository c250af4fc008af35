"""What the commands share: their options, the settings that these become, and how results are printed.

An option is declared once, in a group of those that belong together, and KEYS says which settings it sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.config.run_config import (
    CLUSTER_METHODS,
    CTR_MODELS,
    FORMATS,
    LOSSES,
    MODELS,
    PRECISIONS,
    RUNTIMES,
    TASKS,
    RunConfig,
)
from pipeline.errors import ConfigError

# Option -> the keys it sets. `--seed` seeds the split, the maps and the training alike.
KEYS: dict[str, tuple[str, ...]] = {
    "task": ("run.task",),
    "data": ("data.path",),
    "format": ("data.format",),
    "user_column": ("data.user_column",),
    "item_column": ("data.item_column",),
    "weight_column": ("data.weight_column",),
    "label_column": ("data.label_column",),
    "schema": ("data.schema",),
    "min_count": ("data.min_count",),
    "user_features": ("data.user_features",),
    "item_features": ("data.item_features",),
    "bad_rows": ("data.bad_rows",),
    "split": ("data.split",),
    "validation": ("data.validation",),
    "test": ("data.test",),
    "seed": ("data.seed", "map.seed", "train.seed"),
    "resolution": ("cluster.resolution",),
    "rows": ("cluster.rows",),
    "user_rows": ("cluster.user_rows",),
    "item_rows": ("cluster.item_rows",),
    "ratio": ("cluster.ratio",),
    "max_size": ("cluster.max_size",),
    "levels": ("cluster.levels",),
    "cluster_method": ("cluster.method",),
    "threads": ("cluster.threads",),
    "shards": ("cluster.shards",),
    "indices_per_id": ("map.indices_per_id",),
    "item_bias": ("map.item_bias",),
    "model": ("train.model",),
    "loss": ("train.loss",),
    "dim": ("train.dim",),
    "lr": ("train.lr",),
    "weight_decay": ("train.weight_decay",),
    "epochs": ("train.epochs",),
    "batch_size": ("train.batch_size",),
    "workers": ("train.workers",),
    "precision": ("export.precision",),
    "runtime": ("export.runtime",),
    "method": ("run.methods",),
    "address": ("run.address",),
    "mlflow": ("run.mlflow",),
}
CONFIG_FILE = "config.toml"

F = TypeVar("F", bound=Callable[..., Any])


class Epilog(click.Command):
    """A command whose examples keep their line breaks in `--help`."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write("\nExamples:\n" + "".join(f"  {line}\n" for line in self.epilog.strip().splitlines()))


def _group(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


out_option = _group(
    click.option(
        "--out", required=True, metavar="DIR", help="The run folder, or its URI (s3://...); made when missing."
    ),
    click.option(
        "--work",
        metavar="DIR",
        envvar="GRAPHHASH_WORK",
        help="With --out at a URI: where it is worked on; all machines of a cluster must see it.  [a temporary folder]",
    ),
)
seed_option = click.option("--seed", type=int, help="Seeds the split, the maps and the training.  [0]")
settings_options = _group(
    click.option("--config", "config_file", metavar="FILE", help="TOML file of settings; options are stronger."),
    click.option("--address", metavar="ADDR", help="A Ray cluster; without it a local Ray starts and stops by itself."),
    click.option("--json", "json_file", metavar="FILE", help="Write the printed figures to FILE as well."),
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
)
common_options = _group(seed_option, settings_options)
task_option = click.option(
    "--task",
    type=click.Choice(TASKS),
    help="ctr: predict the clicks of a log with any columns.  [retrieval: rank items for users]",
)
click_options = _group(
    click.option("--label-column", metavar="NAME", help="ctr: column of clicks, 0 and 1.  [label, click or clicked]"),
    click.option(
        "--schema", metavar="FILE", help="ctr: TOML file of what the columns are.  [known by name, or guessed]"
    ),
    click.option("--min-count", type=int, help="ctr: ids of fewer training rows are unknown.  [1]"),
)
data_options = _group(
    task_option,
    click.option("--data", metavar="PATH", help="The interaction log: a file, a folder or a quoted glob."),
    click.option("--format", type=click.Choice(FORMATS), help="Format of the log.  [auto]"),
    click.option("--user-column", metavar="NAME", help="csv, tsv, parquet: column of user ids.  [user_id]"),
    click.option("--item-column", metavar="NAME", help="csv, tsv, parquet: column of item ids.  [item_id]"),
    click.option("--weight-column", metavar="NAME", help="Column of weights; without it every row weighs 1."),
    click.option("--user-features", metavar="FILE", help="For lsh: csv, tsv or parquet, the id column and numbers."),
    click.option("--item-features", metavar="FILE", help="For lsh: the same of items."),
    click.option(
        "--bad-rows", type=click.Choice(("error", "skip")), help="skip: set bad rows aside, counted.  [error]"
    ),
    click.option("--split", type=click.Choice(("random", "given")), help="given: the data set's test file.  [random]"),
    click.option("--validation", type=float, help="Share of interactions for validation.  [0.1]"),
    click.option("--test", type=float, help="Share of interactions for the test.  [0.1]"),
    click_options,
)
budget_options = _group(
    click.option("--ratio", type=float, help="Budget: bytes kept over bytes of the full tables.  [0.25]"),
    click.option("--rows", type=int, help="Budget: rows of both tables together, exactly."),
    click.option("--user-rows", type=int, help="Budget: rows of the user table, exactly; with --item-rows."),
    click.option("--item-rows", type=int, help="Budget: rows of the item table, exactly; with --user-rows."),
    click.option("--resolution", type=float, help="No budget: resolution of the modularity; more means more rows."),
)
clustering_options = _group(
    click.option(
        "--cluster-method",
        type=click.Choice(CLUSTER_METHODS),
        help="leiden: connected communities, slower; lpa: faster, worse; balanced: BACO.  [louvain]",
    ),
    click.option(
        "--levels",
        metavar="G[,G]...",
        help="Write nested communities at these resolutions with raw ids: cluster/levels_users.parquet, _items.",
    ),
    click.option("--max-size", type=int, help="Most users, and most items, of a community.  [no bound]"),
    click.option("--threads", type=int, help="Threads of the clustering.  [one per core]"),
    click.option("--shards", type=int, help="Cluster in Ray tasks over this many shards; same labels.  [0: threads]"),
)
cluster_options = _group(budget_options, clustering_options)
METHOD_NAMES = (
    "soft, double_soft, graph, double_graph, multilevel, balanced; modulo, double, quotient_remainder, frequency, "
    "double_frequency, lsh, lsh_structure; full."
)
method_option = click.option("--method", metavar="NAME[,NAME]...", help=f"{METHOD_NAMES}  [soft]")
model_options = _group(
    click.option(
        "--model",
        type=click.Choice((*MODELS, *CTR_MODELS)),
        help="mf, neumf, lightgcn; ctr: the other ones.  [mf; ctr: dlrm]",
    ),
    click.option(
        "--loss", type=click.Choice(LOSSES), help="directau and ials need a model of vectors: mf, lightgcn.  [bpr]"
    ),
)
training_options = _group(
    click.option("--indices-per-id", type=int, help="Rows read per id.  [the method's]"),
    click.option("--item-bias/--no-item-bias", default=None, help="A trained scalar per item.  [on for soft]"),
    click.option("--dim", type=int, help="Length of an embedding.  [64]"),
    click.option("--lr", type=float, help="Learning rate of Adam.  [the method's]"),
    click.option("--weight-decay", type=float, help="Weight decay of Adam.  [the method's]"),
    click.option("--epochs", type=int, help="At most this many; early stopping ends sooner."),
    click.option("--batch-size", type=int, help="Interactions per step; 0: all of them.  [the model's]"),
    click.option("--mlflow/--no-mlflow", default=None, help="Track in MLFLOW_TRACKING_URI, or ./mlflow.db.  [on]"),
)
workers_option = click.option("--workers", type=int, help="Processes that train together.  [one per GPU, or one]")
train_options = _group(method_option, model_options, training_options, workers_option)
resume_option = click.option(
    "--resume/--no-resume",
    default=None,
    help="Go on from a checkpoint, which has to be there; or forget it and start over.  [go on if there is one]",
)
_precision_option = click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Stored tables.  [auto: int8, and float32 for full]"
)
_runtime_option = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="What serving keeps in memory: folded is a float32 vector per item, fastest; compressed is the small table"
    " alone, a request then takes two (of 1 user) to five times (of 256) as long.  [auto: folded, up to 4 GiB while loading]",
)


def export_options(command: F) -> F:
    """What the bundle holds, and how it runs."""
    return _precision_option(_runtime_option(command))


def load(options: dict[str, Any]) -> RunConfig:
    """Settings from weak to strong: defaults, the run folder's (without --data), --config, options, overrides."""
    from pipeline.storage.uris import is_uri

    out, remote = place(options["out"], options["work"])
    given = {name: value for name, value in options.items() if name in KEYS and value is not None}
    for name in ("method", "levels"):
        if name in given:
            given[name] = tuple(part.strip() for part in given[name].split(",") if part.strip())
    for name in ("data", "user_features", "item_features", "schema"):
        if given.get(name) and not is_uri(given[name]):
            given[name] = str(Path(given[name]).absolute())
    cli = {key: value for name, value in given.items() for key in KEYS[name]} | {"run.out": str(out)}
    files = [Path(options["config_file"])] if options["config_file"] else []
    if "data" not in given and remote is not None:
        from pipeline.runs.remote import Mirror

        Mirror(remote, out).fetch_file(CONFIG_FILE)
    if "data" not in given and (out / CONFIG_FILE).is_file():
        files.insert(0, out / CONFIG_FILE)
    config = RunConfig.load(files, options["overrides"], **cli)
    if not config.data.path:
        raise ConfigError(f"no data: give --data PATH ({options['out']} holds no settings of an earlier command)")
    if config.run.task == "ctr":
        from pipeline.ctr.log import named_shares

        # A named data set brings its shares along; what was given is stronger.
        config = RunConfig.load(
            files, options["overrides"], defaults=named_shares(config.data.path, config.data.format), **cli
        )
    # Where a run folder is kept is no setting to repeat elsewhere.
    return RunConfig.from_flat(config.flat() | {"run.remote": remote})


def place(out: str, work: str | None) -> tuple[Path, str | None]:
    """Where a run folder is worked on, and its URI, if it is kept at one.

    Raises:
        ConfigError: a path that would go away with a Ray job.
    """
    from pipeline.storage.uris import in_ray_job, is_uri, work_folder

    if is_uri(out):
        return work_folder(out, work), out
    if in_ray_job() and not Path(out).is_absolute():
        raise ConfigError(
            f"--out {out}: a Ray job runs in a temporary copy of its working directory; give an absolute path on storage that the "
            "cluster's machines share, or a URI such as s3://bucket/run"
        )
    return Path(out), None


def write_json(file: str | None, value: Any) -> None:
    if file is not None:
        from pipeline.storage.atomic import write_json_atomic

        write_json_atomic(Path(file), value)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to their widest cell; the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, *rows):
        print(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )


def print_pairs(values: Mapping[str, Any], indent: str = "") -> None:
    """A dict as `name  value` lines, nested ones indented."""
    width = max((len(key) for key, value in values.items() if not isinstance(value, dict)), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            print_pairs(value, indent + "  ")
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        text = f"{value:.6g}" if isinstance(value, float) else text
        print(f"{indent}{key.ljust(width)}  {text}")
