"""The interface of a task: what a run computes in each stage, which settings each stage reads, and how models are measured.

Retrieval (`pipeline.retrieval.task`) and click-through rate prediction (`pipeline.ctr.task`) implement it; `pipeline.runs.tasks` is the
registry. The order of the stages, the run folder, tracking, comparison and search know a task through this interface alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.tracking.onnx_model import ModelCall
    from pipeline.training.forecast import RunForecast
    from pipeline.training.job import TrainingSession

# Bytes of full float32 tables above which a default method is `soft`: the others train as much as these.
MOST_FULL_BYTES = 2**30
# Settings that change no output of any task: places, and how much of a machine is used.
CHANGE_NO_OUTPUT = frozenset(
    {
        "data.path",  # The content of the log counts.
        "cluster.threads",
        "cluster.shards",
        "train.workers",  # Figures change as with another seed, and no more.
        "train.checkpoint_seconds",
        "train.propagation",
        "run.methods",  # Each method has stages of its own; a byte budget reads them, and lists them.
        "run.out",
        "run.remote",
        "run.address",
        "run.experiment",
        "run.mlflow",
    }
)
# Parts of the log that a training learns from, and those that a refit does.
TRAIN_PARTS: tuple[str, ...] = ("train",)
REFIT_PARTS: tuple[str, ...] = ("train", "validation")


@dataclass(frozen=True)
class Measure:
    """A test metric, as tables and pictures name it.

    Args:
        key: in metrics.
        title: of a column.
        words: on the axis of a picture.
        higher_is_better: None where the best value is 1.
    """

    key: str
    title: str
    words: str
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class MetricTable:
    """A further table of test metrics, one row per method.

    Args:
        title: its heading.
        note: what it shows, in a sentence or two.
        columns: titles, and the keys whose values share a cell, in this order.
    """

    title: str
    note: str
    columns: tuple[tuple[str, tuple[str, ...]], ...]

    def cells(self, metrics: Mapping[str, Any]) -> list[str]:
        """The texts of a row; `-` where there is no figure."""
        return [" / ".join(_figure(metrics.get(key)) for key in keys) for _, keys in self.columns]

    def has_figures(self, metrics: Mapping[str, Any]) -> bool:
        """Whether there is anything to show."""
        return any(metrics.get(key) is not None for _, keys in self.columns for key in keys)


@dataclass(frozen=True)
class StageContext:
    """What a stage reads: the settings, and the folder of the run with the outputs of earlier stages.

    Args:
        config: inputs at URIs are replaced by local copies.
        run: the run folder.
    """

    config: RunConfig
    run: Path

    @property
    def ingest_dir(self) -> Path:
        return self.run / "ingest"

    @property
    def cluster_dir(self) -> Path:
        return self.run / "cluster"

    def method_dir(self, method: str) -> Path:
        return self.run / "methods" / method

    def model_dir(self, method: str) -> Path:
        """The folder of the model that is tested and exported: that of the refit where there is one."""
        return model_dir(self.config, self.run, method)


def refits(config: RunConfig) -> bool:
    """Whether the models of a run are trained once more on train and validation together, and these are tested and exported."""
    return config.train.refit is not False and config.data.has_validation


def model_parts(config: RunConfig) -> tuple[str, ...]:
    """Parts of the log that the tested models of a run have learnt from."""
    return REFIT_PARTS if refits(config) else TRAIN_PARTS


def model_dir(config: RunConfig, run: Path, method: str) -> Path:
    """The folder of the tested model of a method: ``RUN/refit/<method>``, or ``RUN/methods/<method>`` without a refit."""
    return run / ("refit" if refits(config) else "methods") / method


def model_stage(config: RunConfig, method: str) -> str:
    """The name of the stage that makes the tested model of a method."""
    return f"{'refit' if refits(config) else 'train'} {method}"


class Task(Protocol):
    """One way of using compressed tables.

    Attributes:
        name: as in `run.task`.
        validation_metric: training maximises it, and a search compares by it.
        default_budget: (kind, value) of a run that is given none.
        comparison_budgets: of a comparison that is given none.
        models: settings of a model by the name that a comparison gives it; the first is the default.
        bytes_note: what the bytes of a comparison's table count.
        l2_total_range: of `train.l2_total` in a search.
        stage_fields: configuration keys that each stage reads, whatever their values.
        byte_budget_fields: those that the cluster stage reads as well where a ratio of the bytes is the budget.
        unread_fields: those of other tasks.
    """

    name: str
    validation_metric: str
    default_budget: tuple[str, float]
    comparison_budgets: tuple[tuple[str, float], ...]
    models: Mapping[str, Mapping[str, str]]
    bytes_note: str
    l2_total_range: tuple[float, float]
    stage_fields: Mapping[str, tuple[str, ...]]
    byte_budget_fields: tuple[str, ...]
    unread_fields: frozenset[str]

    def measures_of(self, cutoffs: Sequence[int]) -> tuple[Measure, ...]:
        """Test metrics that are columns of tables; the first is the main one, which is drawn.

        Args:
            cutoffs: `evaluate.k` as numbers, as in metrics; a task without rankings ignores them.
        """

    def metric_keys(self, cutoffs: Sequence[int]) -> tuple[str, ...]:
        """Keys of all test metrics that a comparison averages."""

    def further_tables(self, cutoffs: Sequence[int]) -> tuple[MetricTable, ...]:
        """Tables of further test metrics, for the reports of a run and of a comparison."""

    def check_methods(self, methods: Sequence[str]) -> None:
        """Raise ConfigError for a method that the task does not support."""

    def check_trainable(self, config: RunConfig) -> None:
        """Raise ConfigError where nothing would end a training with these settings."""

    def check_sizes(self, context: StageContext) -> None:
        """Raise DataError where the budget in bytes is too small for a method, before anything is trained.

        Args:
            context: with an ingested log.
        """

    def check_exportable(self, config: RunConfig) -> None:
        """Raise ConfigError where a trained model cannot be exported with these settings."""

    def data_defaults(self, config: RunConfig) -> dict[str, Any]:
        """Settings that a known data set brings along, by dotted key; weaker than settings that are given."""

    def with_log_defaults(self, config: RunConfig, facts: Mapping[str, Any]) -> RunConfig:
        """The settings with those decided that follow from the ingested log: the loss, where it is `auto`.

        Args:
            facts: what :meth:`ingest` returned.
        """

    def precision_of(self, config: RunConfig, method: str) -> str:
        """Type of a method's stored tables: float32, float16, int8 or int4."""

    def planned_precision_of(self, config: RunConfig, method: str) -> str:
        """Type of a method's tables in which a byte budget counts rows."""

    def needs_ray(self, stage: str, config: RunConfig) -> bool:
        """Whether the stage runs on Ray."""

    def settings(self, stage: str, config: RunConfig, method: str = "") -> dict[str, Any]:
        """The settings that the output of a stage depends on, by dotted key; JSON values."""

    def needs_clusters(self, config: RunConfig, method: str) -> bool:
        """Whether the training of a method depends on the clustering."""

    def trained_as(self, method: str) -> str | None:
        """The method whose trained weights this one stores otherwise; None: it is trained itself."""

    def log_files(self, config: RunConfig) -> list[Path]:
        """The files whose names and content decide what is ingested."""

    def method_files(self, config: RunConfig, method: str) -> dict[str, Path]:
        """Further files that the training of a method reads, by the name that messages give them."""

    def updates(self, run: Path, method: str, train_key: str) -> str | None:
        """Identifies the ids that updates added to a training; None where there are none."""

    def forecast(self, context: StageContext, stages: Sequence[str]) -> RunForecast | None:
        """Sizes, seconds and memory of stages before they are computed, measured on a part of the log; None: the task has no forecast.

        Args:
            stages: names of the steps that have to be computed; outputs of the others are in the run folder.
        """

    def ingest(self, context: StageContext, out: Path) -> dict[str, Any]:
        """Read, split and store the log in the folder `out`; returns facts."""

    def cluster(self, context: StageContext, out: Path) -> dict[str, Any]:
        """Cluster the ingested log; returns facts."""

    def train(self, context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
        """Make the bucket maps of a method, train, and store the weights; returns facts."""

    def refit(self, context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
        """Train a method once more on train and validation, for as many epochs as were best, and store the weights; returns facts."""

    def evaluate(self, context: StageContext, method: str) -> dict[str, Any]:
        """Measure a trained method on the test, and count its bytes; returns metrics."""

    def export(
        self, context: StageContext, method: str, out: Path, metrics: dict[str, Any], train_key: str
    ) -> dict[str, Any]:
        """Write the bundle of a trained method; returns the manifest.

        Args:
            metrics: of the evaluation, with `method` and `mlflow_run_id`.
            train_key: of the training, to which updates belong.
        """

    def report(self, run: Path) -> list[Path]:
        """Draw and write the report; returns its files."""

    def defaults(self, config: RunConfig, method: str) -> dict[str, float]:
        """`train.lr` and `train.l2_total` of a method where they are not set."""

    def example_call(self, manifest: Mapping[str, Any], ingest_dir: Path | None = None) -> ModelCall:
        """A call that a bundle answers, stored with the model in MLflow.

        Args:
            ingest_dir: RUN/ingest, which has the ids to call with; None: ids that need not be known.
        """


def stored_precision(config: RunConfig, auto: str) -> str:
    """Type of stored tables: that of the export, else the one that the run was planned for, else `auto`."""
    for precision in (config.export.precision, config.cluster.budget_precision):
        if precision not in ("auto", None):
            return precision
    return auto


def planned_precision(config: RunConfig, auto: str) -> str:
    """Type of tables in which a byte budget counts rows; `auto` where the configuration leaves it open."""
    precision = config.cluster.budget_precision or config.export.precision
    return auto if precision == "auto" else precision


def measures_as_text(measures: Sequence[Measure], metrics: Mapping[str, Any]) -> list[str]:
    """The test metrics of a method as text; `-` where there was no test."""
    return [_figure(metrics[measure.key]) for measure in measures]


def remarks(measures: Sequence[Measure], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why measures are `-`, and what is wrong with a method, as lines.

    Args:
        metrics: of methods; `unmeasured` is the reason of every measure that is None, `warnings` are lines of the method.
    """
    titles = {measure.key: measure.title for measure in measures}
    reasons: dict[str, list[str]] = {}
    warnings = []
    for entry in metrics:
        for key, reason in entry.get("unmeasured", {}).items():
            if key in titles and titles[key] not in reasons.setdefault(reason, []):
                reasons[reason].append(titles[key])
        warnings += [f"warning: method {entry['method']} {warning}" for warning in entry.get("warnings", [])]
    lines = [f"{', '.join(names)}: - because {reason}" for reason, names in reasons.items() if names]
    return [*lines, *dict.fromkeys(warnings)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def chosen(config: RunConfig, keys: Sequence[str]) -> dict[str, Any]:
    """The values of some settings by dotted key."""
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in keys}


def budget_of(config: RunConfig, default: tuple[str, float]) -> tuple[str, Any]:
    """Kind and value of the budget: `resolution`, `rows`, `side_rows` (rows of users, rows of items) or `ratio`.

    Args:
        default: of the task, where the configuration names no budget.
    """
    cluster = config.cluster
    if cluster.user_rows is not None:
        return "side_rows", (cluster.user_rows, cluster.item_rows)
    for kind in ("resolution", "rows", "ratio"):
        if (value := getattr(cluster, kind)) is not None:
            return kind, value
    return default


def budget_settings(budget: tuple[str, Any]) -> dict[str, Any]:
    """A budget as settings by dotted key."""
    kind, value = budget
    if kind == "side_rows":
        return {"cluster.user_rows": value[0], "cluster.item_rows": value[1]}
    return {f"cluster.{kind}": value}


def shared_provenance(config: RunConfig, metrics: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle records of its origin: method, MLflow run, settings, and the log.

    Args:
        metrics: of the evaluation, with `method` and `mlflow_run_id`.
        data: sizes and hashes of the log.
    """
    settings = config.flat()
    # Without the sections `data` and `run`, which name places on the machine that made the bundle.
    return {
        "method": metrics["method"],
        "mlflow_run_id": metrics["mlflow_run_id"],
        "settings": {key: settings[key] for key in settings if key.split(".")[0] in ("cluster", "map", "train")},
        "data": {**data, **{key: settings[f"data.{key}"] for key in ("split", "validation", "test", "seed")}},
    }


def bundle_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a method's metrics that its manifest holds."""
    return {key: value for key, value in metrics.items() if key not in ("method", "mlflow_run_id")}
