"""The sections of a configuration: what each setting is, may be, and is by default.

Types and ranges are checked by pydantic, contradictions within a section by its ``_check``; both raise ConfigError.
"""

from __future__ import annotations

import codecs
import math
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config.choices import (
    SHARED_LOSSES,
    ClusterMethod,
    Format,
    IdKind,
    Loss,
    Model,
    Precision,
    Runtime,
    Sampler,
    Schedule,
    Score,
    SoftHops,
    Split,
    Task,
)
from pipeline.config.validation import STRICT, one_line_errors
from pipeline.errors import ConfigError

# What a task has instead of the defaults below.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {"ctr": {"train.model": "dlrm"}}
BUDGET_KEYS = ("resolution", "rows", "user_rows", "item_rows", "ratio")
# The ranking of a test keeps so many items of every user at most.
MOST_SLOTS = 1000

Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _as_texts(values: Any) -> Any:
    """Whole numbers, alone or in a list, as the texts that a list of settings holds."""
    if isinstance(values, int) and not isinstance(values, bool):
        return (str(values),)
    if isinstance(values, tuple):
        return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values)
    return values


@one_line_errors("data")
@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What to read and how to split it (stage `ingest`)."""

    path: str = ""
    """The log: a file, a folder or a glob. Empty only until the command line or a file gives it."""
    format: Format = "auto"
    """Format of the log; `auto` is inferred from file names and contents."""
    user_column: str = "user_id"
    """Column of user ids."""
    item_column: str = "item_id"
    """Column of item ids."""
    user_kind: IdKind = "auto"
    """Type of the user ids: `int64`, or `string`, which takes every id as it stands; `auto` is inferred from the first 1,000."""
    item_kind: IdKind = "auto"
    """Type of the item ids, likewise."""
    separator: str | None = None
    """csv: the character between two fields; None: recognised (comma, tab, semicolon or bar)."""
    encoding: str = "utf-8"
    """csv: the encoding of the text, such as `latin-1` or `utf-16`."""
    columns: tuple[str, ...] | None = None
    """csv without a header: the names of its columns, in order; None: the first line has the names."""
    weight_column: str | None = None
    """Column of interaction weights; None: every row of the log weighs 1, and duplicates add up."""
    rating_column: str | None = None
    """Column that `positive_from` looks at; None: the weight column, or else `rating`."""
    positive_from: float | None = None
    """Least rating of an interaction; rows below it are left out. None: every row is one."""
    min_user_interactions: Annotated[int, Field(ge=1)] = 1
    """Least number of items of a user. Together with `min_item_interactions` this is a core: users and items are removed until all that
    are left fulfil both, with duplicates counted once."""
    min_item_interactions: Annotated[int, Field(ge=1)] = 1
    """Least number of users of an item."""
    user_features: str | None = None
    """For the method `lsh`: a csv, tsv or parquet file of user ids, in a column named as the log's, and numeric features. Ids without a
    row get the average (`pipeline.logs.features`)."""
    item_features: str | None = None
    """For the method `lsh`: the same of items."""
    label_column: str | None = None
    """With `task = "ctr"`: column of the labels, 0 and 1; None: the one named label, click or clicked."""
    schema: str | None = None
    """With `task = "ctr"`: a TOML file of column roles (`pipeline.ctr.schema`); None: those of a named data set, or inferred."""
    min_count: Annotated[int, Field(ge=1)] = 1
    """With `task = "ctr"`: an id of fewer training rows is out of vocabulary."""
    bad_rows: Literal["error", "skip"] = "error"
    """`error` stops at the first bad row; `skip` keeps bad rows in `ingest/rejected.parquet` and goes on."""
    split: Split = "random"
    """`random` draws validation and test; `given` takes the data set's own test file, and draws validation from train; `temporal` takes the
    latest interactions of all for the test, those before them for validation; `leave-last-out` the latest of every user."""
    time_column: str | None = None
    """Column of times, for the splits by time and `half_life`; None: recognised by its name or type."""
    test_from: str | None = None
    """With `split = "temporal"`: the time, in ISO 8601, from which interactions are of the test; None: by the share `test`."""
    validation_from: str | None = None
    """With `split = "temporal"`: the time from which they are of validation; None: by the share `validation`."""
    last_n: Annotated[int, Field(ge=1)] = 1
    """With `split = "leave-last-out"`: so many items of every user are of the test, and as many before them of validation."""
    half_life: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Days after which an interaction weighs half as much, counted back from the latest of train; None: weights do not depend on age."""
    validation: Share = 0.1
    """Share of all interactions for validation."""
    test: Share = 0.1
    """Share of all interactions for the test; not used with `split = "given"`."""
    seed: Seed = 0
    """Seed of the split."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 8
    """CSR shards on disk. The communities do not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for key in ("user_column", "item_column"):
            if not getattr(self, key):
                raise ConfigError(f"data.{key} is empty; name the column that holds the ids")
        if self.user_column == self.item_column:
            raise ConfigError(f"data.user_column and data.item_column are both {self.user_column!r}; name two columns")
        _check_csv(self.separator, self.encoding, self.columns)
        self._check_times()
        if self.positive_from is not None and not math.isfinite(self.positive_from):
            raise ConfigError(f"data.positive_from={self.positive_from} is not finite; give a rating such as 4")
        if self.rating_column is not None and self.positive_from is None:
            raise ConfigError(
                f"data.rating_column={self.rating_column} is read with data.positive_from alone; give that (--positive-from 4), "
                "or name the column of weights with data.weight_column"
            )
        if self.split in ("random", "temporal") and self.validation + self.test >= 1.0:
            raise ConfigError(
                f"data.validation={self.validation} and data.test={self.test} leave nothing to train on; their sum must be below 1"
            )
        return self

    @property
    def by_time(self) -> bool:
        """Whether validation and test are chosen by time."""
        return self.split in ("temporal", "leave-last-out")

    @property
    def has_validation(self) -> bool:
        """Whether interactions are held out for validation."""
        return self.validation > 0 or self.validation_from is not None

    @property
    def reads_times(self) -> bool:
        """Whether the times of interactions are read."""
        return self.by_time or self.half_life is not None

    @property
    def bounds(self) -> dict[str, int]:
        """The dates from which parts begin, in microseconds since 1970 in UTC: those that are given of validation and test."""
        given = {"validation": self.validation_from, "test": self.test_from}
        return {part: _microseconds(f"{part}_from", text) for part, text in given.items() if text is not None}

    def _check_times(self) -> None:
        bounds = self.bounds
        if bounds and self.split != "temporal":
            part = next(iter(bounds))
            raise ConfigError(
                f"data.{part}_from={getattr(self, part + '_from')} needs data.split=temporal; set it, or leave it out"
            )
        if len(bounds) == 2 and bounds["validation"] > bounds["test"]:
            raise ConfigError(
                f"data.validation_from={self.validation_from} is after data.test_from={self.test_from}; validation comes before the test"
            )
        if self.last_n != 1 and self.split != "leave-last-out":
            raise ConfigError(f"data.last_n={self.last_n} needs data.split=leave-last-out; set it, or leave it out")
        if self.time_column is not None and not self.reads_times:
            raise ConfigError(
                f"data.time_column={self.time_column} is read with data.split=temporal or leave-last-out and with data.half_life alone; "
                "give one, or leave it out"
            )


