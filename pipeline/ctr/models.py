"""The CTR models of a run by name, and the preset that each is trained with.

All defaults were chosen on validation rows, with the rows that ``graph`` has at resolution 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from graphhash.models.ctr import HEADS, CtrModel, CtrSpec
from graphhash.nn.embedding import BucketEmbedding
from pipeline.training.seldom import seldom_embeddings

CTR_MODELS = tuple(HEADS)

# Settings of the maps that have any, as :func:`graphhash.soft_maps` and :func:`graphhash.double_soft_maps` take them; they are cross-fitted
# (``pipeline.ctr.maps``). Frequencies are those of all training rows, of both labels. Validation log loss of DLRM with soft on Frappe:
# 8 indices .124, 16 .116, 24 .113, 32 .110; on MovieLens-1M 8 .526, 24 .518. An index is 2 bytes an id, a full row of 64 numbers 256.
# double_soft with 9 indices, by share: 0.25 .123, 0.5 .127, 0.75 .179.
MAP_SETTINGS: dict[str, dict[str, Any]] = {
    "soft": {"indices_per_id": 24, "hops": "1+2"},
    "double_soft": {"indices_per_id": 24, "hops": "1+2", "share": 0.25, "own": 0.5},
}

# Weight decay of the vectors alone that a small log gets at most.
MOST_TABLE_DECAY = 0.1


@dataclass(frozen=True)
class CtrPreset:
    """How a model is trained; with all methods alike, so that they can be compared.

    Args:
        lr: of Adam, falling to 0 along a half cosine over ``epochs``.
        l2_total: weight decay of Adam, on every parameter, times the rows of the training log: beside a mean over more rows, the same prior
            weighs less.
        most_decay, most_decay_with_scalars: weight decay that a small log gets at most, without and with a trained scalar per id of
            compressed columns (docs/experiments/ctr-small-logs.md).
        table_l2_total: the same of the columns' vectors alone, whose decay is MOST_TABLE_DECAY at most; None: that of all parameters.
        epochs, batch_size: as in ``pipeline.config.run_config.TrainConfig``.
        hidden, dropout, n_cross, cross_rank, structure, std: as in :class:`graphhash.models.ctr.CtrSpec`.
    """

    lr: float = 1e-2
    l2_total: float = 2.0
    most_decay: float = math.inf
    most_decay_with_scalars: float = math.inf
    table_l2_total: float | None = None
    epochs: int = 5
    batch_size: int = 1024
    hidden: tuple[int, ...] = (64, 32)
    dropout: float = 0.0
    n_cross: int = 2
    cross_rank: int | None = None
    structure: str = "parallel"
    std: float = 0.05

    def spec(self, kind: str, method: str, seed: int, **changes: Any) -> CtrSpec:
        """What the model is: ``kind`` with the preset's sizes, but for ``changes``, which are fields of CtrSpec.

        Ids of compressed columns get a trained scalar each: those that share rows are told apart by it.
        """
        sizes = {
            name: getattr(self, name) for name in ("hidden", "dropout", "n_cross", "cross_rank", "structure", "std")
        }
        return CtrSpec(kind, seed=seed, **({"id_bias": method != "full"} | sizes | changes))


# Validation log loss of Frappe, MovieLens-1M and the Avazu sample, by learning rate: DLRM with soft 3e-3 .124, .532, .401;
# 1e-2 .120, .532, .400; 4e-2 .115, .540, .402; with full tables .149, .514, .403; .128, .518, .403; .115, -, .417. DeepFM with soft
# 1e-2 .119, -, .422; 2e-2 .118, -, .479.
# Weight decay follows the rows of the log: for DLRM with soft 1e-4 .532 and 1e-5 .526 on MovieLens, where Frappe takes either; DeepFM
# with soft on Avazu .549 for 1e-6 and initial deviation 0.2, .422 for 2.5e-4 and 0.05.
# DLRM's logit is of products of vectors. Beyond 1e-4 full tables shrink to 0 on some small logs before their products tell anything, and
# stay there: the loss is flat around 0. Scalars per id keep a slope, and the linear terms of the other models do.
# FinalNet normalizes what its layers see, so a decay of the vectors changes their proportions alone: those of rare ids are short.
# Frappe_x1, full tables of 10 numbers, a decay of 0.1, 12 epochs with batches of 2,048: validation AUC .9846, log loss .139; without batch
# normalization .9411, .277.
CTR_PRESETS = dict.fromkeys(CTR_MODELS, CtrPreset()) | {
    "dlrm": CtrPreset(l2_total=10.0, most_decay=1e-4, most_decay_with_scalars=1e-3, epochs=6, batch_size=2048),
    "finalnet": CtrPreset(
        lr=1e-3, table_l2_total=2e4, epochs=20, batch_size=2048, hidden=(400, 400), dropout=0.1, std=1e-4
    ),
}


def seldom_read(model: CtrModel, batch_size: int, multi_valued_widths: tuple[int, ...] = ()) -> list[BucketEmbedding]:
    """Embeddings of which a training step reads few rows, for :class:`graphhash.nn.row_adam.RowAdam`; none off the CPU.

    Args:
        batch_size: rows of the log that a step takes.
        multi_valued_widths: values per row of the multi-valued columns.
    """
    reads = []
    for part in (model.fields, model.wide, model.bias):
        if part is None:
            continue
        widths = [1] * part.n_categorical + list(multi_valued_widths)[: len(part.columns) - part.n_categorical]
        reads += [(embedding, sum(widths[c] for c in columns) * batch_size) for embedding, columns in part.readers()]
    return seldom_embeddings(reads)
