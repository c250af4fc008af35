"""Model and training settings of a CTR run: those of the configuration, and the model's preset for what it leaves open."""

from __future__ import annotations

from typing import Any

from graphhash.models.ctr import CtrSpec
from pipeline.config.run_config import RunConfig
from pipeline.ctr.models import CTR_PRESETS, MOST_TABLE_DECAY
from pipeline.training.loop import FitSettings
from pipeline.training.resolved import patience

# Presets were made on 200,000 rows; ten thousand would see forty steps of their batches in a training.
LEAST_STEPS, SMALLEST_BATCH = 64, 64


def spec_of(config: RunConfig, method: str) -> CtrSpec:
    """The model of a method, before it is made."""
    train = config.train
    requested = {
        "id_bias": config.map.item_bias,
        "hidden": None if train.hidden is None else tuple(map(int, train.hidden)),
        "dropout": train.dropout,
        "n_cross": train.n_cross,
        "cross_rank": train.cross_rank,
        "structure": train.structure,
    }
    overrides: dict[str, Any] = {key: value for key, value in requested.items() if value is not None}
    if train.cross_rank == 0:
        overrides["cross_rank"] = None
    return CTR_PRESETS[train.model].spec(train.model, method, train.seed, dim=train.dim, **overrides)


def ctr_settings(config: RunConfig, n_rows: int, *, id_scalars: bool = False) -> FitSettings:
    """The settings of a training, every default decided.

    Args:
        n_rows: of the training log: a small one gets smaller batches than the preset's, so that an epoch has LEAST_STEPS steps.
        id_scalars: whether the model has a trained scalar per id of a compressed column; it decides the most weight decay of a small log.
    """
    train, preset = config.train, CTR_PRESETS[config.train.model]
    most_decay = preset.most_decay_with_scalars if id_scalars else preset.most_decay
    decay = min(preset.l2_total / n_rows, most_decay) if train.l2_total is None else train.l2_total / n_rows
    batch_size = (
        min(preset.batch_size, max(SMALLEST_BATCH, n_rows // LEAST_STEPS))
        if train.batch_size is None
        else train.batch_size
    )
    epochs = preset.epochs if train.epochs is None else train.epochs
    eval_every = 1 if train.eval_every is None else train.eval_every
    return FitSettings(
        lr=preset.lr if train.lr is None else train.lr,
        weight_decay=decay if train.weight_decay is None else train.weight_decay,
        epochs=epochs,
        eval_every=eval_every,
        patience=patience(epochs, eval_every) if train.patience is None else train.patience,
        schedule=train.schedule,
        batch_size=batch_size or None,
        seed=train.seed,
        table_decay=_table_decay(config, n_rows),
    )


def _table_decay(config: RunConfig, n_rows: int) -> float | None:
    """Weight decay of the vectors alone; a decay that is given is that of all parameters."""
    train, total = config.train, CTR_PRESETS[config.train.model].table_l2_total
    if total is None or train.weight_decay is not None or train.l2_total is not None:
        return None
    return min(total / n_rows, MOST_TABLE_DECAY)
