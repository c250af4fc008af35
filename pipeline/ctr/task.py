"""Click-through rate prediction as a task: probabilities from any columns. Heavy packages are imported by the stages that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ctr.defaults import (
    DEFAULT_BUDGET,
    MEASURES,
    clustering_budget,
    keeps_every_row,
    kept_precision_of,
    planned_kept_precision_of,
    planned_precision_of,
    precision_of,
)
from pipeline.errors import ConfigError
from pipeline.task import (
    Measure,
    MetricTable,
    StageContext,
    budget_of,
    budget_settings,
    bundle_metrics,
    chosen,
    shared_provenance,
)

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.tracking.onnx_model import ModelCall
    from pipeline.training.forecast import RunForecast
    from pipeline.training.job import TrainingSession


# Raised by one when the files of this task's trainings change.
TRAIN_FORMAT = 2


class Ctr:
    """Implements `pipeline.task.Task`."""

    name = "ctr"
    validation_metric = "auc"
    default_budget: tuple[str, float] = DEFAULT_BUDGET
    comparison_budgets: tuple[tuple[str, float], ...] = (DEFAULT_BUDGET,)
    models: Mapping[str, Mapping[str, str]] = {
        name: {"train.model": name} for name in ("dlrm", "dcnv2", "finalnet", "deepfm", "widedeep")
    }
    bytes_note = (
        "Bytes are those of everything kept (tables, bucket maps, first-order weights, biases and layers), over those of the model with "
        "full float32 tables; the measures are of the test rows. Calibration is the mean prediction over the mean label, ECE the expected "
        "calibration error, group AUC the mean over the groups (users)."
    )
    l2_total_range = (0.1, 100.0)
    stage_fields: Mapping[str, tuple[str, ...]] = {
        "ingest": (
            "run.task",
            "data.format",
            "data.user_column",
            "data.item_column",
            "data.label_column",
            "data.separator",
            "data.encoding",
            "data.columns",
            "data.user_kind",
            "data.item_kind",
            "data.min_count",
            "data.split",
            "data.time_column",
            "data.test_from",
            "data.validation_from",
            "data.validation",
            "data.test",
            "data.seed",
        ),
        "cluster": (
            "cluster.method",
            "cluster.max_size",
            "cluster.tolerance",
            "cluster.max_cycles",
        ),
        "train": (
            "map.indices_per_id",
            "map.hops",
            "map.item_bias",
            "map.seed",
            "train.model",
            "train.dim",
            "train.lr",
            "train.l2_total",
            "train.weight_decay",
            "train.epochs",
            "train.schedule",
            "train.patience",
            "train.eval_every",
            "train.batch_size",
            "train.hidden",
            "train.dropout",
            "train.n_cross",
            "train.cross_rank",
            "train.structure",
            "train.score",
            "train.calibrate",
            "train.seed",
        ),
        "refit": ("train.refit",),
        "evaluate": (),
        "export": ("export.external_data_mib",),
    }
    # Read where a ratio of the bytes is the budget: they decide how many rows fit.
    byte_budget_fields: tuple[str, ...] = (
        "map.indices_per_id",
        "map.item_bias",
        "train.model",
        "train.dim",
        "train.hidden",
        "train.n_cross",
        "train.cross_rank",
        "train.structure",
    )
    # Settings of task `retrieval`, those that the task refuses, and files whose content counts.
    unread_fields = frozenset(
        {
            "data.schema",
            "data.weight_column",
            "data.rating_column",
            "data.positive_from",
            "data.min_user_interactions",
            "data.min_item_interactions",
            "data.last_n",
            "data.half_life",
            "data.user_features",
            "data.item_features",
            "data.bad_rows",
            "data.shards",
            "cluster.levels",
            "cluster.user_rows",
            "cluster.item_rows",
            "map.codes_per_id",
            "map.own_dim",
            "map.own_bits",
            "map.residual_dim",
            "train.loss",
            "train.n_layers",
            "train.gamma",
            "train.unobserved_weight",
            "train.temperature",
            "train.negatives",
            "train.negative_weight",
            "train.margin",
            "train.mask_same_row",
            "train.cosine",
            "train.initial_std",
            "train.sampler",
            "train.popularity_power",
            "train.eval_users",
            "train.amp",
            "train.compile",
            "train.sparse_gradients",
            "export.runtime",
            "evaluate.k",
            "evaluate.users",
        }
    )

    def measures_of(self, cutoffs: Sequence[int]) -> tuple[Measure, ...]:
        return MEASURES

    def metric_keys(self, cutoffs: Sequence[int]) -> tuple[str, ...]:
        return tuple(measure.key for measure in MEASURES)

    def further_tables(self, cutoffs: Sequence[int]) -> tuple[MetricTable, ...]:
        return ()

    def check_trainable(self, config: RunConfig) -> None:
        """Every training ends."""

    def check_methods(self, methods: Sequence[str]) -> None:
        from pipeline.maps.methods import METHODS

        for method in methods:
            if METHODS[method].task not in (None, self.name):
                raise ConfigError(
                    f"method {method!r} is not supported with run.task=ctr; use retrieval, or another method"
                )
        if "lsh" in methods:
            raise ConfigError(
                "method 'lsh' needs features of users and items, which run.task=ctr does not read; use lsh_structure"
            )

    def needs_clusters(self, config: RunConfig, method: str) -> bool:
        from pipeline.maps.methods import METHODS

        # A budget of rows leaves as many bytes as the clustering's rows take.
        by_rows = METHODS[method].sized and budget_of(config, self.default_budget)[0] != "ratio"
        return not keeps_every_row(method) or by_rows

    def trained_as(self, method: str) -> str | None:
        from pipeline.maps.methods import METHODS

        return METHODS[method].trained_as

    def check_sizes(self, context: StageContext) -> None:
        from pipeline.ctr.data import Features
        from pipeline.ctr.method_spec import method_spec
        from pipeline.maps.methods import METHODS

        config = context.config
        for method in config.run.methods:
            if METHODS[method].sized and budget_of(config, self.default_budget)[0] == "ratio":
                method_spec(config, Features.open(context.ingest_dir), method, ())

    def check_exportable(self, config: RunConfig) -> None:
        if config.export.runtime == "materialized":
            raise ConfigError(
                "export.runtime=materialized is not supported with run.task=ctr, whose tables stay as they are stored; leave it out"
            )

    def data_defaults(self, config: RunConfig) -> dict[str, Any]:
        from pipeline.ctr.log import named_settings

        return named_settings(config.data.path, config.data.format)

    def with_log_defaults(self, config: RunConfig, facts: Mapping[str, Any]) -> RunConfig:
        """The loss is binary cross-entropy."""
        from pipeline.ctr.default_method import with_method_of_budget

        return with_method_of_budget(config, sum(facts["columns"].values()))

    def precision_of(self, config: RunConfig, method: str) -> str:
        return precision_of(config, method)

    def planned_precision_of(self, config: RunConfig, method: str) -> str:
        return planned_precision_of(config, method)

    def needs_ray(self, stage: str, config: RunConfig) -> bool:
        from pipeline.distributed.session import on_cluster
        from pipeline.training.machine import trains_on_ray

        if stage in ("ingest", "cluster"):
            return on_cluster(config.run.address)  # On one machine this process does the same work.
        return stage == "train" and trains_on_ray(config)

    def settings(self, stage: str, config: RunConfig, method: str = "") -> dict[str, Any]:
        from pipeline.maps.methods import METHODS

        values = chosen(config, self.stage_fields[stage])
        if stage == "ingest":
            # The content of the schema file counts, and not where it lies.
            values["data.schema"] = config.data.schema is not None
        if stage == "cluster":
            budget = clustering_budget(config)
            values |= budget_settings(budget)
            if budget[0] == "ratio":
                compressed = sorted(name for name in config.run.methods if METHODS[name].reads_communities)
                # Columns that stay full take bytes as well.
                precisions = {name: planned_precision_of(config, name) for name in compressed}
                precisions["kept"] = planned_kept_precision_of(config)
                values |= chosen(config, self.byte_budget_fields)
                values |= {"run.methods": compressed, "cluster.budget_precision": precisions}
        if stage == "train":
            values = self._train_settings(config, method)
        if stage == "refit":
            values["train.refit"] = True  # As it is where the setting is left open.
        if stage in ("evaluate", "export"):
            # The evaluation rounds tables as the export stores them, those of full columns too.
            values["export.precision"] = {method: precision_of(config, method), "kept": kept_precision_of(config)}
        return values

    def _train_settings(self, config: RunConfig, method: str) -> dict[str, Any]:
        """What is trained already depends on its own sizes alone."""
        from pipeline.maps.methods import METHODS

        values: dict[str, Any] = {"format": TRAIN_FORMAT}
        if METHODS[method].trained_as is None:
            values |= chosen(config, self.stage_fields["train"])
        if METHODS[method].sized:
            kind, value = budget_of(config, self.default_budget)
            values |= {"cluster.ratio": value} if kind == "ratio" else {}
            values |= {"cluster.budget_precision": planned_precision_of(config, method), "map.seed": config.map.seed}
            values |= chosen(config, self.byte_budget_fields)
        return values

    def log_files(self, config: RunConfig) -> list[Path]:
        from pipeline.ctr.log import log_paths

        return log_paths(config.data)

    def method_files(self, config: RunConfig, method: str) -> dict[str, Path]:
        return {}

    def updates(self, run: Path, method: str, train_key: str) -> str | None:
        from pipeline.ctr.folded_in import stored_facts

        facts = stored_facts(run, method)
        return facts["id"] if facts.get("train_key") == train_key else None

    def forecast(self, context: StageContext, stages: Sequence[str]) -> RunForecast:
        from pipeline.ctr.forecast import forecast

        return forecast(context, stages)

    def ingest(self, context: StageContext, out: Path) -> dict[str, Any]:
        from pipeline.ctr.ingest import ingest_ctr

        return ingest_ctr(context.config.data, out)

    def cluster(self, context: StageContext, out: Path) -> dict[str, Any]:
        from pipeline.ctr.cluster import cluster_ctr

        return cluster_ctr(context.config, context.ingest_dir, out)

    def train(self, context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
        from pipeline.ctr.train import train_ctr

        return train_ctr(context, method, out, session)

    def refit(self, context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
        from pipeline.ctr.refit import refit_ctr

        return refit_ctr(context, method, out, session)

    def evaluate(self, context: StageContext, method: str) -> dict[str, Any]:
        from pipeline.ctr.evaluate import evaluate_ctr

        return evaluate_ctr(context.config, method, context.ingest_dir, context.model_dir(method))

    def export(
        self, context: StageContext, method: str, out: Path, metrics: dict[str, Any], train_key: str
    ) -> dict[str, Any]:
        from pipeline.ctr.budget import precisions_of
        from pipeline.ctr.export import ExportOptions, data_facts, drawn_rows, export_ctr
        from pipeline.ctr.folded_in import open_folded_columns, renumbered, with_folded_columns
        from pipeline.ctr.weights import load_ctr

        trained = load_ctr(context.model_dir(method), context.ingest_dir)
        part = next(part for part in map(trained.features.part, ("test", "validation", "train")) if len(part))
        provenance = shared_provenance(context.config, metrics, data_facts(context.ingest_dir))
        if self.updates(context.run, method, train_key) is not None:
            folded = open_folded_columns(context.run, method, train_key)
            columns, trained = trained.features.columns, with_folded_columns(trained, folded)
            part = renumbered(drawn_rows(part), columns, trained.features.columns)
            # Metrics are of the training alone.
            provenance |= {"updates": list(folded.updates)}
        return export_ctr(
            trained,
            precisions_of(context.config, method, trained.maps, trained.model.spec.embeddings),
            out,
            ExportOptions(method, metrics["precision"], context.config.export.external_data_mib),
            part=part,
            metrics=bundle_metrics(metrics),
            provenance=provenance,
        )

    def report(self, run: Path) -> list[Path]:
        from pipeline.ctr.report import write_ctr_report

        return write_ctr_report(run)

    def defaults(self, config: RunConfig, method: str) -> dict[str, float]:
        from pipeline.ctr.models import CTR_PRESETS

        preset = CTR_PRESETS[config.train.model]
        return {"train.lr": preset.lr, "train.l2_total": preset.l2_total}

    def example_call(self, manifest: Mapping[str, Any], ingest_dir: Path | None = None) -> ModelCall:
        from pipeline.ctr.example import known_call, unknown_call

        return unknown_call(manifest) if ingest_dir is None else known_call(manifest, ingest_dir)