def _microseconds(key: str, text: str) -> int:
    """A time of the settings since 1970 in UTC."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"data.{key}={text!r} is no time; write one such as 2024-05-01 or 2024-05-01T12:30:00"
        ) from None
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _check_csv(separator: str | None, encoding: str, columns: tuple[str, ...] | None) -> None:
    if separator is not None and (len(separator) != 1 or not separator.isascii() or separator in '"\r\n\0'):
        raise ConfigError(
            f"data.separator={separator!r} is not one ASCII character beside quotes and line ends; write one such as ';', or 'tab'"
        )
    try:
        is_text = codecs.lookup(encoding)._is_text_encoding
    except LookupError:
        is_text = False
    if not is_text:
        raise ConfigError(f"data.encoding={encoding!r} is unknown; name one such as utf-8, latin-1 or utf-16")
    if columns is not None and (not columns or len(set(columns)) < len(columns)):
        raise ConfigError(f"data.columns={','.join(columns)} must name every column of the file, each once")


@one_line_errors("cluster")
@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """How far to compress, and how to run the clustering (stage `cluster`)."""

    resolution: Annotated[float | None, Field(gt=0)] = None
    """Resolution of Barber's modularity: higher means more and smaller communities."""
    rows: Annotated[int | None, Field(ge=4)] = None
    """Budget: rows of the user table plus rows of the item table; hit exactly. Each table has one for ids and one out-of-vocabulary row at
    least, so the least value is 4."""
    user_rows: Annotated[int | None, Field(ge=2)] = None
    """Budget: rows of the user table, 2 or more; hit exactly. Given together with `item_rows`."""
    item_rows: Annotated[int | None, Field(ge=2)] = None
    """Budget: rows of the item table, 2 or more; hit exactly. Given together with `user_rows`."""
    ratio: Annotated[float | None, Field(gt=0, le=1)] = None
    """Budget: bytes of everything kept, over the bytes of the full float32 tables (0.25 is a quarter of the bytes)."""
    budget_precision: Precision | None = None
    """Precision in which `ratio` counts the rows of tables; None: that of the export. An export in another precision sets it to the one
    that the run was made with."""
    method: ClusterMethod = "louvain"
    """`leiden` refines: slower, modularity no lower, every community connected; `lpa` is half-sweeps alone: faster, lower modularity;
    `balanced` is a few sequential passes to a budget of rows, in this process (shards=0)."""
    levels: tuple[str, ...] = ()
    """Ascending resolutions of nested communities to write as parquet with raw ids (`cluster/levels_users.parquet`)."""
    max_size: Annotated[int | None, Field(ge=1)] = None
    """Most users, and most items, of a community; None: no bound."""
    shards: Annotated[int, Field(ge=0, le=4096)] = 0
    """0: threads of this process; N: Ray tasks over N shards. The communities are the same, bit for bit."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """Threads of the kernels; None: one per core. The communities are the same, bit for bit."""
    tolerance: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-3
    """Stop when a cycle raises the modularity by less than this share of itself."""
    max_cycles: Annotated[int, Field(ge=1)] = 20
    """Stop after so many cycles."""

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        self._check_budget()
        if self.method == "balanced" and self.shards:
            raise ConfigError(
                f"cluster.method=balanced is sequential and takes no cluster.shards={self.shards}; leave it out"
            )
        if self.method == "balanced" and self.resolution is not None:
            raise ConfigError(
                f"cluster.method=balanced stops at a budget; give rows or ratio instead of cluster.resolution={self.resolution}"
            )
        try:
            levels = [float(level) for level in self.levels]
        except ValueError:
            levels = [-1.0]
        if any(not (math.isfinite(level) and level > 0) for level in levels) or levels != sorted(set(levels)):
            raise ConfigError(
                f"cluster.levels={','.join(self.levels)} must be ascending resolutions above 0, such as 1,20,200"
            )
        if levels and self.method == "balanced":
            raise ConfigError("cluster.levels need a clustering by resolution; cluster.method=balanced has none")
        return self

    def _check_budget(self) -> None:
        given = [key for key in BUDGET_KEYS if getattr(self, key) is not None]
        if len(given) > 1 and given != ["user_rows", "item_rows"]:
            values = " and ".join(f"cluster.{key}={getattr(self, key)}" for key in given)
            raise ConfigError(f"{values} contradict each other; give one of resolution, rows and ratio")
        if given in (["user_rows"], ["item_rows"]):
            raise ConfigError(
                f"cluster.{given[0]} is given alone; give user_rows and item_rows, or rows for both together"
            )


@one_line_errors("map")
@dataclass(frozen=True, config=STRICT)
class MapConfig:
    """How communities become bucket maps (first part of stage `train`)."""

    indices_per_id: Annotated[int | None, Field(ge=1, le=256)] = None
    """Indices per id; None: the method's own default, or what a budget in bytes (`cluster.ratio`) can afford."""
    hops: Literal["auto", SoftHops] = "auto"
    """Steps of the graph that soft methods mix over: `1` (communities of the other side), `2` (of the own side), or `1+2` (both, in one
    table that users and items share); `auto` is `1+2`, and `2` where ids have many interactions and nearly a row each."""
    codes_per_id: Annotated[int | None, Field(ge=1, le=65536)] = None
    """Codes of one byte per id of `additive`, and of `full_pq` and `full_opq`, where it divides the dim; None: as many as the budget
    affords."""
    own_dim: Annotated[int | None, Field(ge=1, le=4096)] = None
    """Numbers of an id's own of `residual`; None: 16, or fewer where the budget in bytes is small."""
    own_bits: Annotated[int | None, Field(ge=4, le=8, multiple_of=4)] = None
    """Bits of each, 8 or 4, beside tables stored in int8 or int4; None: 8, or 4 where the budget in bytes is small."""
    residual_dim: Annotated[int | None, Field(ge=1, le=65536)] = None
    """Length of the vectors of `residual`; None: `train.dim`, or twice that where the budget in bytes affords it."""
    item_bias: bool | None = None
    """One trained scalar per item; None: on for `soft`, off for the others."""
    seed: Seed = 0
    """Seed of the hash functions."""


