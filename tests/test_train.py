"""The train stage under Ray Train: its files, its checkpoints, a killed worker, a training that cannot succeed."""

from __future__ import annotations

import json
import threading
import time

import graphs
import numpy as np
import psutil
import pytest
import torch
from scipy.sparse import csr_array

import graphhash
from pipeline.checkpoint import load_method
from pipeline.clusters import cluster_run
from pipeline.config import RunConfig
from pipeline.evaluate import evaluate_method
from pipeline.shards import ShardedCsr
from pipeline.tracking import Tracker
from pipeline.train import train_method


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An ingested and clustered planted graph: a tenth of the interactions for validation, a tenth for test."""
    folder = tmp_path_factory.mktemp("run")
    graph, _, _ = graphs.planted(0, 6, 30, 0.3, 0.02)
    part = np.random.default_rng(0).choice(3, graph.nnz, p=[0.8, 0.1, 0.1])
    for i, name in enumerate(("train", "validation", "test")):
        kept = csr_array(
            (graph.data * (part == i), graph.indices.copy(), graph.indptr.copy()), shape=graph.shape, dtype=np.float32
        )
        kept.eliminate_zeros()
        ShardedCsr.write(folder / "ingest" / name, kept, n_shards=2)
        if name == "train":
            by_item = kept.T.tocsr()
            by_item.sort_indices()
            ShardedCsr.write(folder / "ingest" / "train_by_item", by_item, n_shards=2)
    (folder / "cluster").mkdir()
    cluster_run(RunConfig.from_flat({"cluster.resolution": 3.0}), folder / "ingest", folder / "cluster")
    return folder


def train(run, out, **settings):
    config = RunConfig.from_flat(
        {"train.dim": 16, "train.epochs": 40, "train.eval_every": 10, "train.lr": 0.02}
        | {key.replace("__", "."): value for key, value in settings.items()}
    )
    out.mkdir()
    return config, train_method(config, "soft", run / "ingest", run / "cluster", out, Tracker())


def test_the_stage_leaves_maps_weights_and_history(run, tmp_path, ray_local):
    config, facts = train(run, tmp_path / "soft")
    history = json.loads((tmp_path / "soft" / "history.json").read_text())
    assert [entry["epoch"] for entry in history["epochs"]] == [10, 20, 30, 40]
    best = max(history["epochs"], key=lambda entry: entry["recall@20"])
    assert (facts["best_epoch"], facts["validation_recall@20"]) == (best["epoch"], best["recall@20"])
    assert sorted(p.name for p in (tmp_path / "soft").iterdir()) == ["checkpoint", "history.json", "items.npz", "users.npz"]
    model, users, _ = load_method(tmp_path / "soft", run / "ingest")
    assert facts["bucket_map_hash.users"] == users.content_hash
    # Unknown users are answered like the average one.
    degrees = torch.from_numpy(ShardedCsr.open(run / "ingest" / "train").load().sum(axis=1)).float()
    expected = degrees @ model.user_embedding.all() / degrees.sum()
    torch.testing.assert_close(model.user_embedding.table[users.unknown_row], expected)
    metrics = evaluate_method(config, "soft", run / "ingest", tmp_path / "soft")
    assert metrics["recall@20"] > 0.3
    assert metrics["bytes"] == sum(metrics["bytes_of"].values())
    assert metrics["bytes_of"]["tables"] == (16 + 2) * metrics["rows"]  # int8, and a scale per row
    assert metrics["bytes_full"] == 4 * 16 * (180 + 180 + 2)


def test_a_killed_worker_is_replaced_and_goes_on_from_its_checkpoint(run, tmp_path, ray_local):
    killed = []

    def kill_once():
        stop = time.monotonic() + 200
        while time.monotonic() < stop and not killed:
            time.sleep(0.1)
            try:
                if json.loads((tmp_path / "soft" / "progress.json").read_text())["epoch"] < 1000:
                    continue
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
            except (OSError, psutil.Error):
                continue  # Not begun yet, or a process that ended by itself while we looked.

    killer = threading.Thread(target=kill_once)
    killer.start()
    _, facts = train(run, tmp_path / "soft", train__epochs=2000, train__eval_every=100, train__patience=1000)
    killer.join()
    assert killed, "the training ended before its worker could be killed"
    assert facts["epochs"] == 2000
    history = json.loads((tmp_path / "soft" / "history.json").read_text())["epochs"]
    assert [entry["epoch"] for entry in history] == list(range(100, 2001, 100))
    # The clock of an entry starts with its worker: it falls where the second worker took over, and only there.
    falls = [b["seconds"] < a["seconds"] for a, b in zip(history, history[1:], strict=False)]
    assert sum(falls) == 1


def test_a_training_that_diverges_says_so_in_one_line(run, tmp_path, ray_local):
    with pytest.raises(graphhash.DataError, match="training diverged; lower train.lr") as error:
        train(run, tmp_path / "soft", train__lr=1e38)
    assert "\n" not in str(error.value)


def test_float16_is_tested_as_it_is_shipped(run, tmp_path, ray_local):
    config, _ = train(run, tmp_path / "soft", export__precision="float16", train__epochs=10)
    metrics = evaluate_method(config, "soft", run / "ingest", tmp_path / "soft")
    assert metrics["bytes_of"]["tables"] == 2 * 16 * metrics["rows"]


def test_a_damaged_checkpoint_is_refused(run, tmp_path, ray_local):
    train(run, tmp_path / "soft", train__epochs=5)
    path = tmp_path / "soft" / "checkpoint" / "model.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(graphhash.DataError, match=r"model\.npz: not a readable checkpoint"):
        load_method(tmp_path / "soft", run / "ingest")
