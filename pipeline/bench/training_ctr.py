"""Benchmark of CTR training and evaluation: samples per second, and the share of every phase.

As ``pipeline.bench.training``: it calls what a run calls, in this process; the loops report their phases; the first epoch is not timed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.models.ctr import CtrModel
from pipeline.bench.training import PhaseTimer, columns, figures, shares
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import resolve_method
from pipeline.ctr.cluster import cluster_ctr, clustering_labels
from pipeline.ctr.data import Features
from pipeline.ctr.evaluate import predict, table_rows
from pipeline.ctr.folds import cross_fitted_maps, draw_folds
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.maps import MapOptions, find_pairs, make_maps, pair_graph
from pipeline.ctr.method_spec import method_spec
from pipeline.ctr.settings import ctr_settings
from pipeline.ctr.train import SCORES, ctr_loss, seldom_tables
from pipeline.training.loop import Callbacks, Objective, fit
from pipeline.training.machine import threads

_log = logging.getLogger(__name__)


def bench_ctr(config: RunConfig, *, rounds: int) -> list[dict[str, Any]]:
    """Time epochs of training on a CTR data set, and the prediction of its test rows, method by method.

    Args:
        config: of task ctr: data, methods, model and budget; training and maps by ``train`` and ``map``.
        rounds: timed epochs, and timed evaluations.

    Returns: one object per method and task ("batches of N", "evaluation"), with the keys of ``pipeline.bench.training.measure`` that
        apply, ``n_rows`` among them.

    Raises:
        DataError, ConfigError: as a run.
    """
    _log.info("%s: reading and clustering", Path(config.data.path).name)
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as name:
        ingest_dir, cluster_dir = Path(name) / "ingest", Path(name) / "cluster"
        ingest_dir.mkdir()
        cluster_dir.mkdir()
        ingest_ctr(config.data, ingest_dir)
        cluster_ctr(config, ingest_dir, cluster_dir)
        return measure_ctr(config, ingest_dir, cluster_dir, rounds=rounds)


def measure_ctr(config: RunConfig, ingest_dir: Path, cluster_dir: Path, *, rounds: int) -> list[dict[str, Any]]:
    """:func:`bench_ctr` of a data set that is ingested and clustered."""
    # numba's threads are OpenMP's, as PyTorch's are: its first kernel would set PyTorch's number to its own.
    with threads(torch.get_num_threads()):
        return _measure(config, ingest_dir, cluster_dir, rounds)


def _measure(config: RunConfig, ingest_dir: Path, cluster_dir: Path, rounds: int) -> list[dict[str, Any]]:
    features = Features.open(ingest_dir)
    train, test = features.part("train"), features.part("test")
    fold = draw_folds(len(train), config.map.seed)
    make_model = _model_maker(config, features, cluster_dir, fold)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = [tensor.to(device) for tensor in (*train.tensors(), torch.from_numpy(fold))]
    settings = replace(ctr_settings(config, len(train)), epochs=rounds + 1, eval_every=rounds + 1)
    task = f"batches of {settings.batch_size:,}"
    results = []
    for method in config.run.methods:
        model = make_model(method).to(device)
        common = {
            "method": method,
            "model": config.train.model,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "rows": table_rows(model),
            "n_rows": len(train),
        }
        _log.info("%s: %s", method, task)
        timer = PhaseTimer(device)
        seldom = seldom_tables(model, settings.batch_size, features)
        objective = Objective(ctr_loss(len(features.multi_valued)), SCORES["auc"], rarely_read=seldom)
        callbacks = Callbacks(on_epoch=lambda *_, timer=timer: timer.end_round(), on_phase=timer)
        fit(model, examples, settings, objective, callbacks=callbacks)
        results.append(common | {"task": task} | figures(timer.rounds[1:], len(train)))
        if not len(test):
            continue
        _log.info("%s: evaluation", method)
        model.eval()
        predict(model, test)
        timer.start()
        for _ in range(rounds):
            predict(model, test)
            timer("predictions")
            timer.end_round()
        results.append(common | {"task": "evaluation"} | figures(timer.rounds, len(test)))
    return results


def _model_maker(
    config: RunConfig, features: Features, cluster_dir: Path, fold: NDArray[np.uint8]
) -> Callable[[str], CtrModel]:
    """A function that makes the untrained model of a method, with the cross-fitted maps of every fold.

    Args:
        fold: of every training row, shape (n_rows,).
    """
    train = features.part("train")
    graphs = [pair_graph(features, train, pair) for pair in find_pairs(features)]
    labels = clustering_labels(cluster_dir)

    def make(method: str) -> CtrModel:
        resolved = resolve_method(config, features, method)
        options = MapOptions(resolved.indices_per_id, resolved.hops, config.map.seed)
        maps = make_maps(features, graphs, labels, method, options)
        model = method_spec(config, features, method, labels).build(
            maps, len(features.dense), len(features.multi_valued)
        )
        model.use_folds(dict(cross_fitted_maps(features, train, graphs, labels, method, fold, options)))
        return model

    return make


def table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What to print: a header, and a line per result with the share of every phase."""
    header = ("method", "rows", "task", "seconds", "CPU s", "rows/s", "share of time")
    return header, [(*columns(e), f"{e['per_second']:,.0f}", shares(e)) for e in results]
