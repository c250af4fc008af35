"""Sizes, seconds and memory of a CTR run before it is computed, from some seconds of work on this machine.

The first rows of the log are ingested, clustered and trained on for a moment by the functions of the stages, in a temporary folder
(`pipeline.ctr.forecast_sample`, `pipeline.ctr.forecast_training`). What they took is scaled to the sizes of the run, and bytes are
scaled with the ids of every column. Sizes come from the run folder where the log is ingested.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.connected import cluster_connected
from pipeline.config.choices import AUTO_METHODS
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import rows_of_columns
from pipeline.ctr.cluster import LEAST_ROWS, cluster_ctr
from pipeline.ctr.data import Features
from pipeline.ctr.default_method import with_method_of_budget
from pipeline.ctr.defaults import DEFAULT_BUDGET, clustering_budget, precision_of
from pipeline.ctr.forecast_sample import CtrSample, sample_ctr
from pipeline.ctr.forecast_training import MIB, Growth, MeasuredTraining, measure_training
from pipeline.ctr.maps import find_pairs
from pipeline.maps.methods import METHODS
from pipeline.task import StageContext, budget_of
from pipeline.training.forecast import RunForecast, StageForecast, of_method
from pipeline.training.machine import n_cpus, threads
from pipeline.training.memory import peak_mib


def forecast(context: StageContext, stages: Sequence[str]) -> RunForecast:
    """Implements `pipeline.task.Task.forecast`. Works in a temporary folder that is removed.

    Raises:
        DataError: the log cannot be read, its first rows make no run by themselves, or the budget is too small.
    """
    with threads(n_cpus()), tempfile.TemporaryDirectory(prefix="graphhash-") as folder:
        return _Forecast(context, tuple(stages), Path(folder)).run()


class _Forecast:
    """One forecast, and what it has measured so far. Its stages tell the bytes that they hold beside Python and the packages."""

    def __init__(self, context: StageContext, stages: tuple[str, ...], folder: Path) -> None:
        self.config, self.stages, self.folder = context.config, stages, folder
        ingested = None if "ingest" in stages else context.ingest_dir
        for name in ("ingest", "cluster", "methods"):
            (folder / name).mkdir()
        self.sample: CtrSample = sample_ctr(self.config.data, ingested, folder / "ingest")
        if self.config.run.methods == AUTO_METHODS:
            self.config = with_method_of_budget(self.config, sum(self.sample.n_ids))
            (method,) = self.config.run.methods
            self.stages = tuple(of_method(stages, method, METHODS[method].trained_as))
        self.context = StageContext(_of_part(self.config, self.sample), folder)
        self._trainings: dict[str, MeasuredTraining] = {}

    def run(self) -> RunForecast:
        """All stages in their order."""
        stages = {
            "ingest": self._ingest, "cluster": self._cluster, "train": self._train, "refit": self._refit,
            "evaluate": self._evaluate, "export": lambda name, method: StageForecast(name),
        }  # fmt: skip
        made = [stages[stage](name, method) for name in self.stages for stage, _, method in [name.partition(" ")]]
        # What Python, the packages and compiled loops hold once all of them are loaded.
        held = round(peak_mib(reset=True) * MIB)
        sample, n_rows = self.sample, self.sample.n_rows
        sizes = {"rows": sum(n_rows.values()), "ids": sum(sample.n_ids)} | n_rows
        return RunForecast(
            sizes=sizes,
            is_exact=sample.is_exact or "ingest" not in self.stages,
            training_bytes={method: measured.parts for method, measured in self._trainings.items()},
            stages=tuple(stage.beside(held) for stage in made),
        )

    def _ingest(self, name: str, _: str) -> StageForecast:
        return StageForecast(name, (self.sample.seconds,) * 2, self.sample.peak_bytes)

    def _cluster(self, name: str, _: str) -> StageForecast:
        seconds, n_bytes = self._clustering
        return StageForecast(name, (seconds,) * 2, n_bytes)

    def _train(self, name: str, method: str) -> StageForecast:
        if METHODS[method].trained_as is not None:
            return StageForecast(name)
        measured, n_rows = self._training(method), self.sample.n_rows
        settings, n_validation = measured.settings, n_rows["validation"]
        per_epoch = measured.step * _n_steps(settings.batch_size, n_rows["train"])
        # Without a better score than the first one, a training ends after as many evaluations as it has patience.
        least = settings.eval_every * (1 + settings.patience) if n_validation else settings.epochs
        low, high = (
            measured.maps + epochs * per_epoch + math.ceil(epochs / settings.eval_every) * n_validation * measured.score
            for epochs in (min(settings.epochs, least), settings.epochs)
        )
        return StageForecast(name, (low, high), measured.peak_bytes)

    def _refit(self, name: str, method: str) -> StageForecast:
        if METHODS[method].trained_as is not None:
            return StageForecast(name)
        measured, n_rows = self._training(method), self.sample.n_rows
        settings, n = measured.settings, n_rows["train"] + n_rows["validation"]
        per_epoch = measured.step * _n_steps(settings.batch_size, n)
        if settings.batch_size is None:
            per_epoch *= n / n_rows["train"]
        low, high = (
            measured.maps + epochs * per_epoch
            for epochs in (min(settings.eval_every, settings.epochs), settings.epochs)
        )
        return StageForecast(name, (low, high), measured.peak_bytes)

    def _evaluate(self, name: str, method: str) -> StageForecast:
        measured, n_rows = self._training(METHODS[method].trained_as or method), self.sample.n_rows
        # The tables as they are stored, and as they were trained.
        passes = 1 if precision_of(self.config, method) == "float32" else 2
        seconds = passes * measured.score * (n_rows["test"] or n_rows["validation"])
        return StageForecast(name, (seconds,) * 2, 2 * (measured.parts["tables"] + measured.parts["maps"]))

    def _training(self, method: str) -> MeasuredTraining:
        """A method's training of the whole log, measured once."""
        if method not in self._trainings:
            assert self._clustering
            out = self.context.method_dir(method)
            out.mkdir(parents=True)
            growth = Growth(self.sample.growth, self.sample.table_growth)
            self._trainings[method] = measure_training(self.context, method, out, growth, self.sample.n_rows["train"])
        return self._trainings[method]

    @cached_property
    def _clustering(self) -> tuple[float, int]:
        """Seconds and bytes of the clustering: those of the part's, as many times as there are more training rows."""
        cluster_connected(csr_array(np.ones((3, 3), np.float32)), resolution=1.0)  # Loads the compiled loops.
        before, started = peak_mib(reset=True), time.perf_counter()
        cluster_ctr(self.context.config, self.context.ingest_dir, self.folder / "cluster")
        took, held = time.perf_counter() - started, (peak_mib() - before) * MIB
        return took * self.sample.times, round(held * self.sample.times)