@one_line_errors("train")
@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """The model and its training (stage `train`), and how many users a validation looks at.

    What is None is the default of the method, or of the model with its loss (`pipeline.retrieval.presets`, `pipeline.ctr.models`).
    """

    model: Model = "mf"
    """`mf` is matrix factorisation, `neumf` adds a small network, `lightgcn` propagates vectors over the training graph; with
    `task = "ctr"`: `widedeep`, `deepfm`, `dcnv2` or `dlrm`, which is the default there."""
    loss: Loss = "bpr"
    """`bpr` ranks against one sampled item; `softmax`, `bsl` and `ccl` compare cosines with those of many sampled items; `directau` aligns
    and spreads vectors; `ials` fits all pairs, weighted."""
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
    seed: Seed = 0
    """Seed of the initial weights, the batches and the negatives."""
    eval_users: Annotated[int, Field(ge=0)] = 10_000
    """Users sampled for a validation; 0: all of them. The test always covers all."""
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
        if self.model == "neumf" and self.loss != "bpr":
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


@one_line_errors("evaluate")
@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """The test (stage `evaluate`)."""

    k: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = ("20",)
    """Cut-offs of recall, NDCG and the other measures of a ranking. The first is that of tables, pictures and figures of parts of the ids.
    Validation has the cut-off 20, whatever is given here."""

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """`k` as numbers."""
        return tuple(map(int, self.k))

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if not self.k or any(not k.isdecimal() or not 1 <= int(k) <= MOST_SLOTS for k in self.k):
            raise ConfigError(
                f"evaluate.k={','.join(self.k)} must be whole numbers from 1 to {MOST_SLOTS}, such as 10,20,50"
            )
        if len(set(self.cutoffs)) != len(self.k):
            raise ConfigError(f"evaluate.k={','.join(self.k)} names a cut-off twice")
        return self


