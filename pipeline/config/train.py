"""Settings of the model and its training (section `train`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config.choices import AUTO_LOSS, SHARED_LOSSES, LossChoice, Model, Sampler, Schedule, Score
from pipeline.config.validation import STRICT, Seed, one_line_errors
from pipeline.errors import ConfigError


@one_line_errors("train")
@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """The model and its training (stage `train`), and how many users a validation looks at.

    What is None is the default of the method, or of the model with its loss (`pipeline.retrieval.presets`, `pipeline.ctr.models`).
    """

    model: Model = "mf"
    """`mf` is matrix factorisation, `neumf` adds a small network, `lightgcn` propagates vectors over the training graph; with
    `task = "ctr"`: `widedeep`, `deepfm`, `dcnv2`, `finalnet` or `dlrm`, which is the default there."""
    loss: LossChoice = "bpr"
    """`bpr` ranks against one sampled item; `softmax`, `bsl` and `ccl` compare cosines with those of many sampled items; `directau` aligns
    and spreads vectors; `ials` fits all pairs, weighted. `auto`, the default of commands: for `mf` on a log of 500,000 training
    interactions and more `bsl` where ids have 50 neighbours or more on average, else `softmax`; `bpr` otherwise."""
    dim: Annotated[int, Field(ge=1, le=65536)] = 64
    """Length of an embedding."""
    lr: Annotated[float | None, Field(gt=0)] = None
    """Learning rate of Adam at the start."""
    l2_total: Annotated[float | None, Field(ge=0.0)] = None
    """L2 regularisation independent of size: weight decay times the rows of all tables, so that the same number regularises a small table
    as much as a large one, whose rows are each read by fewer interactions. With `task = "ctr"`: times the rows of the training log."""
    weight_decay: Annotated[float | None, Field(ge=0.0)] = None
    """Weight decay of Adam, given as it is instead of by `l2_total`."""
    schedule: Schedule = "cosine"
    """The learning rate over the epochs: `cosine` falls to 0 along half a cosine, `constant` stays."""
    epochs: Annotated[int | None, Field(ge=1)] = None
    """Most epochs. With `schedule = "cosine"` fewer epochs are a faster training and not a part of a longer one."""
    patience: Annotated[int | None, Field(ge=1)] = None
    """Evaluations (not epochs) without a better validation score before training stops; None: a third of the epochs, at least 5."""
    eval_every: Annotated[int | None, Field(ge=1)] = None
    """Epochs between two evaluations; None: as many evaluations as take a tenth of the time, counted in operations, and no fewer than the
    preset's (`pipeline.retrieval.presets`); with `task = "ctr"`: 1."""
    refit: bool | None = None
    """Once the best epoch is known, train anew on train and validation together for as many epochs, and test and export that model; None:
    yes, but not in `compare` and `tune`. Without validation there is none."""
    batch_size: Annotated[int | None, Field(ge=0)] = None
    """Examples per step; 0: one step over all of them."""
    n_layers: Annotated[int, Field(ge=0, le=16)] = 2
    """Propagation layers of `model = "lightgcn"`."""
    hidden: tuple[str, ...] | None = None
    """With `task = "ctr"`: units of the hidden layers."""
    dropout: Annotated[float | None, Field(ge=0.0, lt=1.0)] = None
    """Share of the numbers of user vectors that `loss = "softmax"`, `"bsl"` or `"ccl"` sets to 0 at random; with `task = "ctr"`: of units
    behind hidden layers."""
    n_cross: Annotated[int | None, Field(ge=0, le=16)] = None
    """Cross layers of `model = "dcnv2"`."""
    cross_rank: Annotated[int | None, Field(ge=0, le=65536)] = None
    """Rank of the matrices of the cross layers of `model = "dcnv2"`; 0: square matrices."""
    structure: Literal["stacked", "parallel"] | None = None
    """Of `model = "dcnv2"`: the network behind the cross layers (`stacked`), or beside them (`parallel`)."""
    gamma: Annotated[float | None, Field(ge=0.0)] = None
    """Weight of the uniformity in `loss = "directau"`; None: less, the more neighbours ids have."""
    unobserved_weight: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of a pair's squared score in `loss = "ials"`; an interaction weighs 1."""
    temperature: Annotated[float | None, Field(gt=0.0)] = None
    """By which `loss = "softmax"` or `"bsl"` divides scores."""
    negatives: Annotated[int | None, Field(ge=1)] = None
    """Negatives that a batch shares with `loss = "softmax"`, `"bsl"` or `"ccl"`."""
    negative_weight: Annotated[float | None, Field(ge=0.0)] = None
    """Weight of the negatives' term with `loss = "bsl"` or `"ccl"`."""
    margin: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.9
    """With `loss = "ccl"`: cosine above which a negative counts."""
    mask_same_row: bool = False
    """With `loss = "softmax"`, `"bsl"` or `"ccl"`: leave out negatives whose first table row is that of the interaction's item."""
    cosine: bool | None = None
    """Score by cosines instead of inner products; None: with `loss = "softmax"`, `"bsl"` or `"ccl"`."""
    initial_std: Annotated[float | None, Field(gt=0.0)] = None
    """Standard deviation of the tables' initial values."""
    sampler: Sampler = "uniform"
    """Negatives: `uniform` over all items, `uniform_rejecting` without the user's own items (`bpr` alone), `popularity` by degree,
    `in_batch` the items of the batch (`softmax`, `bsl`, `ccl`). The last two are corrected for what they draw more often, but for `bpr`."""
    popularity_power: float = 0.75
    """With `sampler = "popularity"`, an item is drawn in proportion to its degree to this power."""
    score: Score = "auc"
    """With `task = "ctr"`: the validation measure of early stopping and of the best epoch."""
    calibrate: bool = True
    """With `task = "ctr"`: fit slope and offset of the trained model's logits to the validation rows. AUC stays as it is."""
    seed: Seed = 0
    """Seed of the initial weights, the batches and the negatives."""
    eval_users: Annotated[int, Field(ge=0)] = 10_000
    """Users sampled for a validation; 0: all of them. `evaluate.users` is that of the test."""
    workers: Annotated[int | None, Field(ge=1, le=4096)] = None
    """Processes that train together, each with a GPU, or with its share of the CPUs; None: one per GPU, or one. A finished training
    is not repeated for another number. Trainings of `compare` and `tune` have one process each."""
    checkpoint_seconds: Annotated[float, Field(ge=0.0)] = 300.0
    """Seconds between checkpoints, besides the one at every evaluation; 0: only those."""
    amp: Literal["bf16", "tf32"] | None = None
    """Reduced precision of matrix products, on a GPU."""
    compile: bool = False
    """Compile the loss with `torch.compile`, on a GPU."""
    sparse_gradients: bool = False
    """Several workers on CPUs exchange only the gradients of the rows read, where these are few."""
    propagation: Literal["auto", "replicated", "sharded"] = "auto"
    """Several workers of `model = "lightgcn"`: `replicated`, each over the whole graph; `sharded`, each over its rows of it; `auto`:
    sharded from 16.8 million edges on."""

    @property
    def scores_cosines(self) -> bool:
        """Whether scores are cosines."""
        return self.loss in SHARED_LOSSES if self.cosine is None else self.cosine

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.cosine and self.model == "neumf":
            raise ConfigError(
                "train.cosine=true needs vectors to compare, and train.model=neumf has none; leave it out"
            )
        if self.cosine is False and self.loss == "ccl":
            raise ConfigError(
                "train.cosine=false is not supported with train.loss=ccl, a loss of cosines; leave it out"
            )
        self._check_negatives()
        if self.model == "neumf" and self.loss not in ("bpr", AUTO_LOSS):
            raise ConfigError(
                f"train.loss={self.loss} compares vectors, and train.model=neumf has none to compare; use train.loss=bpr"
            )
        if self.model == "neumf" and self.dim % 4:
            raise ConfigError(f"train.dim={self.dim} must be a multiple of 4 with train.model=neumf")
        if self.l2_total is not None and self.weight_decay is not None:
            raise ConfigError(
                f"train.l2_total={self.l2_total} and train.weight_decay={self.weight_decay} contradict each other; give one"
            )
        if self.loss == "directau" and self.batch_size in (0, 1):
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not supported with train.loss=directau, which compares all vectors of a "
                "batch; use some thousand"
            )
        if any(not units.isdecimal() or int(units) < 1 for units in self.hidden or ()):
            raise ConfigError(
                f"train.hidden={','.join(self.hidden or ())} must be whole numbers above 0, such as 256,128"
            )
        return self

    def _check_negatives(self) -> None:
        shared = self.loss in SHARED_LOSSES
        if self.sampler == ("uniform_rejecting" if shared else "in_batch"):
            raise ConfigError(
                f"train.sampler={self.sampler} is not supported with train.loss={self.loss}; use uniform or popularity"
            )
        if shared and self.batch_size == 0:
            raise ConfigError(
                f"train.batch_size=0 is not supported with train.loss={self.loss}, which holds scores of all negatives for the whole "
                "batch; use some thousand"
            )