def _of_part(config: RunConfig, sample: CtrSample) -> RunConfig:
    """The configuration of the part's run: with a budget of rows, of which it gets a share as its ids are one of all."""
    kind, value = budget_of(config, DEFAULT_BUDGET)
    if sample.is_exact or kind == "resolution" or clustering_budget(config) != (kind, value):
        return config
    whole, part = _with_ids(sample), sample.features
    columns = sorted(
        {c for pair in find_pairs(part) for c, on in zip(pair.columns, pair.compressed, strict=True) if on}
    )
    if not columns:
        return config
    n_ids = [part.columns[c].n_ids for c in columns]
    share = sum(n_ids) / sum(whole.columns[c].n_ids for c in columns)
    # Every pair needs some.
    least = math.ceil(LEAST_ROWS * sum(n_ids) / min(n_ids))
    rows = max(least, round(share * rows_of_columns(config, whole, kind, value)))
    return RunConfig.from_flat(config.flat() | {"cluster.ratio": None, "cluster.rows": rows})


def _with_ids(sample: CtrSample) -> Features:
    """The columns of the part with as many ids as the whole has."""
    columns = [replace(column, n_ids=n) for column, n in zip(sample.features.all_columns, sample.n_ids, strict=True)]
    n = len(sample.features.columns)
    return replace(sample.features, columns=tuple(columns[:n]), multi_valued=tuple(columns[n:]))


def _n_steps(batch_size: int | None, n_rows: int) -> int:
    """Of an epoch."""
    return math.ceil(n_rows / batch_size) if batch_size else 1
