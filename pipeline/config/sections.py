"""The sections of a configuration, each a frozen dataclass that checks its values where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.config.checks import check_choice, check_range, check_types
from pipeline.errors import ConfigError

FORMATS = ("auto", "lightgcn", "movielens-100k", "movielens-1m", "csv", "tsv", "parquet", "libfm", "frappe", "avazu")
TASKS = ("retrieval", "ctr")
# What a task has instead of the defaults below.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {"ctr": {"train.model": "dlrm", "train.patience": 2}}
# Of task ctr alone.
CLICK_FORMATS = ("libfm", "frappe", "avazu")
CLICK_KEYS = ("label_column", "schema", "min_count")
DEFAULT_RATIO = 0.25
BUDGET_KEYS = ("resolution", "rows", "user_rows", "item_rows", "ratio")
# Those of graphhash.models.samplers, which imports torch.
SAMPLERS = ("uniform", "uniform_rejecting", "popularity")
# Those of pipeline.retrieval.models, which imports torch.
MODELS = ("mf", "neumf", "lightgcn")
# Those of graphhash.models.ctr, which imports torch.
CTR_MODELS = ("widedeep", "deepfm", "dcnv2", "dlrm")
STRUCTURES = ("stacked", "parallel")
SCORES = ("auc", "log_loss")
LOSSES = ("bpr", "directau", "ials")
RUNTIMES = ("auto", "folded", "compressed")
PRECISIONS = ("auto", "float32", "float16", "int8", "int4")
# Those of graphhash.maps.soft_maps, which imports scipy.
HOPS = ("1", "2", "1+2")
CLUSTER_METHODS = ("louvain", "leiden", "lpa", "balanced")


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to split it (stage `ingest`)."""

    path: str = ""
    """A file, a folder or a glob; empty only until the command line or a file gives it."""
    format: str = "auto"
    user_column: str = "user_id"
    item_column: str = "item_id"
    weight_column: str | None = None
    """Column of interaction weights; None: every row of the log weighs 1, and duplicates add up."""
    user_features: str | None = None
    item_features: str | None = None
    """For the method `lsh`: a csv, tsv or parquet file of ids, in a column named as the log's, and numbers; ids without a row get the
    average (`pipeline.logs.features`)."""
    label_column: str | None = None
    """With `task = "ctr"`: the column of clicks, 0 and 1; None: the one named label, click or clicked."""
    schema: str | None = None
    """With `task = "ctr"`: a TOML file that says what the columns are (`pipeline.ctr.schema`); None: known by name, or guessed."""
    min_count: int = 1
    """With `task = "ctr"`: an id of fewer training rows is unknown."""
    bad_rows: str = "error"
    """`error` stops at the first bad row; `skip` keeps bad rows in `ingest/rejected.parquet` and goes on."""
    split: str = "random"
    """`random` draws validation and test; `given` takes the data set's own test file, validation from train."""
    validation: float = 0.1
    test: float = 0.1
    """Shares of all interactions. With `split = "given"` the test share is not used."""
    seed: int = 0
    shards: int = 8
    """Hash partitions while reading and CSR shards on disk. The labels do not depend on it."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        check_choice("data.format", self.format, FORMATS)
        check_choice("data.bad_rows", self.bad_rows, ("error", "skip"))
        check_choice("data.split", self.split, ("random", "given"))
        for key in ("user_column", "item_column"):
            if not getattr(self, key):
                raise ConfigError(f"data.{key} is empty; name the column that holds the ids")
        if self.user_column == self.item_column:
            raise ConfigError(f"data.user_column and data.item_column are both {self.user_column!r}; name two columns")
        check_range("data.validation", self.validation, 0.0, 1.0, high_open=True)
        check_range("data.test", self.test, 0.0, 1.0, high_open=True)
        if self.split == "random" and self.validation + self.test >= 1.0:
            raise ConfigError(
                f"data.validation={self.validation} and data.test={self.test} leave nothing to train on; "
                "their sum must be below 1"
            )
        check_range("data.min_count", self.min_count, 1)
        check_range("data.seed", self.seed, 0)
        check_range("data.shards", self.shards, 1, 4096)


@dataclass(frozen=True)
class ClusterConfig:
    """How far to compress, and how to run the clustering (stage `cluster`)."""

    resolution: float | None = None
    """Resolution g of Barber's modularity: higher means more and smaller communities."""
    rows: int | None = None
    """Budget: rows of the user table plus rows of the item table; hit exactly."""
    user_rows: int | None = None
    item_rows: int | None = None
    """Budget: rows of each table; hit exactly. Both are given, or neither."""
    ratio: float | None = None
    """Budget: bytes of everything kept, over the bytes of the full float32 tables."""
    budget_precision: str | None = None
    """Precision in which a ratio counts the rows of tables; None: that of the export. An export in another precision sets it to the one
    that the run was made with."""
    method: str = "louvain"
    """`leiden` refines: slower, modularity no lower, every community connected; `lpa` is half-sweeps alone: faster, lower;
    `balanced` is few sequential passes to a budget of rows, in this process (shards=0)."""
    levels: tuple[str, ...] = ()
    """Resolutions, ascending, of nested levels to write as parquet with raw ids (`cluster/levels_users.parquet`); none: no levels."""
    max_size: int | None = None
    """Most users, and most items, of a community; None: no bound."""
    shards: int = 0
    """0: threads of this process; N: Ray tasks over N shards. The labels are the same, bit for bit."""
    threads: int | None = None
    """Threads of the kernels; None: one per core. The labels are the same, bit for bit."""
    tolerance: float = 1e-3
    """Stop when a cycle raises the modularity by less than this share of itself."""
    max_cycles: int = 20

    def __post_init__(self) -> None:
        check_types(self, "cluster")
        check_choice("cluster.method", self.method, CLUSTER_METHODS)
        if self.method == "balanced" and self.shards:
            raise ConfigError(
                f"cluster.method=balanced is sequential and takes no cluster.shards={self.shards}; leave it out"
            )
        if self.method == "balanced" and self.resolution is not None:
            raise ConfigError(
                f"cluster.method=balanced stops at a budget; give rows or ratio instead of cluster.resolution={self.resolution}"
            )
        given = [key for key in BUDGET_KEYS if getattr(self, key) is not None]
        if len(given) > 1 and given != ["user_rows", "item_rows"]:
            values = " and ".join(f"cluster.{key}={getattr(self, key)}" for key in given)
            raise ConfigError(f"{values} contradict each other; give one of resolution, rows and ratio")
        if given in (["user_rows"], ["item_rows"]):
            raise ConfigError(
                f"cluster.{given[0]} is given alone; give user_rows and item_rows, or rows for both together"
            )
        for key in ("user_rows", "item_rows"):
            if getattr(self, key) is not None:
                check_range(f"cluster.{key}", getattr(self, key), 2)
        if self.budget_precision is not None:
            check_choice("cluster.budget_precision", self.budget_precision, PRECISIONS)
        if self.max_size is not None:
            check_range("cluster.max_size", self.max_size, 1)
        try:
            levels = [float(level) for level in self.levels]
        except ValueError:
            levels = [-1.0]
        if any(not (math.isfinite(g) and g > 0) for g in levels) or levels != sorted(set(levels)):
            raise ConfigError(
                f"cluster.levels={','.join(self.levels)} must be ascending resolutions above 0, such as 1,20,200"
            )
        if levels and self.method == "balanced":
            raise ConfigError("cluster.levels need a clustering by resolution; cluster.method=balanced has none")
        if self.resolution is not None and not (math.isfinite(self.resolution) and self.resolution > 0):
            raise ConfigError(f"cluster.resolution={self.resolution} must be a finite number above 0")
        if self.rows is not None:
            check_range("cluster.rows", self.rows, 2)
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(
                f"cluster.ratio={self.ratio} must be above 0 and at most 1 (0.25 is a quarter of the bytes)"
            )
        check_range("cluster.shards", self.shards, 0, 4096)
        if self.threads is not None:
            check_range("cluster.threads", self.threads, 1)
        check_range("cluster.tolerance", self.tolerance, 0.0, 1.0)
        check_range("cluster.max_cycles", self.max_cycles, 1)

    @property
    def budget(self) -> tuple[str, Any]:
        """The one of `resolution`, `rows`, `side_rows` (both sides' numbers) and `ratio` that rules, with its value.

        Ratio 0.25 when none is set.
        """
        if self.user_rows is not None:
            return "side_rows", (self.user_rows, self.item_rows)
        for key in BUDGET_KEYS:
            if (value := getattr(self, key)) is not None:
                return key, value
        return "ratio", DEFAULT_RATIO


