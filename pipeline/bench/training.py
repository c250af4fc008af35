"""The benchmark of training and evaluation: seconds per epoch, interactions per second, and where the time goes.

It calls what a run calls, `pipeline.retrieval.objective.fit_retrieval` and `pipeline.retrieval.evaluate.rank_users`, in this process and without Ray Train. Both tell
when a phase of their loops is over (`lap`); nothing is timed apart, so the phases add up to the whole. The first epoch of each
training, and a small evaluation, go before and are not counted: numba loads its kernels there. Medians are reported. Where other
programs want the same cores, threads wait for each other at the end of every kernel, and the seconds of one thread
(`OMP_NUM_THREADS=1`) on the processor say more than those on the clock.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.errors import DataError
from graphhash.maps.bucket_map import table_rows
from graphhash.models.samplers import NegativeSampler
from pipeline.config.run_config import HOPS, DataConfig, TrainConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS, Inputs
from pipeline.retrieval.evaluate import K, rank_users
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import fit_retrieval
from pipeline.retrieval.train import fit_settings

_log = logging.getLogger(__name__)

# Seconds on the clock, on the processors by all threads, and on the clock by phase.
Round = tuple[float, float, dict[str, float]]
# Users ranked before the evaluation is timed.
WARM_UP_USERS = 100


class Laps:
    """Seconds by phase and round: each call adds the time since the last one to the phase that it names.

    Args:
        device: a GPU works on after a call returns, and is waited for.

    Attributes:
        rounds: those that have ended.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        """Forget everything; the first round begins now."""
        self.rounds: list[Round] = []
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
        self._phases: dict[str, float] = {}
        self._started, self._last, self._cpu = now, now, time.process_time()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def bench(data: DataConfig, **how: Any) -> list[dict[str, Any]]:
    """:func:`measure` on a log, read like any other; its test interactions are those of the evaluation.

    Args:
        how: the keyword arguments of :func:`measure`.
    """
    from pipeline.distributed.session import ray_session
    from pipeline.retrieval.ingest import ingest

    _log.info("%s: making the graph", Path(data.path).name)
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as folder:
        with ray_session():
            ingest(data, Path(folder))
        train, test = (ShardedCsr.open(Path(folder) / part).load() for part in ("train", "test"))
    return measure(train, test, **how)


def measure(
    train: csr_array,
    test: csr_array,
    *,
    methods: Sequence[str],
    settings: TrainConfig,
    indices_per_id: int | None,
    resolution: float,
    rounds: int,
) -> list[dict[str, Any]]:
    """Time epochs of either training, and the evaluation of the model that the second one leaves, method by method.

    Args:
        train, test: interactions, users x items.
        methods: names in ``pipeline.maps.methods``.
        settings: model, dimension, seed and ``batch_size``, that of the training which is not full-batch.
        indices_per_id: rows read per id; None: the method's own.
        resolution: of the clustering that gives the compressed methods their rows.
        rounds: timed epochs per training, and timed evaluations.

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    users = torch.from_numpy(np.repeat(np.arange(train.shape[0]), np.diff(train.indptr))).to(device)
    items = torch.from_numpy(train.indices.astype(np.int64)).to(device)
    tested = np.flatnonzero(np.diff(test.indptr))
    labels = cluster(train, resolution=resolution)
    results = []
    for method in methods:
        spec = METHODS[method]
        maps = spec.make(
            Inputs(train, labels, indices_per_id=spec.lookups(indices_per_id), hops=HOPS[-1], seed=settings.seed)
        )
        n_rows = table_rows(*maps)
        item_bias = spec.with_bias(None, settings.loss)
        blueprint = ModelSpec(settings.model, settings.dim, item_bias, settings.n_layers, settings.seed)
        about = {"method": method, "model": settings.model, "device": str(device), "threads": torch.get_num_threads(),
                 "rows": n_rows,
                 "indices_per_id": maps[0].indices_per_id,
                 "n_users": train.shape[0], "n_items": train.shape[1], "n_interactions": len(users)}  # fmt: skip
        laps, sample = Laps(device), NegativeSampler(train, device=device)
        for task, batch_size in (("full-batch epoch", 0), (f"batches of {settings.batch_size:,}", settings.batch_size)):
            _log.info("%s: %s", method, task)
            model = blueprint.build(*maps, train).to(device)
            how = fit_settings(
                replace(settings, epochs=rounds + 1, eval_every=rounds + 1, batch_size=batch_size), spec, n_rows, train
            )
            laps.start()
            fit_retrieval(model, users, items, how, None, sample=sample, on_epoch=lambda *_: laps.end_round(), lap=laps)
            results.append(about | {"task": task} | figures(laps.rounds[1:], len(users)))
        _log.info("%s: evaluation", method)
        rank_users(model, tested[:WARM_UP_USERS], train, test, K)
        laps.start()
        for _ in range(rounds):
            rank_users(model, tested, train, test, K, lap=laps)
            laps.end_round()
        results.append(about | {"task": "evaluation"} | figures(laps.rounds, len(tested)))
    return results


def figures(rounds: Sequence[Round], n: int) -> dict[str, Any]:
    """Seconds, their median, per second and phases of timed rounds of ``n`` things each."""
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
        (e["method"], f"{e['rows']:,}", e["task"], f"{e['seconds']:.3f}", f"{e['cpu_s']:.3f}",
         f"{e['per_second']:,.0f} {'users' if e['task'] == 'evaluation' else 'interactions'}", _shares(e))
        for e in results
    ]  # fmt: skip
    return header, lines


def _shares(entry: dict[str, Any]) -> str:
    whole = sum(entry["phases_s"].values())
    return ", ".join(f"{phase} {100 * seconds / whole:.0f} %" for phase, seconds in entry["phases_s"].items())
