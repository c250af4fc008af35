"""The loss of matrix factorization that `train.loss = "auto"` stands for, which follows from the size of the log and of its graph."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.choices import AUTO_LOSS, Loss
from pipeline.config.run_config import RunConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.retrieval.budget import GraphSize

# Training interactions from which on BPR is not chosen. Losses of cosines are ahead in validation on Gowalla and MovieLens-1M (800,000)
# and take many steps, for which a small log would wait: docs/losses.md.
LARGE_LOG = 500_000


def with_loss_of_log(config: RunConfig, size: GraphSize) -> RunConfig:
    """The configuration with the loss that `auto` stands for; any other loss stays.

    `bpr` where the other settings do not allow another, such as `train.batch_size=0`.

    Args:
        size: of the train graph.
    """
    train = config.train
    if train.loss != AUTO_LOSS:
        return config
    of_large: Loss = "bsl" if size.is_dense else "softmax"
    if train.model == "mf" and size.n_edges >= LARGE_LOG and _allows(train, of_large):
        return _with(config, of_large)
    return _with(config, "bpr" if _allows(train, "bpr") else of_large)


def _allows(train: TrainConfig, loss: Loss) -> bool:
    try:
        replace(train, loss=loss)
    except ConfigError:
        return False
    return True


def _with(config: RunConfig, loss: Loss) -> RunConfig:
    return RunConfig.from_flat(config.flat() | {"train.loss": loss})
