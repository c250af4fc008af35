"""The click-through model of a run and how it is trained: settings, and what they leave to the model."""

from __future__ import annotations

from graphhash.ctr import CtrSpec
from pipeline.config import RunConfig
from pipeline.fit import FitSettings
from pipeline.methods import METHODS

LR, WEIGHT_DECAY, EPOCHS, BATCH_SIZE = 2e-3, 1e-5, 15, 1024


def spec_of(config: RunConfig, method: str) -> CtrSpec:
    """The model of a method, before it is made."""
    train = config.train
    return CtrSpec(
        train.model,
        train.dim,
        hidden=tuple(map(int, train.hidden)),
        n_cross=train.n_cross,
        structure=train.structure,
        dropout=train.dropout,
        id_bias=METHODS[method].item_bias if config.map.item_bias is None else config.map.item_bias,
        seed=train.seed,
    )


def ctr_settings(config: RunConfig, method: str) -> FitSettings:
    """The settings of a training, every default decided."""
    train = config.train
    epochs = EPOCHS if train.epochs is None else train.epochs
    batch_size = BATCH_SIZE if train.batch_size is None else train.batch_size
    return FitSettings(
        lr=LR if train.lr is None else train.lr,
        weight_decay=WEIGHT_DECAY if train.weight_decay is None else train.weight_decay,
        epochs=epochs,
        eval_every=1 if train.eval_every is None else train.eval_every,
        patience=train.patience,
        batch_size=batch_size or None,
        seed=train.seed,
    )
