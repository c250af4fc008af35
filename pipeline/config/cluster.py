"""Settings of the clustering: the budget, and how communities are found (section `cluster`)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config.choices import ClusterMethod, Precision
from pipeline.config.validation import STRICT, one_line_errors
from pipeline.errors import ConfigError

BUDGET_KEYS = ("resolution", "rows", "user_rows", "item_rows", "ratio")


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
