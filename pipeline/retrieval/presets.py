"""How each retrieval model is trained with each loss, unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphhash.models.mf import INITIAL_STD
from pipeline.maps.methods import Method

if TYPE_CHECKING:
    from pipeline.config.run_config import TrainConfig

# Of a log that is smaller than the presets' steps ask for.
SMALLEST_BATCH, MOST_EPOCHS = 256, 100


@dataclass(frozen=True)
class TrainingPreset:
    """How a model is trained with a loss, unless told otherwise.

    Args:
        lr, l2_total: None: the method's own, which are those of matrix factorisation with BPR.
        epochs, batch_size, temperature, negatives, negative_weight, dropout: as in ``pipeline.config.run_config.TrainConfig``.
        std: standard deviation of the initial values.
        evaluations: of a training that is not stopped early.
        least_steps: fewest of an epoch, and of a whole training, of logs that are not tiny: a small log gets smaller batches, no more
            negatives than interactions in a batch, and more epochs. MovieLens-100K, softmax, full tables, validation capped recall@20:
            .307 with 20 epochs of 39 steps, .327 with 30 of 158 (512 interactions and negatives); BPR .330.
        of_dense: what is otherwise where ids have many neighbours (:attr:`pipeline.retrieval.budget.GraphSize.is_dense`).
    """

    lr: float | None = None
    epochs: int = 300
    batch_size: int | None = None
    l2_total: float | None = None
    std: float = INITIAL_STD
    temperature: float = 0.1
    negatives: int = 1024
    negative_weight: float = 1.0
    dropout: float = 0.0
    evaluations: int = 15
    least_steps: tuple[int, int] | None = None
    of_dense: Mapping[str, Any] = field(default_factory=dict)

    def fitted(self, n_interactions: int, *, is_dense: bool) -> TrainingPreset:
        """The preset for a log of so many training interactions, whose graph is dense or not."""
        preset = replace(self, **self.of_dense) if is_dense else self
        if preset.least_steps is None or preset.batch_size is None:
            return preset
        of_epoch, of_training = preset.least_steps
        batch_size = min(preset.batch_size, max(SMALLEST_BATCH, n_interactions // of_epoch))
        steps = math.ceil(n_interactions / batch_size)
        return replace(
            preset,
            batch_size=batch_size,
            negatives=min(preset.negatives, batch_size),
            epochs=min(max(preset.epochs, math.ceil(of_training / steps)), MOST_EPOCHS),
        )


# DirectAU's gamma where ids have SPARSE_NEIGHBOURS on average, and how it falls with more. Validation recall of full tables: Gowalla (21
# neighbours) with 0.5 .109, 1 .131, 2 .135; MovieLens-1M (164) with 0.2 .001, 0.3 .025, 0.4 .170, 0.5 .162, 1 .137. Below 0.4 all vectors
# fall into one.
SPARSE_NEIGHBOURS, GAMMA_THERE, GAMMA_POWER, LEAST_GAMMA = 20, 2.0, 0.75, 0.4


def default_gamma(n_neighbours: float) -> float:
    """DirectAU's gamma for ids with so many neighbours on average: dense graphs need less to keep vectors apart."""
    return max(LEAST_GAMMA, GAMMA_THERE * min(1.0, (SPARSE_NEIGHBOURS / max(n_neighbours, 1.0)) ** GAMMA_POWER))


