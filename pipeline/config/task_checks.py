"""What a task refuses of the settings that the other task has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config.choices import AUTO_LOSS, CTR_FORMATS, CTR_MODELS, MODELS
from pipeline.config.cluster import BUDGET_KEYS
from pipeline.config.sections import EvaluateConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig


def check_task(config: RunConfig) -> None:
    """Raise ConfigError for the first setting that `run.task` does not support."""
    models = CTR_MODELS if config.run.task == "ctr" else MODELS
    if config.train.model not in models:
        raise ConfigError(
            f"train.model={config.train.model} is not of run.task={config.run.task}; use {', '.join(models)}, or another task"
        )
    if config.run.task == "ctr":
        _check_ctr(config)
    else:
        _check_retrieval(config)


def _check_retrieval(config: RunConfig) -> None:
    data = config.data
    if data.format in CTR_FORMATS or data.schema or data.label_column:
        what = f"format={data.format}" if data.format in CTR_FORMATS else "schema and data.label_column"
        raise ConfigError(f"data.{what} is of a CTR data set; add run.task=ctr (--task ctr), or leave it out")
    if config.map.item_bias and config.train.loss in ("directau", "ccl"):
        raise ConfigError(
            f"map.item_bias=true is not supported with train.loss={config.train.loss}, which compares vectors; leave it out"
        )


def _check_ctr(config: RunConfig) -> None:
    refused = {
        "data.weight_column": config.data.weight_column,
        "data.positive_from": config.data.positive_from,
        "data.half_life": config.data.half_life,
        "data.min_user_interactions": _unless(1, config.data.min_user_interactions),
        "data.min_item_interactions": _unless(1, config.data.min_item_interactions),
        "data.user_features": config.data.user_features,
        "cluster.user_rows": config.cluster.user_rows,
    }
    for key, value in refused.items():
        if value is not None:
            raise ConfigError(f"{key}={value} is not supported with run.task=ctr; leave it out")
    if config.data.split == "leave-last-out":
        raise ConfigError(
            "data.split=leave-last-out is not supported with run.task=ctr: a user's last sample has one label, so nothing is ranked within "
            "users, and later samples of other users would be trained on; use temporal"
        )
    if config.train.loss not in ("bpr", AUTO_LOSS):
        raise ConfigError(
            f"train.loss={config.train.loss} is not supported with run.task=ctr, whose loss is binary cross-entropy; leave it out"
        )
    if config.data.bad_rows != "error":
        raise ConfigError(
            f"data.bad_rows={config.data.bad_rows} is not supported with run.task=ctr, which stops at a bad row; leave it out"
        )
    if config.evaluate != EvaluateConfig():
        raise ConfigError(
            f"{_evaluate_settings(config)} is for rankings and not supported with run.task=ctr; leave it out"
        )
    if config.cluster.shards or config.cluster.levels:
        raise ConfigError("cluster.shards and cluster.levels are not supported with run.task=ctr; leave them out")
    if config.cluster.method == "balanced" and all(getattr(config.cluster, key) is None for key in BUDGET_KEYS):
        raise ConfigError("cluster.method=balanced stops at a budget; give rows or ratio")


def _unless(default: Any, value: Any) -> Any:
    """A value, and None for its default."""
    return None if value == default else value


def _evaluate_settings(config: RunConfig) -> str:
    """The settings of section `evaluate` that are no defaults, as a command names them."""
    k, users = config.evaluate.k, config.evaluate.users
    named = [("k", ",".join(k), k != EvaluateConfig().k), ("users", users, users is not None)]
    return " and ".join(f"evaluate.{name}={value}" for name, value, is_set in named if is_set)
