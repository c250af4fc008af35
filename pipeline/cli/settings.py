"""The settings of a command: which options set which, and where the others come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def load(options: dict[str, Any]) -> RunConfig:
    """The settings of a command, from weak to strong: defaults, those of the run folder, --config, options, overrides.

    Args:
        options: of the command, by parameter name. With ``data`` the settings of the run folder are not read.
    """
    from pipeline.config.choices import AUTO_LOSS, AUTO_METHODS
    from pipeline.config.run_config import RunConfig
    from pipeline.config.toml_file import CONFIG_FILE
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
    # Programs that make a configuration have its defaults; a command looks at the log first.
    auto = {"train.loss": AUTO_LOSS, "run.methods": AUTO_METHODS}
    config = RunConfig.load(files, options["overrides"], defaults=auto, **cli)
    if not config.data.path:
        raise ConfigError(f"no data: give --data PATH ({options['out']} holds no settings of an earlier command)")
    from pipeline.runs.tasks import task_of

    if defaults := task_of(config).data_defaults(config):
        config = RunConfig.load(files, options["overrides"], defaults=auto | defaults, **cli)
    # The URI of an earlier command or of a file does not count: a run folder may have been copied.
    final: dict[str, Any] = {"run.remote": remote}
    if config.run.task == "ctr":
        final |= {"train.loss": "bpr"} if config.train.loss == AUTO_LOSS else {}
    return RunConfig.from_flat(config.flat() | final)


def log_settings(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings of the section data that options of a log set, by key, with those of csv files.

    Args:
        names: of the options, which are those of the settings.
    """
    return {name: options[name] for name in names if options.get(name) is not None} | csv_settings(options)


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


def _parts(text: str) -> tuple[str, ...]:
    """The parts of a list between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
