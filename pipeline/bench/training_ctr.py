"""The benchmark of click-through training and evaluation: rows per second, and where the time goes.

As ``pipeline.bench.training``: what a run calls, in this process, each phase told by the loops themselves, the first epoch not counted.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.training import Laps, figures
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import asked_lookups
from pipeline.ctr.cluster import cluster_ctr, load_pair_labels
from pipeline.ctr.data import Features
from pipeline.ctr.evaluate import predict, table_rows
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.maps import cross_fitted_maps, draw_folds, find_pairs, make_maps, pair_graph
from pipeline.ctr.settings import ctr_settings, spec_of
from pipeline.ctr.train import SCORES, click_loss, seldom_tables
from pipeline.training.loop import fit

_log = logging.getLogger(__name__)


def bench_clicks(config: RunConfig, *, rounds: int) -> list[dict[str, Any]]:
    """Time epochs of training on a log, and the prediction of its test rows, method by method.

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
        return measure_clicks(config, ingest_dir, cluster_dir, config.run.methods, rounds=rounds)


def measure_clicks(
    config: RunConfig,
    ingest_dir: Path,
    cluster_dir: Path,
    methods: Sequence[str],
    *,
    rounds: int,
) -> list[dict[str, Any]]:
    """:func:`bench_clicks` of a log that is ingested and clustered."""
    features = Features.open(ingest_dir)
    train, test = features.part("train"), features.part("test")
    graphs = [pair_graph(features, train, pair) for pair in find_pairs(features)]
    labels = load_pair_labels(cluster_dir, json.loads((cluster_dir / "cluster.json").read_text()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fold = draw_folds(len(train), config.map.seed)
    examples = [tensor.to(device) for tensor in (*train.tensors(), torch.from_numpy(fold))]
    results = []
    for method in methods:
        how = {
            "indices_per_id": asked_lookups(config, features, method),
            "hops": config.map.hops,
            "seed": config.map.seed,
        }
        maps = make_maps(features, graphs, labels, method, **how)
        model = spec_of(config, method).build(maps, len(features.dense), len(features.bags)).to(device)
        model.use_folds(cross_fitted_maps(features, train, graphs, labels, method, fold, **how))
        settings = replace(ctr_settings(config, len(train)), epochs=rounds + 1, eval_every=rounds + 1)
        about = {"method": method, "model": config.train.model, "device": str(device), "threads": torch.get_num_threads(),
                 "rows": table_rows(model), "n_rows": len(train)}  # fmt: skip
        _log.info("%s: batches of %s", method, f"{settings.batch_size:,}")
        laps = Laps(device)
        seldom = seldom_tables(model, settings.batch_size, features)
        fit(
            model, examples, settings, click_loss(len(features.bags)), None, score=SCORES["auc"], seldom=seldom,
            on_epoch=lambda *_: laps.end_round(), lap=laps,
        )  # fmt: skip
        results.append(about | {"task": f"batches of {settings.batch_size:,}"} | figures(laps.rounds[1:], len(train)))
        if not len(test):
            continue
        _log.info("%s: evaluation", method)
        model.eval()
        predict(model, test)
        laps.start()
        for _ in range(rounds):
            predict(model, test)
            laps("predictions")
            laps.end_round()
        results.append(about | {"task": "evaluation"} | figures(laps.rounds, len(test)))
    return results


def table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What to print: a header, and a line per result with the share of every phase."""
    header = ("method", "rows", "task", "seconds", "CPU s", "rows/s", "share of time")
    lines = []
    for e in results:
        whole = sum(e["phases_s"].values())
        shares = ", ".join(f"{phase} {100 * seconds / whole:.0f} %" for phase, seconds in e["phases_s"].items())
        lines.append(
            (
                e["method"],
                f"{e['rows']:,}",
                e["task"],
                f"{e['seconds']:.3f}",
                f"{e['cpu_s']:.3f}",
                f"{e['per_second']:,.0f}",
                shares,
            )
        )
    return header, lines