@dataclass(frozen=True)
class MapConfig:
    """How the labels become bucket maps (first part of stage `train`)."""

    indices_per_id: int | None = None
    """Rows read per id; None: the method's own default, or what a byte budget (cluster.ratio) can afford."""
    hops: str = "auto"
    """Steps of the graph that soft methods mix over: `1` (communities of the other side), `2` (of the own side), or `1+2` (both, in one
    table that users and items share); `auto` is `1+2`, and `2` where ids have many interactions and nearly a row each."""
    item_bias: bool | None = None
    """One trained scalar per item; None: on for `soft`, off for the others."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "map")
        if self.indices_per_id is not None:
            check_range("map.indices_per_id", self.indices_per_id, 1, 256)
        check_choice("map.hops", self.hops, ("auto", *HOPS))
        check_range("map.seed", self.seed, 0)


@dataclass(frozen=True)
class TrainConfig:
    """The model and its training (stage `train`), and how many users a validation looks at.

    What is None is the default of the method, or of the model with its loss (`pipeline.retrieval.models`).
    """

    model: str = "mf"
    """`mf` is matrix factorisation, `neumf` adds a small network, `lightgcn` propagates vectors over the training graph; with
    `task = "ctr"`: `widedeep`, `deepfm`, `dcnv2` or `dlrm`, which is the default there."""
    loss: str = "bpr"
    """`bpr` ranks against one drawn item, `directau` aligns and spreads vectors, `ials` fits all pairs, weighted."""
    dim: int = 64
    lr: float | None = None
    decay: float | None = None
    """Weight decay times the rows of all tables: the same number asks as much of a small table as of a large one, whose rows are each
    read by fewer interactions. With `task = "ctr"` times the rows of the training log: one prior for the parameters of small logs and large."""
    weight_decay: float | None = None
    """Given as it is, instead of by `decay`."""
    epochs: int | None = None
    """The learning rate falls to 0 over them, so a run of fewer epochs is a faster training and not a part of a longer one."""
    patience: int = 5
    """Evaluations, not epochs, without a better validation recall before training stops."""
    eval_every: int | None = None
    """Epochs between two evaluations; None: a fifteenth of them."""
    batch_size: int | None = None
    """Interactions per step; 0: one step over all of them."""
    n_layers: int = 2
    """Propagation layers of `model = "lightgcn"`."""
    hidden: tuple[str, ...] | None = None
    """With `task = "ctr"`: units of the hidden layers."""
    dropout: float | None = None
    """With `task = "ctr"`: rate behind hidden layers."""
    n_cross: int | None = None
    """Cross layers of `model = "dcnv2"`."""
    structure: str | None = None
    """Of `model = "dcnv2"`: the network behind the cross layers (`stacked`), or beside them."""
    gamma: float | None = None
    """Weight of the uniformity in `loss = "directau"`; by itself, less the more neighbours ids have."""
    unobserved_weight: float = 0.01
    """Weight of a pair's squared score in `loss = "ials"`; an interaction weighs 1."""
    sampler: str = "uniform"
    """Negatives of BPR: `uniform` over the catalogue, `uniform_rejecting` without what the user has, `popularity` by degree."""
    popularity_power: float = 0.75
    """With `sampler = "popularity"`, an item is drawn in proportion to its degree to this power."""
    score: str = "auc"
    """With `task = "ctr"`: the measure on validation that decides when training ends, and which epoch is kept: `auc` or `log_loss`."""
    seed: int = 0
    eval_users: int = 10_000
    """Users drawn for a validation; 0: all of them. The test always looks at all."""
    workers: int | None = None
    """Processes that train together, each with a GPU, or with its part of the CPUs; None: one per GPU, or one. A finished training
    is not done again for another number. The trainings of `compare` and `tune` have one process each."""
    checkpoint_seconds: float = 300.0
    """Seconds between checkpoints, beside the one at every evaluation; 0: those alone."""
    amp: str | None = None
    """`bf16` or `tf32` for matrix products, on a GPU."""
    compile: bool = False
    """Compile the loss with `torch.compile`, on a GPU."""
    sparse_gradients: bool = False
    """Several workers on CPUs pass on the gradients of the rows read alone, where these are few."""
    propagation: str = "auto"
    """Several workers of `model = "lightgcn"`: `replicated`, each over the whole graph; `sharded`, each over its rows of it; `auto`:
    sharded from 16.8 million edges on."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        check_choice("train.model", self.model, (*MODELS, *CTR_MODELS))
        check_choice("train.loss", self.loss, LOSSES)
        if self.model == "neumf" and self.loss != "bpr":
            raise ConfigError(
                f"train.loss={self.loss} compares vectors, and train.model=neumf has none to compare; use train.loss=bpr"
            )
        check_range("train.dim", self.dim, 1, 65536)
        if self.model == "neumf" and self.dim % 4:
            raise ConfigError(f"train.dim={self.dim} must be a multiple of 4 with train.model=neumf")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"train.lr={self.lr} must be a finite number above 0")
        for key in ("decay", "weight_decay"):
            if getattr(self, key) is not None:
                check_range(f"train.{key}", getattr(self, key), 0.0)
        if self.decay is not None and self.weight_decay is not None:
            raise ConfigError(
                f"train.decay={self.decay} and train.weight_decay={self.weight_decay} contradict each other; give one"
            )
        for key in ("epochs", "patience", "eval_every"):
            if getattr(self, key) is not None:
                check_range(f"train.{key}", getattr(self, key), 1)
        if self.batch_size is not None:
            check_range("train.batch_size", self.batch_size, 0)
        if self.loss == "directau" and self.batch_size in (0, 1):
            raise ConfigError(
                f"train.batch_size={self.batch_size} cannot be had with train.loss=directau, which compares all vectors of a "
                "batch; use some thousand"
            )
        check_range("train.n_layers", self.n_layers, 0, 16)
        if any(not units.isdecimal() or int(units) < 1 for units in self.hidden or ()):
            raise ConfigError(
                f"train.hidden={','.join(self.hidden or ())} must be whole numbers above 0, such as 256,128"
            )
        if self.dropout is not None:
            check_range("train.dropout", self.dropout, 0.0, 1.0, high_open=True)
        if self.n_cross is not None:
            check_range("train.n_cross", self.n_cross, 0, 16)
        check_choice("train.score", self.score, SCORES)
        if self.structure is not None:
            check_choice("train.structure", self.structure, STRUCTURES)
        if self.gamma is not None:
            check_range("train.gamma", self.gamma, 0.0)
        check_range("train.unobserved_weight", self.unobserved_weight, 0.0)
        check_choice("train.sampler", self.sampler, SAMPLERS)
        if not math.isfinite(self.popularity_power):
            raise ConfigError(f"train.popularity_power={self.popularity_power} must be a finite number")
        check_range("train.seed", self.seed, 0)
        check_range("train.eval_users", self.eval_users, 0)
        if self.workers is not None:
            check_range("train.workers", self.workers, 1, 4096)
        check_range("train.checkpoint_seconds", self.checkpoint_seconds, 0.0)
        if self.amp is not None:
            check_choice("train.amp", self.amp, ("bf16", "tf32"))
        check_choice("train.propagation", self.propagation, ("auto", "replicated", "sharded"))


@dataclass(frozen=True)
class ExportConfig:
    """The bundle (stage `export`)."""

    precision: str = "auto"
    """Type of the stored tables: float32, float16, or int8 or int4 with a float16 scale per row. `auto` is float32 for `full`, int4 for
    soft maps, which average the rounding of many rows away, and int8 for the others, for clicks and for what LightGCN propagates."""
    runtime: str = "auto"
    """What ONNX Runtime keeps in memory: `folded` is a float32 vector per item, the fastest, whatever the file holds; `compressed` is the
    small table and map alone: twice as long for a request of one user, five times for 256 (README). `auto` folds until that takes 4 GiB while loading."""
    external_data_mib: int = 1024
    """Weights above this size go into a data file beside `model.onnx`."""

    def __post_init__(self) -> None:
        check_types(self, "export")
        check_choice("export.precision", self.precision, PRECISIONS)
        check_choice("export.runtime", self.runtime, RUNTIMES)
        check_range("export.external_data_mib", self.external_data_mib, 0)


@dataclass(frozen=True)
class JobConfig:
    """What belongs to the run as a whole (section `run`)."""

    task: str = "retrieval"
    """`retrieval` ranks items for users; `ctr` predicts clicks from any columns."""
    methods: tuple[str, ...] = ("soft",)
    """Trained in this order; the bundle is of the first one."""
    out: str = ""
    remote: str | None = None
    """URI at which the run folder is kept; `out` is then the folder where it is worked on."""
    address: str | None = None
    """Address of a Ray cluster; None: a local Ray that starts and stops with the command."""
    experiment: str = "graphhash"
    mlflow: bool = True

    def __post_init__(self) -> None:
        check_types(self, "run")
        check_choice("run.task", self.task, TASKS)
        if not self.methods:
            raise ConfigError("run.methods is empty; name one method or more, such as soft,graph")
        for method in self.methods:
            # A method's name becomes a folder.
            if not method.replace("_", "").isalnum():
                raise ConfigError(f"run.methods holds {method!r}, which is no method's name; write them as soft,graph")
        if len(set(self.methods)) != len(self.methods):
            raise ConfigError(f"run.methods={','.join(self.methods)} names a method twice")
        if not self.experiment:
            raise ConfigError("run.experiment is empty; name the MLflow experiment")


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "cluster": ClusterConfig,
    "map": MapConfig,
    "train": TrainConfig,
    "export": ExportConfig,
    "run": JobConfig,
}
