"""The sections of a configuration, by name, and the short ones of them: `map`, `evaluate`, `export`, `run`.

Each setting is a field with its type, its range, its default and its meaning. Types and ranges are checked by pydantic, contradictions
within a section by its ``_check``; both raise ConfigError.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config.choices import Precision, Runtime, SoftHops, Task
from pipeline.config.cluster import ClusterConfig
from pipeline.config.data import DataConfig
from pipeline.config.train import TrainConfig
from pipeline.config.validation import STRICT, Seed, one_line_errors
from pipeline.errors import ConfigError

# What a task has instead of the defaults of the sections.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {"ctr": {"train.model": "dlrm"}}
# The ranking of a test keeps so many items of every user at most.
MOST_SLOTS = 1000


def _as_texts(values: Any) -> Any:
    """Whole numbers, alone or in a list, as the texts that a list of settings holds."""
    if isinstance(values, int) and not isinstance(values, bool):
        return (str(values),)
    if isinstance(values, tuple):
        return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values)
    return values


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
    """Codes of one byte per id of `additive` and `full_additive`, and of `full_pq` and `full_opq`, where it divides the dim; None: as many
    as the budget affords."""
    own_dim: Annotated[int | None, Field(ge=1, le=4096)] = None
    """Numbers of an id's own of `residual`; None: 16, or fewer where the budget in bytes is small."""
    own_bits: Annotated[int | None, Field(ge=4, le=8, multiple_of=4)] = None
    """Bits of each, 8 or 4, beside tables stored in int8 or int4; None: 8, or 4 where the budget in bytes is small."""
    residual_dim: Annotated[int | None, Field(ge=1, le=65536)] = None
    """Length of the vectors of `residual`; None: `train.dim`, or twice that where the budget in bytes affords it."""
    item_bias: bool | None = None
    """One trained scalar per item; None: for `soft` and its kin with losses of inner products, and for all methods with `softmax` and `bsl`
    where ids have fewer than 50 neighbours on average."""
    seed: Seed = 0
    """Seed of the hash functions."""


@one_line_errors("evaluate")
@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """The test (stage `evaluate`)."""

    k: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = ("20",)
    """Cut-offs of recall, NDCG and the other measures of a ranking. The first is that of tables, pictures and figures of parts of the ids.
    Validation has the cut-off 20, whatever is given here."""
    users: Annotated[int | None, Field(ge=0)] = None
    """Most users that are ranked, drawn from those with something held out; 0: all of them. None: as many as have 10^11 scores together,
    and at least 10,000: all users of a log such as MovieLens-20M. Metrics have the number as `n_test_users`."""

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