@one_line_errors("export")
@dataclass(frozen=True, config=STRICT)
class ExportConfig:
    """The bundle (stage `export`)."""

    precision: Precision = "auto"
    """Type of the stored tables: float32, float16, or int8 or int4 with a float16 scale per row. `auto` is float32 for `full`, int4 for
    soft maps, which average the rounding of many rows away, and int8 for the others, for CTR models and for LightGCN."""
    runtime: Runtime = "auto"
    """What ONNX Runtime keeps in memory: `materialized` is a float32 vector per item, the fastest, whatever the file holds; `compressed`
    is the small table and map alone: twice as long for a request of one user, five times for 256. `auto` materializes unless that takes
    more than 4 GiB while loading."""
    external_data_mib: Annotated[int, Field(ge=0)] = 1024
    """Weights above this size go into a data file beside `model.onnx`."""


@one_line_errors("run")
@dataclass(frozen=True, config=STRICT)
class JobConfig:
    """What belongs to the run as a whole (section `run`)."""

    task: Task = "retrieval"
    """`retrieval` ranks items for users; `ctr` predicts the label of samples with any columns."""
    methods: tuple[str, ...] = ("soft",)
    """Methods to train, in this order; the bundle is of the first one."""
    out: str = ""
    """The run folder."""
    remote: str | None = None
    """URI at which the run folder is kept; `out` is then the folder where it is worked on."""
    address: str | None = None
    """Address of a Ray cluster; None: a local Ray that starts and stops with the command."""
    experiment: str = "graphhash"
    """Name of the MLflow experiment."""
    mlflow: bool = True
    """Track trainings in MLFLOW_TRACKING_URI, or in ./mlflow.db."""

    @model_validator(mode="after")
    def _check(self) -> JobConfig:
        if not self.methods:
            raise ConfigError("run.methods is empty; name one method or more, such as soft,graph")
        for method in self.methods:
            # A method's name becomes a folder.
            if not method.replace("_", "").isalnum():
                raise ConfigError(f"run.methods holds {method!r}, which is not a method; write them as soft,graph")
        if len(set(self.methods)) != len(self.methods):
            raise ConfigError(f"run.methods={','.join(self.methods)} names a method twice")
        if not self.experiment:
            raise ConfigError("run.experiment is empty; name the MLflow experiment")
        return self


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "cluster": ClusterConfig,
    "map": MapConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "run": JobConfig,
}
