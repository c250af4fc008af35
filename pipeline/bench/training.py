"""Benchmark of training and evaluation: seconds per epoch, interactions per second, and the share of every phase.

It calls what a run calls, `pipeline.retrieval.objective.fit_retrieval` and `pipeline.retrieval.evaluate.rank_users`, in this process and
without Ray Train. Their loops report the end of every phase, so the phases add up to the whole. The first epoch of each training, and a
small evaluation, are not timed: numba loads its kernels there. Medians are reported.

Where other programs use the same cores, threads wait for each other at the end of every kernel; the CPU seconds of one thread
(`OMP_NUM_THREADS=1`) then say more than wall time.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.maps.bucket_map import BucketMap, table_rows
from graphhash.metrics.ranking import capped_recall_at_k, ndcg_at_k
from graphhash.models.mf import RetrievalModel
from graphhash.models.samplers import NegativeSampler
from pipeline.config.choices import SHARED_LOSSES
from pipeline.config.run_config import HOPS, DataConfig, TrainConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS, Inputs, Method
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import K, TrainingPairs, fit_retrieval
from pipeline.retrieval.train import fit_settings, model_spec_of
from pipeline.training.loop import Callbacks
from pipeline.training.machine import threads

_log = logging.getLogger(__name__)

# Seconds on the clock, on the processors by all threads, and on the clock by phase.
Round = tuple[float, float, dict[str, float]]
# Users ranked before the evaluation is timed.
WARM_UP_USERS = 100


@dataclass(frozen=True)
class BenchSettings:
    """Methods, model and number of rounds of a benchmark.

    Args:
        methods: names in ``pipeline.maps.methods``.
        train: model, loss, dimension, seed, and the ``batch_size`` of the training in batches.
        indices_per_id: table rows read per id; None: the method's own number.
        resolution: of the clustering, which determines the rows of the compressed tables.
        rounds: timed epochs per training, and timed evaluations.
    """

    methods: Sequence[str]
    train: TrainConfig
    indices_per_id: int | None
    resolution: float
    rounds: int

    def trainings(self) -> list[tuple[str, TrainConfig]]:
        """Full-batch epochs, where the loss allows them, and epochs of batches, by name; the first epoch of each is not timed."""
        batch_size = self.train.batch_size or 0
        epochs = self.rounds + 1
        sizes = [(f"batches of {batch_size:,}", batch_size)]
        if self.train.loss not in (*SHARED_LOSSES, "directau"):
            sizes.insert(0, ("full-batch epoch", 0))
        return [(name, replace(self.train, batch_size=size, epochs=epochs, eval_every=epochs)) for name, size in sizes]


@dataclass(frozen=True)
class Subject:
    """A method's bucket maps, and the model on them."""

    method: Method
    maps: tuple[BucketMap, BucketMap]
    model: ModelSpec

    @classmethod
    def make(cls, name: str, train: csr_array, labels: Labels, settings: BenchSettings) -> Subject:
        """From the training interactions and their communities."""
        method, config = METHODS[name], settings.train
        n_indices = method.resolve_indices(settings.indices_per_id)
        maps = method.make(Inputs(train, labels, n_indices, hops=HOPS[-1], seed=config.seed))
        item_bias = method.with_bias(None, config.loss, GraphSize.of(train).neighbours)
        return cls(method, maps, model_spec_of(config, item_bias))

    @property
    def n_rows(self) -> int:
        """Of both tables."""
        return table_rows(*self.maps)


