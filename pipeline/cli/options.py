"""The options that commands share, the settings that they set, and the printing of tables.

An option is declared once, in a group of related ones, and KEYS names the settings that it sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.config.choices import (
    CLUSTER_METHODS,
    CTR_MODELS,
    FORMATS,
    ID_KINDS,
    LOSSES,
    MODELS,
    PRECISIONS,
    RUNTIMES,
    SPLITS,
    TASKS,
)
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

# Option -> the settings it sets. `--seed` seeds the split, the bucket maps and the training alike.
KEYS: dict[str, tuple[str, ...]] = {
    "task": ("run.task",),
    "data": ("data.path",),
    "format": ("data.format",),
    "user_column": ("data.user_column",),
    "item_column": ("data.item_column",),
    "user_kind": ("data.user_kind",),
    "item_kind": ("data.item_kind",),
    "separator": ("data.separator",),
    "encoding": ("data.encoding",),
    "columns": ("data.columns",),
    "weight_column": ("data.weight_column",),
    "rating_column": ("data.rating_column",),
    "positive_from": ("data.positive_from",),
    "min_user_interactions": ("data.min_user_interactions",),
    "min_item_interactions": ("data.min_item_interactions",),
    "label_column": ("data.label_column",),
    "schema": ("data.schema",),
    "min_count": ("data.min_count",),
    "user_features": ("data.user_features",),
    "item_features": ("data.item_features",),
    "bad_rows": ("data.bad_rows",),
    "split": ("data.split",),
    "time_column": ("data.time_column",),
    "test_from": ("data.test_from",),
    "validation_from": ("data.validation_from",),
    "last_n": ("data.last_n",),
    "half_life": ("data.half_life",),
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
    "k": ("evaluate.k",),
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
        "--out", required=True, metavar="DIR", help="The run folder, or its URI (s3://...); created if missing."
    ),
    click.option(
        "--work",
        metavar="DIR",
        envvar="GRAPHHASH_WORK",
        help="With --out at a URI: the working copy; all machines of a cluster must see it.  [a temporary folder]",
    ),
)
seed_option = click.option("--seed", type=int, help="Seeds the split, the bucket maps and the training.  [0]")
settings_options = _group(
    click.option("--config", "config_file", metavar="FILE", help="TOML file of settings; options override it."),
    click.option(
        "--address",
        metavar="ADDR",
        help="Ray cluster to use (auto, host:port or ray://...).  [this machine; a local Ray starts where it is needed]",
    ),
    click.option("--json", "json_file", metavar="FILE", help="Write the printed figures to FILE as JSON."),
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
)
common_options = _group(seed_option, settings_options)
task_option = click.option(
    "--task",
    type=click.Choice(TASKS),
    help="retrieval: rank items for users; ctr: predict click probabilities from samples with labels.  [retrieval]",
)
ctr_data_options = _group(
    click.option("--label-column", metavar="NAME", help="ctr: the label column, 0 or 1.  [label, click or clicked]"),
    click.option(
        "--schema",
        metavar="FILE",
        help="ctr: TOML file with the role of each column.  [known for named data sets, else inferred]",
    ),
    click.option("--min-count", type=int, help="ctr: ids in fewer training samples are out of vocabulary.  [1]"),
)
csv_options = _group(
    click.option(
        "--separator", metavar="CHAR", help="csv: the character between fields, or tab.  [recognised: , tab ; |]"
    ),
    click.option("--encoding", metavar="NAME", help="csv: the encoding of the text, such as latin-1.  [utf-8]"),
    click.option(
        "--header", type=click.Choice(("yes", "no")), help="csv: no: the files have no header; give --columns.  [yes]"
    ),
    click.option(
        "--columns", metavar="NAME[,NAME]...", help="csv without a header: the names of its columns, in order."
    ),
)
filter_options = _group(
    click.option(
        "--positive-from", type=float, metavar="RATING", help="Leave rows with a lower rating out.  [every row counts]"
    ),
    click.option(
        "--rating-column", metavar="NAME", help="The column of --positive-from.  [the weight column, or else rating]"
    ),
    click.option(
        "--min-user-interactions",
        type=int,
        metavar="N",
        help="Remove users with fewer items, and items with fewer users (below), until none is left to remove.  [1]",
    ),
    click.option(
        "--min-item-interactions", type=int, metavar="N", help="Remove items with fewer users, likewise.  [1]"
    ),
    click.option(
        "--half-life", type=float, metavar="DAYS", help="An interaction weighs half after so many days.  [no ageing]"
    ),
)
time_options = _group(
    click.option(
        "--time-column",
        metavar="NAME",
        help="The column of times, of the splits by time and of --half-life.  [recognised, such as timestamp]",
    ),
    click.option("--test-from", metavar="TIME", help="temporal: the test begins here, as 2024-05-01.  [by --test]"),
    click.option(
        "--validation-from", metavar="TIME", help="temporal: validation begins here, likewise.  [by --validation]"
    ),
    click.option("--last-n", type=int, metavar="N", help="leave-last-out: items of every user in the test.  [1]"),
)
data_options = _group(
    task_option,
    click.option(
        "--data", metavar="PATH", help="The interaction log, or CTR data set: a file, a folder or a quoted glob."
    ),
    click.option("--format", type=click.Choice(FORMATS), help="Format of the log.  [auto: detected]"),
    click.option("--user-column", metavar="NAME", help="csv, tsv, parquet: the column of user ids.  [user_id]"),
    click.option("--item-column", metavar="NAME", help="csv, tsv, parquet: the column of item ids.  [item_id]"),
    click.option(
        "--user-kind", type=click.Choice(ID_KINDS), help="Type of the user ids; string: as they stand.  [auto]"
    ),
    click.option("--item-kind", type=click.Choice(ID_KINDS), help="Type of the item ids, likewise.  [auto]"),
    csv_options,
    click.option("--weight-column", metavar="NAME", help="The column of interaction weights.  [every row weighs 1]"),
    filter_options,
    click.option(
        "--user-features",
        metavar="FILE",
        help="Method lsh: user features, a csv, tsv or parquet file of the id column and numbers.",
    ),
    click.option("--item-features", metavar="FILE", help="Method lsh: item features, likewise."),
    click.option(
        "--bad-rows",
        type=click.Choice(("error", "skip")),
        help="error: stop at the first bad row; skip: keep bad rows in ingest/rejected.parquet.  [error]",
    ),
    click.option(
        "--split",
        type=click.Choice(SPLITS),
        help="random: draw validation and test; given: the data set's own test file; temporal: the latest interactions; "
        "leave-last-out: the latest of every user.  [random]",
    ),
    time_options,
    click.option("--validation", type=float, help="Share of interactions held out for validation.  [0.1]"),
    click.option("--test", type=float, help="Share of interactions held out for the test.  [0.1]"),
    ctr_data_options,
)
budget_options = _group(
    click.option(
        "--ratio",
        type=float,
        help="Budget in bytes: of everything kept, as a share of the uncompressed tables.  [0.25]",
    ),
    click.option("--rows", type=int, help="Budget in rows: of user and item table together, exactly; 4 or more."),
    click.option(
        "--user-rows", type=int, help="Budget in rows of the user table, exactly; with --item-rows; 2 or more."
    ),
    click.option(
        "--item-rows", type=int, help="Budget in rows of the item table, exactly; with --user-rows; 2 or more."
    ),
    click.option(
        "--resolution",
        type=float,
        help="Instead of a budget: resolution of the modularity; a higher one gives more rows.",
    ),
)
clustering_options = _group(
    click.option(
        "--cluster-method",
        type=click.Choice(CLUSTER_METHODS),
        help="leiden: connected communities, slower; lpa: label propagation, faster, lower modularity; balanced: BACO.  [louvain]",
    ),
    click.option(
        "--levels",
        metavar="G[,G]...",
        help="Also write nested communities at these resolutions, with raw ids: cluster/levels_users.parquet, levels_items.parquet.",
    ),
    click.option("--max-size", type=int, help="Maximum number of users, and of items, in a community.  [no bound]"),
    click.option("--threads", type=int, help="Threads of the clustering.  [one per core]"),
    click.option(
        "--shards",
        type=int,
        help="Cluster in Ray tasks over this many shards of the graph, with the same result.  [0: in one process]",
    ),
)
cluster_options = _group(budget_options, clustering_options)
METHOD_NAMES = (
    "soft, double_soft, residual, graph, double_graph, multilevel; baco, modulo, double, quotient_remainder, "
    "frequency, double_frequency, lsh, lsh_structure; full, full_float16, full_int8, full_int4, full_pq, full_opq, "
    "full_small_dim; full_soft, full_soft_int8, full_soft_int4, full_soft_pq, additive, full_soft_small_dim (CTR); cce, robe, "
    "dhe."
)
method_option = click.option("--method", metavar="NAME[,NAME]...", help=f"{METHOD_NAMES}  [soft]")
model_options = _group(
    click.option(
        "--model",
        type=click.Choice((*MODELS, *CTR_MODELS)),
        help="retrieval: mf, neumf or lightgcn; ctr: one of the others.  [mf; ctr: dlrm]",
    ),
    click.option(
        "--loss",
        type=click.Choice(LOSSES),
        help="All but bpr need mf or lightgcn, which have a vector per id.  [bpr]",
    ),
)
training_options = _group(
    click.option(
        "--indices-per-id", type=int, help="Table rows read per id: the number of hash functions.  [the method's]"
    ),
    click.option("--item-bias/--no-item-bias", default=None, help="Train a bias per item.  [on for soft]"),
    click.option("--dim", type=int, help="Embedding dimension.  [64]"),
    click.option(
        "--lr", type=float, help="Initial learning rate of Adam; it falls to 0 over the epochs.  [the method's]"
    ),
    click.option("--weight-decay", type=float, help="Weight decay of Adam.  [the method's]"),
    click.option(
        "--epochs", type=int, help="Maximum number of epochs; early stopping may end training before.  [the model's]"
    ),
    click.option("--batch-size", type=int, help="Examples per step; 0: all of them.  [the model's]"),
    click.option(
        "--mlflow/--no-mlflow", default=None, help="Track the run in MLFLOW_TRACKING_URI, or else ./mlflow.db.  [on]"
    ),
)
workers_option = click.option("--workers", type=int, help="Data-parallel training processes.  [one per GPU, or one]")
train_options = _group(method_option, model_options, training_options, workers_option)
cutoff_option = click.option(
    "--k",
    metavar="K[,K]...",
    help="Cut-offs of recall, NDCG, hit rate, MRR and coverage on the test; the first is that of tables.  [20]",
)
resume_option = click.option(
    "--resume/--no-resume",
    default=None,
    help="--resume: continue from a checkpoint, and fail without one; --no-resume: start over.  [continue if there is one]",
)
_precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Number type of the stored tables.  [auto: int4 for soft maps, float32 for full, else int8]",
)
_runtime_option = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="What serving keeps in memory. materialized: a float32 vector per item, fastest; compressed: the small tables alone, and"
    " requests take two times (1 user) to five times (256 users) as long.  [auto: materialized where that takes up to 4 GiB]",
)


def export_options(command: F) -> F:
    """Precision and runtime of the bundle."""
    return _precision_option(_runtime_option(command))


def load(options: dict[str, Any]) -> RunConfig:
    """The settings of a command, from weak to strong: defaults, those of the run folder, --config, options, overrides.

    Args:
        options: of the command, by parameter name. With ``data`` the settings of the run folder are not read.
    """
    from pipeline.config.run_config import RunConfig
    from pipeline.storage.uris import is_uri

    out, remote = place(options["out"], options["work"])
    requested = {name: value for name, value in options.items() if name in KEYS and value is not None}
    requested |= csv_settings(options)
    for name in ("method", "levels", "k"):
        if name in requested:
            requested[name] = _parts(requested[name])
    for name in ("data", "user_features", "item_features", "schema"):
        if requested.get(name) and not is_uri(requested[name]):
            requested[name] = str(Path(requested[name]).absolute())
    cli = {key: value for name, value in requested.items() for key in KEYS[name]} | {"run.out": str(out)}
    files = [Path(options["config_file"])] if options["config_file"] else []
    if "data" not in requested and remote is not None:
        from pipeline.runs.remote import Mirror

        Mirror(remote, out).fetch_file(CONFIG_FILE)
    if "data" not in requested and (out / CONFIG_FILE).is_file():
        files.insert(0, out / CONFIG_FILE)
    config = RunConfig.load(files, options["overrides"], **cli)
    if not config.data.path:
        raise ConfigError(f"no data: give --data PATH ({options['out']} holds no settings of an earlier command)")
    from pipeline.runs.tasks import task_of

    if defaults := task_of(config).data_defaults(config):
        config = RunConfig.load(files, options["overrides"], defaults=defaults, **cli)
    # The URI of an earlier command or of a file does not count: a run folder may have been copied.
    return RunConfig.from_flat(config.flat() | {"run.remote": remote})


def csv_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of csv files that are not written as the options are; `columns` is None with `--header yes`.

    Raises:
        ConfigError: `--header` and `--columns` contradict each other.
    """
    header, columns = options.get("header"), options.get("columns")
    if (header == "no") != bool(columns) and (header is not None or columns is not None):
        raise ConfigError("--header no and --columns go together: give the names of all columns, or leave both out")
    settings: dict[str, Any] = {"separator": "\t"} if options.get("separator") in ("tab", "\\t") else {}
    if header is not None:
        settings["columns"] = _parts(columns) if columns else None
    return settings


def _parts(text: str) -> tuple[str, ...]:
    """The parts of a list between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def place(out: str, work: str | None) -> tuple[Path, str | None]:
    """The local run folder, and its URI where it is kept at one.

    Raises:
        ConfigError: a path that would be deleted with a Ray job.
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
    """Write the file of ``--json``, if there is one."""
    if file is not None:
        from pipeline.storage.atomic import write_json_atomic

        write_json_atomic(Path(file), value)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns padded to their widest text, the first aligned left, the others right."""
    lines = (header, *rows)
    first, *others = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        texts = (text.rjust(width) for text, width in zip(line[1:], others, strict=True))
        print("  ".join((line[0].ljust(first), *texts)).rstrip())


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
