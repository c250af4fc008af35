"""Sizes, seconds and memory of a retrieval run before it is computed, from some seconds of work on this machine.

Sizes come from the run folder where the log is ingested, and from a part of the log (`pipeline.retrieval.forecast_log`) where it
is not. Seconds come from that reading, from a clustering of some interactions, and from a short training and ranking by each method's
model (`pipeline.retrieval.forecast_training`), each scaled to the sizes of the run. Nothing is written.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.local import LocalGraph
from pipeline.config.choices import AUTO_METHODS
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS
from pipeline.retrieval.budget import BudgetSettings, GraphSize, check_sizes, planned_precisions, rows_for_ratio
from pipeline.retrieval.cluster import cluster_by_budget
from pipeline.retrieval.default_loss import with_loss_of_log
from pipeline.retrieval.default_method import with_method_of_budget
from pipeline.retrieval.defaults import clustering_budget, precision_of
from pipeline.retrieval.evaluate import BLOCK_SCORES, most_users
from pipeline.retrieval.forecast_log import GRAPH_EDGES, LogSample, sample_log
from pipeline.retrieval.forecast_training import MIB, PlannedTraining, Speed
from pipeline.retrieval.ingest import BLOCK_ROWS, MAX_THREADS
from pipeline.retrieval.objective import RetrievalSettings
from pipeline.task import StageContext
from pipeline.training.forecast import RunForecast, StageForecast, of_method
from pipeline.training.machine import n_cpus, threads
from pipeline.training.memory import peak_mib

READ_SECONDS = 0.5
# Bytes of a row in a task of the ingestion, at its peak, and of an id in the process that starts the tasks.
ROW_BYTES, ID_BYTES = 50, 24
# An interaction of a graph in memory: a column and a weight.
GRAPH_BYTES = 8
# What follows the reading of rows until the graphs are written takes as long as so many sorts of their pairs. Of 10 M rows 3.1 s of CPU
# time (docs/experiments/ingestion.md), and a sort 0.75 s.
SORTS = 4


@dataclass(frozen=True)
class Parts:
    """Interactions of each part of the log, and its ids."""

    n_users: int
    n_items: int
    n_train: int
    n_validation: int
    n_test: int

    @property
    def size(self) -> GraphSize:
        """That of the train graph."""
        return GraphSize(self.n_users, self.n_items, self.n_train)

    def users_of(self, n_interactions: int) -> int:
        """Most users who can have one of so many interactions."""
        return min(self.n_users, n_interactions)


def forecast(context: StageContext, stages: Sequence[str]) -> RunForecast:
    """Implements `pipeline.task.Task.forecast`.

    Raises:
        DataError: the log cannot be read, or the budget leaves no rows.
    """
    with threads(n_cpus()):
        return _Forecast(context, tuple(stages)).run()


class _Forecast:
    """One forecast, and what it has measured so far. Its stages tell the bytes that they hold beside Python and the packages."""

    def __init__(self, context: StageContext, stages: tuple[str, ...]) -> None:
        self.context, self.config, self.stages = context, context.config, stages
        self.sample = sample_log(self.config.data, READ_SECONDS) if "ingest" in stages else None
        if self.sample is None:
            facts = json.loads((context.ingest_dir / "ingest.json").read_text(encoding="utf-8"))
            self.parts = Parts(**{field.name: facts[field.name] for field in fields(Parts)})
        else:
            self.parts = split_parts(self.config, self.sample)
        if not self.parts.n_train:
            raise DataError("there are no training interactions; check the data and the split")
        self.config = with_loss_of_log(self.config, self.parts.size)
        self.config = with_method_of_budget(self.config, self.parts.size)
        check_sizes(self.config, self.parts.size)
        if context.config.run.methods == AUTO_METHODS:
            (method,) = self.config.run.methods
            self.stages = tuple(of_method(stages, method, METHODS[method].trained_as))
        self.context = replace(context, config=self.config)
        self._trainings: dict[str, tuple[PlannedTraining, RetrievalSettings, Speed]] = {}

    def run(self) -> RunForecast:
        """All stages in their order."""
        stages = {
            "ingest": self._ingest, "cluster": self._cluster, "train": self._train, "refit": self._refit,
            "evaluate": self._evaluate, "export": lambda name, method: StageForecast(name),
        }  # fmt: skip
        made = [stages[stage](name, method) for name in self.stages for stage, _, method in [name.partition(" ")]]
        # What Python, the packages and compiled loops hold once all of them are loaded.
        held = round(peak_mib(reset=True) * MIB)
        parts = self.parts
        sizes = {"rows": self.sample.n_rows} if self.sample else {}
        sizes |= {"users": parts.n_users, "items": parts.n_items, "train": parts.n_train}
        return RunForecast(
            sizes=sizes | {"validation": parts.n_validation, "test": parts.n_test},
            is_exact=self.sample is None or self.sample.is_exact,
            training_bytes={method: planned.parts for method, (planned, _, _) in self._trainings.items()},
            stages=tuple(stage.beside(held) for stage in made),
        )

    def _ingest(self, name: str, _: str) -> StageForecast:
        assert self.sample is not None
        n_threads, n_rows = min(n_cpus(), MAX_THREADS), self.sample.n_rows
        reading, sorting = self.sample.seconds
        seconds = (reading + SORTS * sorting) / min(n_threads, max(1, n_rows // BLOCK_ROWS))
        in_tasks = min(n_rows, n_threads * BLOCK_ROWS) * ROW_BYTES
        return StageForecast(name, (seconds, seconds), in_tasks + ID_BYTES * self.parts.size.n_ids)

    def _cluster(self, name: str, _: str) -> StageForecast:
        seconds, n_bytes, _rows = self._clustering
        return StageForecast(name, (seconds, seconds), n_bytes)

    def _train(self, name: str, method: str) -> StageForecast:
        if METHODS[method].trained_as is not None:
            return StageForecast(name)
        planned, settings, speed = self._training(method)
        per_epoch = speed.step * _n_steps(settings, planned.size.n_edges)
        n_users = _fewer(self.config.train.eval_users, self.parts.users_of(self.parts.n_validation))
        evaluation = speed.score * n_users * self.parts.n_items
        # Without a better score than the first one, a training ends after as many evaluations as it has patience.
        least = min(settings.epochs, settings.eval_every * (1 + settings.patience)) if n_users else settings.epochs
        low, high = (
            speed.maps + epochs * per_epoch + math.ceil(epochs / settings.eval_every) * evaluation
            for epochs in (least, settings.epochs)
        )
        return StageForecast(name, (low, high), speed.peak_bytes)

    def _refit(self, name: str, method: str) -> StageForecast:
        if METHODS[method].trained_as is not None:
            return StageForecast(name)
        planned, settings, speed = self._training(method)
        n_edges = self.parts.n_train + self.parts.n_validation
        per_epoch = speed.step * _n_steps(settings, n_edges)
        if settings.batch_size is None:
            per_epoch *= n_edges / planned.size.n_edges
        low, high = (
            speed.maps + epochs * per_epoch for epochs in (min(settings.eval_every, settings.epochs), settings.epochs)
        )
        return StageForecast(name, (low, high), speed.peak_bytes)

    def _evaluate(self, name: str, method: str) -> StageForecast:
        planned, _, speed = self._training(METHODS[method].trained_as or method)
        # The tables as they are stored, and as they were trained.
        passes = 1 if precision_of(self.config, method) == "float32" else 2
        n_users = _fewer(most_users(self.config, self.parts.n_items), self.parts.users_of(self.parts.n_test))
        seconds = passes * speed.score * n_users * self.parts.n_items
        kinds = planned.parts
        n_bytes = 2 * (kinds["tables"] + kinds["maps"]) + GRAPH_BYTES * (self.parts.n_train + self.parts.n_validation)
        return StageForecast(name, (seconds, seconds), n_bytes + 4 * BLOCK_SCORES * 2)

    def _training(self, method: str) -> tuple[PlannedTraining, RetrievalSettings, Speed]:
        """A method's training at the real sizes, measured once."""
        if method not in self._trainings:
            planned = PlannedTraining.of(self.config, method, self.parts.size, self._n_rows)
            self._trainings[method] = planned, planned.settings(self.parts.size), planned.measured(self.parts.size)
        return self._trainings[method]

    @cached_property
    def _n_rows(self) -> int:
        """Rows of the communities: of those that are there, by the budget, or as many for the ids as the sample's."""
        if "cluster" not in self.stages:
            facts = json.loads((self.context.cluster_dir / "cluster.json").read_text(encoding="utf-8"))
            return int(facts["user_rows"]) + int(facts["item_rows"])
        budget = self._budget(self.parts.size)
        if budget[0] == "resolution":
            return self._clustering[2]
        return int(budget[1]) - 2 if budget[0] == "rows" else sum(budget[1]) - 2

    def _budget(self, size: GraphSize) -> tuple[str, Any]:
        """The budget of the clustering; a ratio of the bytes as rows."""
        kind, value = clustering_budget(self.config)
        if kind != "ratio":
            return kind, value
        return "rows", rows_for_ratio(BudgetSettings.of(self.config), value, planned_precisions(self.config), size)

    @cached_property
    def _clustering(self) -> tuple[float, int, int]:
        """Seconds and bytes of the clustering, and rows of its communities: those of a part of the graph, as many times as it is larger."""
        graph = self._some_interactions()
        size, part = self.parts.size, GraphSize.of(graph)
        kind, value = self._budget(size)
        share = part.n_ids / size.n_ids
        if kind == "rows":
            value = max(6, min(part.n_ids, round(value * share)))
        elif kind == "side_rows":
            value = tuple(max(3, min(n, round(rows * share))) for n, rows in zip(graph.shape, value, strict=True))
        few = graph[: min(len(graph.indptr) - 1, 50)]
        cluster_by_budget(self.config, LocalGraph(few), few, ("resolution", 1.0))  # Loads the compiled loops.
        before = peak_mib(reset=True)
        started = time.perf_counter()
        labels = cluster_by_budget(self.config, LocalGraph(graph), graph, (kind, value))
        times = max(1.0, size.n_edges / part.n_edges)
        seconds, n_bytes = (time.perf_counter() - started) * times, (peak_mib() - before) * MIB * times
        return seconds, round(n_bytes), min(size.n_ids, round(labels.rows / share))

    def _some_interactions(self) -> csr_array:
        """The first users of the train graph, or of the log."""
        if self.sample is not None:
            return self.sample.graph
        stored = ShardedCsr.open(self.context.ingest_dir / "train")
        n_users = max(1, stored.n_rows * GRAPH_EDGES // stored.n_edges)
        indptr, indices, _ = stored.read(0, min(stored.n_rows, n_users))
        items, columns = np.unique(indices, return_inverse=True)
        return csr_array((np.ones(len(columns), np.float32), columns, indptr), shape=(len(indptr) - 1, len(items)))


def split_parts(config: RunConfig, sample: LogSample) -> Parts:
    """About how many interactions each part of the log gets; those of a split at a point in time are all counted as train."""
    data, n = config.data, sample.n_interactions
    n_validation, n_test = round(data.validation * n), round(data.test * n)
    if data.split == "given":
        n_test = 0
    elif data.split == "leave-last-out":
        n_test = data.last_n * sample.n_users
        n_validation = n_test if data.has_validation else 0
    if data.test_from is not None or data.validation_from is not None:
        n_validation = n_test = 0
    n_test = min(n_test, n - 1)
    n_validation = min(n_validation, n - 1 - n_test)
    train = n - n_validation - n_test
    return Parts(sample.n_users, sample.n_items, train, n_validation, n_test or sample.n_test_rows)


def _n_steps(settings: RetrievalSettings, n_edges: int) -> int:
    """Of an epoch."""
    return math.ceil(n_edges / settings.batch_size) if settings.batch_size else 1


def _fewer(most: int, n: int) -> int:
    """At most so many, where that is not 0."""
    return min(most, n) if most else n
