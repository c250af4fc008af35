"""Retrieval as a task: rank items for users, trained on interactions. Heavy packages are imported by the stages that need them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.retrieval.defaults import (
    DEFAULT_BUDGET,
    clustering_budget,
    further_tables,
    measures_of,
    metric_keys,
    planned_precision_of,
    precision_of,
)
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

# Sizes of method `residual`.
RESIDUAL_FIELDS = ("map.own_dim", "map.own_bits", "map.residual_dim")


class Retrieval:
    """Implements `pipeline.task.Task`."""

    name = "retrieval"
    validation_metric = "capped_recall@20"
    default_budget: tuple[str, float] = DEFAULT_BUDGET
    comparison_budgets: tuple[tuple[str, float], ...] = ((DEFAULT_BUDGET[0], DEFAULT_BUDGET[1] / 2), DEFAULT_BUDGET)
    models: Mapping[str, Mapping[str, str]] = {
        "mf": {"train.model": "mf", "train.loss": "bpr"},
        "neumf": {"train.model": "neumf", "train.loss": "bpr"},
        "lightgcn": {"train.model": "lightgcn", "train.loss": "bpr"},
        "softmax": {"train.model": "mf", "train.loss": "softmax"},
        "bsl": {"train.model": "mf", "train.loss": "bsl"},
        "ccl": {"train.model": "mf", "train.loss": "ccl"},
        "directau": {"train.model": "mf", "train.loss": "directau"},
        "ials": {"train.model": "mf", "train.loss": "ials"},
        "lightgcn_softmax": {"train.model": "lightgcn", "train.loss": "softmax"},
        "lightgcn_bsl": {"train.model": "lightgcn", "train.loss": "bsl"},
    }
    bytes_note = (
        "Bytes are those of everything kept (tables, bucket maps, biases, and the graph that LightGCN reads), over those of full float32 "
        "tables. Recall is over the number of a user's test items, capped recall over at most as many as are recommended."
    )
    l2_total_range = (1e-4, 0.2)
    stage_fields: Mapping[str, tuple[str, ...]] = {
        "ingest": (
            "run.task",
            "data.format",
            "data.user_column",
            "data.item_column",
            "data.weight_column",
            "data.rating_column",
            "data.positive_from",
            "data.min_user_interactions",
            "data.min_item_interactions",
            "data.time_column",
            "data.test_from",
            "data.validation_from",
            "data.last_n",
            "data.half_life",
            "data.separator",
            "data.encoding",
            "data.columns",
            "data.user_kind",
            "data.item_kind",
            "data.bad_rows",
            "data.split",
            "data.validation",
            "data.test",
            "data.seed",
            "data.shards",
        ),
        "cluster": (
            "cluster.method",
            "cluster.levels",
            "cluster.max_size",
            "cluster.tolerance",
            "cluster.max_cycles",
        ),
        "train": (
            "map.indices_per_id",
            "map.hops",
            "map.codes_per_id",
            *RESIDUAL_FIELDS,
            "map.item_bias",
            "map.seed",
            "train.model",
            "train.loss",
            "train.dim",
            "train.lr",
            "train.l2_total",
            "train.weight_decay",
            "train.epochs",
            "train.patience",
            "train.eval_every",
            "train.batch_size",
            "train.n_layers",
            "train.gamma",
            "train.unobserved_weight",
            "train.temperature",
            "train.negatives",
            "train.negative_weight",
            "train.margin",
            "train.dropout",
            "train.mask_same_row",
            "train.cosine",
            "train.initial_std",
            "train.schedule",
            "train.sampler",
            "train.popularity_power",
            "train.seed",
            "train.eval_users",
            "train.amp",
            "train.compile",
            "train.sparse_gradients",
        ),
        "refit": ("train.refit",),
        "evaluate": ("evaluate.k", "evaluate.users"),
        "export": ("export.runtime", "export.external_data_mib"),
    }
    # Read where a ratio of the bytes is the budget: they decide how many rows fit.
    byte_budget_fields: tuple[str, ...] = (
        "map.indices_per_id",
        "map.hops",
        "map.item_bias",
        "train.model",
        "train.loss",
        "train.dim",
        *RESIDUAL_FIELDS,
    )
    # Settings of task `ctr`, and files whose content counts.
    unread_fields = frozenset(
        {
            "data.label_column",
            "data.schema",
            "data.min_count",
            "data.user_features",
            "data.item_features",
            "train.hidden",
            "train.n_cross",
            "train.cross_rank",
            "train.structure",
            "train.score",
            "train.calibrate",
        }
    )

    def measures_of(self, cutoffs: Sequence[int]) -> tuple[Measure, ...]:
        return measures_of(cutoffs)

    def metric_keys(self, cutoffs: Sequence[int]) -> tuple[str, ...]:
        return metric_keys(cutoffs)

    def further_tables(self, cutoffs: Sequence[int]) -> tuple[MetricTable, ...]:
        return further_tables(cutoffs)

    def check_trainable(self, config: RunConfig) -> None:
        from pipeline.config.choices import AUTO_METHODS
        from pipeline.maps.methods import METHODS

        for method in () if config.run.methods == AUTO_METHODS else config.run.methods:
            if METHODS[method].embedding != "bucket" and config.train.model != "mf":
                raise ConfigError(
                    f"method {method!r} needs train.model=mf, got {config.train.model}; try --method soft"
                )
        if not config.data.has_validation and config.train.epochs is None:
            raise ConfigError(
                "data.validation=0.0 leaves nothing to stop the training by; give the number of epochs, such as --epochs 40, "
                "or a share above 0"
            )

    def check_methods(self, methods: Sequence[str]) -> None:
        from pipeline.maps.methods import METHODS

        for method in methods:
            if METHODS[method].task not in (None, self.name):
                raise ConfigError(
                    f"method {method!r} is of run.task={METHODS[method].task}; use it there, or another method"
                )

    def check_sizes(self, context: StageContext) -> None:
        from pipeline.distributed.shards import ShardedCsr
        from pipeline.maps.methods import METHODS
        from pipeline.retrieval.budget import GraphSize, check_sizes

        if any(METHODS[method].sized for method in context.config.run.methods):
            check_sizes(context.config, GraphSize.of_shards(ShardedCsr.open(context.ingest_dir / "train")))

    def check_exportable(self, config: RunConfig) -> None:
        """Every model can be exported."""

    def data_defaults(self, config: RunConfig) -> dict[str, Any]:
        return {}

    def with_log_defaults(self, config: RunConfig, facts: Mapping[str, Any]) -> RunConfig:
        from pipeline.retrieval.budget import GraphSize
        from pipeline.retrieval.default_loss import with_loss_of_log
        from pipeline.retrieval.default_method import with_method_of_budget

        size = GraphSize(facts["n_users"], facts["n_items"], facts["n_train"])
        return with_method_of_budget(with_loss_of_log(config, size), size)

    def precision_of(self, config: RunConfig, method: str) -> str:
        return precision_of(config, method)

    def planned_precision_of(self, config: RunConfig, method: str) -> str:
        return planned_precision_of(config, method)

    def needs_ray(self, stage: str, config: RunConfig) -> bool:
        from pipeline.distributed.session import on_cluster
        from pipeline.training.machine import trains_on_ray

        if stage == "ingest":
            return on_cluster(config.run.address)  # On one machine threads do the same work.
        if stage == "train":
            return config.cluster.shards > 0 or trains_on_ray(
                config
            )  # The maps are made of shards where the clustering was.
        if stage == "cluster":
            return config.cluster.shards > 0
        return stage == "evaluate" and (config.train.workers or 1) > 1

    def settings(self, stage: str, config: RunConfig, method: str = "") -> dict[str, Any]:
        from pipeline.maps.methods import METHODS

        values = chosen(config, self.stage_fields[stage])
        if stage == "cluster":
            budget = clustering_budget(config)
            values |= budget_settings(budget)
            if budget[0] == "ratio":
                compressed = sorted(name for name in config.run.methods if METHODS[name].reads_communities)
                values |= chosen(config, self.byte_budget_fields) | {
                    "run.methods": compressed,
                    "cluster.budget_precision": {name: planned_precision_of(config, name) for name in compressed},
                }
        if stage == "train":
            values = self._train_settings(config, method)
        if stage == "refit":
            values["train.refit"] = True  # As it is where the setting is left open.
        if stage in ("evaluate", "export"):
            # The evaluation rounds tables as the export stores them.
            values["export.precision"] = precision_of(config, method)
        return values

    def needs_clusters(self, config: RunConfig, method: str) -> bool:
        from pipeline.maps.methods import METHODS

        # A budget of rows leaves as many bytes as the clustering's rows take.
        by_rows = METHODS[method].sized and budget_of(config, self.default_budget)[0] != "ratio"
        return METHODS[method].reads_communities or by_rows

    def trained_as(self, method: str) -> str | None:
        from pipeline.maps.methods import METHODS

        return METHODS[method].trained_as

    def _train_settings(self, config: RunConfig, method: str) -> dict[str, Any]:
        """What is trained already depends on its own sizes alone."""
        from pipeline.maps.methods import METHODS

        values = chosen(config, self.stage_fields["train"])
        codes = {"map.codes_per_id": values.pop("map.codes_per_id")}
        if not (METHODS[method].embedding == "residual" and METHODS[method].sized):
            values = {key: value for key, value in values.items() if key not in RESIDUAL_FIELDS}
        if METHODS[method].trained_as is not None:
            values = {}
        if METHODS[method].stores_codes:
            values |= codes | chosen(config, ("map.seed", "train.dim"))
        if METHODS[method].sized:
            kind, value = budget_of(config, self.default_budget)
            values |= {"cluster.ratio": value} if kind == "ratio" else {}
            values["cluster.budget_precision"] = planned_precision_of(config, method)
        return values

    def log_files(self, config: RunConfig) -> list[Path]:
        from pipeline.logs.sources import find_sources

        return [Path(source.file) for source in find_sources(config.data.path, config.data.format, config.data.split)]

    def method_files(self, config: RunConfig, method: str) -> dict[str, Path]:
        from pipeline.logs.features import feature_files

        if method != "lsh":
            return {}
        users, items = feature_files(config.data)
        return {"the user features": users, "the item features": items}

    def updates(self, run: Path, method: str, train_key: str) -> str | None:
        from pipeline.retrieval.folded_in import folded_in_id

        return folded_in_id(run, method, train_key)

    def forecast(self, context: StageContext, stages: Sequence[str]) -> RunForecast:
        from pipeline.retrieval.forecast import forecast

        return forecast(context, stages)

    def ingest(self, context: StageContext, out: Path) -> dict[str, Any]:
        from pipeline.retrieval.ingest import ingest

        return dict(ingest(context.config.data, out))

    def cluster(self, context: StageContext, out: Path) -> dict[str, Any]:
        from pipeline.retrieval.cluster import cluster_run

        return dict(cluster_run(context.config, context.ingest_dir, out))

    def train(self, context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
        from pipeline.retrieval.train import train_method

        return train_method(context, method, out, session)

    def refit(self, context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
        from pipeline.retrieval.refit import refit_method

        return refit_method(context, method, out, session)

    def evaluate(self, context: StageContext, method: str) -> dict[str, Any]:
        from pipeline.retrieval.evaluate import evaluate_method

        return evaluate_method(context.config, method, context.ingest_dir, context.model_dir(method))

    def export(
        self, context: StageContext, method: str, out: Path, metrics: dict[str, Any], train_key: str
    ) -> dict[str, Any]:
        from graphhash.graph.vocabulary import Vocabulary
        from graphhash.models.mf import MatrixFactorization
        from pipeline.retrieval.export import ExportOptions, TrainedRetrieval, export_retrieval
        from pipeline.retrieval.folded_in import FoldedIn, folded_in_dir
        from pipeline.retrieval.weights import load_method, with_more_ids

        config, run, ingest_dir = context.config, context.run, context.ingest_dir
        ingested = json.loads((ingest_dir / "ingest.json").read_text(encoding="utf-8"))
        data = {key: ingested[key] for key in ("n_train", "n_validation", "n_test", "users_hash", "items_hash")}
        provenance = shared_provenance(config, metrics, data)
        model, user_map, item_map = load_method(context.model_dir(method), ingest_dir)
        users, items = (Vocabulary.load(ingest_dir / f"{side}.parquet") for side in ("users", "items"))
        if self.updates(run, method, train_key) is not None:
            folded_in = FoldedIn.load(folded_in_dir(run, method))
            assert isinstance(model, MatrixFactorization), "updates support matrix factorization alone"
            model = with_more_ids(model, folded_in.maps, folded_in.item_bias, folded_in.rows)
            user_map, item_map = (folded_in.maps[side] for side in ("users", "items"))
            users, items = (folded_in.vocabularies[side] for side in ("users", "items"))
            # Metrics are of the training alone.
            provenance |= {"updates": list(folded_in.updates)} if folded_in.updates else {}
        return export_retrieval(
            TrainedRetrieval(model, user_map, item_map, users, items),
            out,
            ExportOptions(metrics["precision"], config.export.runtime, config.export.external_data_mib),
            metrics=bundle_metrics(metrics),
            provenance=provenance,
        )

    def report(self, run: Path) -> list[Path]:
        from pipeline.retrieval.report import write_report

        return write_report(run)

    def defaults(self, config: RunConfig, method: str) -> dict[str, float]:
        from pipeline.maps.methods import METHODS
        from pipeline.retrieval.presets import default_settings

        return default_settings(config.train, METHODS[method])

    def example_call(self, manifest: Mapping[str, Any], ingest_dir: Path | None = None) -> ModelCall:
        from pipeline.retrieval.example import known_call, unknown_call

        return unknown_call(manifest) if ingest_dir is None else known_call(manifest, ingest_dir)