class PhaseTimer:
    """Seconds by phase and round: each call adds the time since the last one to the phase that it names.

    Args:
        device: a GPU works on after a call returns, and is waited for.

    Attributes:
        rounds: those that have ended.
    """

    rounds: list[Round]
    _phases: dict[str, float]
    _started: float
    _last: float
    _cpu: float

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Forget everything; the first round begins now."""
        self.rounds = []
        self._begin(self._now())

    def __call__(self, phase: str) -> None:
        now = self._now()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def end_round(self) -> None:
        """The next round begins now."""
        now = self._now()
        self.rounds.append((now - self._started, time.process_time() - self._cpu, self._phases))
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._phases = {}
        self._started, self._last, self._cpu = now, now, time.process_time()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def bench(data: DataConfig, settings: BenchSettings) -> list[dict[str, Any]]:
    """:func:`measure` on a log, read as any other; its test interactions are those of the evaluation."""
    from pipeline.retrieval.ingest import ingest

    _log.info("%s: making the graph", Path(data.path).name)
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as folder:
        ingest(data, Path(folder))
        train, test = (ShardedCsr.open(Path(folder) / part).load() for part in ("train", "test"))
    return measure(train, test, settings)


def measure(train: csr_array, test: csr_array, settings: BenchSettings) -> list[dict[str, Any]]:
    """Time epochs of both trainings, and the evaluation of the model that the second one leaves, method by method.

    Args:
        train, test: interactions, users x items.

    Returns: one object per method and task ("full-batch epoch", "batches of N", "evaluation"), with method, model, task, device,
        threads, rows, indices_per_id, n_users, n_items, n_interactions; seconds (the median), rounds_s (all of them) and cpu_s
        (the median, on the processors by all threads), per_second (interactions, or users evaluated), and phases_s, those of
        the round nearest to the median.

    Raises:
        DataError: there are no test interactions.
    """
    if not test.nnz:
        raise DataError(
            "the log has no test interactions to rank; give --split random, or --split given with a test file"
        )
    # numba's threads are OpenMP's, as PyTorch's are: its first kernel would set PyTorch's number to its own.
    with threads(torch.get_num_threads()):
        return _measure(train, test, settings)


def _measure(train: csr_array, test: csr_array, settings: BenchSettings) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = cluster(train, resolution=settings.resolution)
    results = []
    for name in settings.methods:
        subject = Subject.make(name, train, labels, settings)
        common = {
            "method": name,
            "model": settings.train.model,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "rows": subject.n_rows,
            "indices_per_id": subject.maps[0].indices_per_id,
            "n_users": train.shape[0],
            "n_items": train.shape[1],
            "n_interactions": train.nnz,
        }
        timer = PhaseTimer(device)
        for task, config in settings.trainings():
            _log.info("%s: %s", name, task)
            model = _time_training(subject, train, config, timer)
            results.append(common | {"task": task} | figures(timer.rounds[1:], train.nnz))
        _log.info("%s: evaluation", name)
        tested = np.flatnonzero(np.diff(test.indptr))
        rank_users(model, tested[:WARM_UP_USERS], train, K)
        timer.start()
        for _ in range(settings.rounds):
            ranked = rank_users(model, tested, train, K, lap=timer)
            capped_recall_at_k(ranked, test[tested])
            ndcg_at_k(ranked, test[tested])
            timer("metrics")
            timer.end_round()
        results.append(common | {"task": "evaluation"} | figures(timer.rounds, len(tested)))
    return results


def _time_training(subject: Subject, train: csr_array, config: TrainConfig, timer: PhaseTimer) -> RetrievalModel:
    """Train a new model, an epoch a round, and return it."""
    model = subject.model.build(*subject.maps, train).to(timer.device)
    settings = fit_settings(config, subject.method, subject.n_rows, GraphSize.of(train))
    pairs = TrainingPairs.of(train, NegativeSampler(train, device=timer.device), timer.device)
    timer.start()
    callbacks = Callbacks(on_epoch=lambda *_: timer.end_round(), on_phase=timer)
    fit_retrieval(model, pairs, settings, None, callbacks=callbacks)
    return model


def figures(rounds: Sequence[Round], n: int) -> dict[str, Any]:
    """Seconds of timed rounds over ``n`` examples each: all, their median, examples per second, and phases.

    The phases are those of the round nearest to the median.
    """
    seconds = statistics.median(whole for whole, _, _ in rounds)
    _, _, phases = min(rounds, key=lambda one: abs(one[0] - seconds))
    return {
        "seconds": seconds,
        "rounds_s": [whole for whole, _, _ in rounds],
        "cpu_s": statistics.median(cpu for _, cpu, _ in rounds),
        "per_second": n / seconds,
        "phases_s": phases,
    }


def table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What to print: a header, and a line per result with the share of every phase."""
    header = ("method", "rows", "task", "seconds", "CPU s", "per second", "share of time")
    lines = [
        (*columns(e), f"{e['per_second']:,.0f} {'users' if e['task'] == 'evaluation' else 'interactions'}", shares(e))
        for e in results
    ]
    return header, lines


def columns(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns method, rows, task, seconds and CPU s of a result."""
    return (
        entry["method"],
        f"{entry['rows']:,}",
        entry["task"],
        f"{entry['seconds']:.3f}",
        f"{entry['cpu_s']:.3f}",
    )


def shares(entry: Mapping[str, Any]) -> str:
    """The share of every phase in a result's time."""
    whole = sum(entry["phases_s"].values())
    return ", ".join(f"{phase} {100 * seconds / whole:.0f} %" for phase, seconds in entry["phases_s"].items())