_LEAST_STEPS = (158, 4700)
# Dense graphs want less sharp a loss: an id there has many items that are nearly as good as the positive. Validation capped recall of full
# tables after 12 or 15 epochs of batches of 1,024, by temperature and negative weight:
# MovieLens-1M BSL .1 and 1.0 .292, .1 and 1.1 .313, .1 and 1.16 .300, .15 and 1.16 .297, .2 and 1.1 .306; softmax .2 .302, .1 .292;
# MovieLens-100K BSL .1 and 1.1 .321, .1 and 1.16 .355, .15 and 1.1 .344, .15 and 1.16 .357, .2 and 1.05 .361, .2 and 1.1 .358, .3 and 1.1
# .356; softmax .2 .353, .3 .351, .1 .326. With the temperature and weight of sparse graphs BSL has .290 and .352.
_SOFTMAX = TrainingPreset(
    lr=5e-3, epochs=20, batch_size=2048, l2_total=0.0, std=0.1, evaluations=5, least_steps=_LEAST_STEPS, of_dense={"temperature": 0.2}
)  # fmt: skip
_BSL = TrainingPreset(
    lr=2e-3, epochs=40, batch_size=1024, l2_total=0.0, temperature=0.08, negatives=800, negative_weight=1.22, evaluations=5,
    least_steps=_LEAST_STEPS, of_dense={"temperature": 0.2, "negative_weight": 1.1, "epochs": 20},
)  # fmt: skip
_CCL = TrainingPreset(
    lr=2e-3, epochs=40, batch_size=1024, l2_total=0.0, negatives=800, negative_weight=150.0, dropout=0.1, evaluations=5,
    least_steps=_LEAST_STEPS,
)  # fmt: skip
# Propagation takes as long as some thousand interactions, so that its batches are larger.
_PROPAGATED = 16384

PRESETS: dict[tuple[str, str], TrainingPreset] = {
    ("mf", "bpr"): TrainingPreset(),
    # The loss looks at directions alone, and larger steps leave more of an id's popularity in the length of its vector. Validation recall
    # after 4 epochs of full tables: MovieLens-1M with 1e-3 .168, 5e-3 .194, 1e-2 .208, 3e-2 .220; Gowalla with 2e-3 .135, 1e-2 .131.
    ("mf", "directau"): TrainingPreset(lr=1e-2, epochs=8, batch_size=1024),
    ("mf", "ials"): TrainingPreset(),
    ("mf", "softmax"): _SOFTMAX,
    ("mf", "bsl"): _BSL,
    ("mf", "ccl"): _CCL,
    ("neumf", "bpr"): TrainingPreset(lr=5e-3, epochs=20, batch_size=8192),
    # Propagation averages gradients, too, and wants larger steps: on MovieLens-1M .249 at 5e-2, .153 at 1e-2.
    # It smooths by itself: with full tables validation recall is .279 for l2_total of 0.003 and .232 for 0.02.
    ("lightgcn", "bpr"): TrainingPreset(lr=1e-1, l2_total=3e-3),
    ("lightgcn", "directau"): TrainingPreset(lr=5e-3, epochs=20, batch_size=16384),
    ("lightgcn", "ials"): TrainingPreset(lr=1e-1),
    ("lightgcn", "softmax"): TrainingPreset(lr=5e-3, epochs=20, batch_size=_PROPAGATED, l2_total=0.0, std=0.1, evaluations=5),
    ("lightgcn", "bsl"): TrainingPreset(
        lr=5e-3, epochs=20, batch_size=_PROPAGATED, l2_total=0.0, temperature=0.08, negatives=800, negative_weight=1.22, evaluations=5
    ),
    ("lightgcn", "ccl"): TrainingPreset(
        lr=5e-3, epochs=20, batch_size=_PROPAGATED, l2_total=0.0, negatives=800, negative_weight=150.0, dropout=0.1, evaluations=5
    ),
}  # fmt: skip


def preset_of(train: TrainConfig) -> TrainingPreset:
    """The preset of the model with its loss."""
    return PRESETS[train.model, train.loss]


def default_settings(train: TrainConfig, method: Method) -> dict[str, float]:
    """What `train.lr` and `train.l2_total` are unless they are set."""
    preset = preset_of(train)
    return {
        "train.lr": method.lr if preset.lr is None else preset.lr,
        "train.l2_total": method.l2_total if preset.l2_total is None else preset.l2_total,
    }
