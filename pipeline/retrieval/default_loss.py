"""The loss of matrix factorization that `train.loss = "auto"` stands for, which follows from the size of the log."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.choices import AUTO_LOSS, Loss
from pipeline.config.run_config import RunConfig, TrainConfig
from pipeline.errors import ConfigError

# Training interactions from which on softmax is chosen. It is ahead in validation on Gowalla and MovieLens-1M (800,000) and takes many
# steps; BPR is ahead on MovieLens-100K (80,000) and on a third of Gowalla (286,000): docs/losses.md.
SOFTMAX_INTERACTIONS = 500_000


def with_loss_of_log(config: RunConfig, n_interactions: int) -> RunConfig:
    """The configuration with the loss that `auto` stands for; any other loss stays.

    `bpr` where the other settings do not allow `softmax`, such as `train.batch_size=0`.

    Args:
        n_interactions: for training.
    """
    train = config.train
    if train.loss != AUTO_LOSS:
        return config
    if train.model == "mf" and n_interactions >= SOFTMAX_INTERACTIONS and _allows(train, "softmax"):
        return _with(config, "softmax")
    return _with(config, "bpr" if _allows(train, "bpr") else "softmax")


def _allows(train: TrainConfig, loss: Loss) -> bool:
    try:
        replace(train, loss=loss)
    except ConfigError:
        return False
    return True


def _with(config: RunConfig, loss: Loss) -> RunConfig:
    return RunConfig.from_flat(config.flat() | {"train.loss": loss})
