"""The train stage: its files, Ctrl-C under Ray Train, the same weights there and in this process, a training that cannot succeed."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import graphhash
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.cluster import cluster_run
from pipeline.retrieval.evaluate import evaluate_method
from pipeline.retrieval.train import train_method
from pipeline.retrieval.weights import load_method
from pipeline.task import StageContext
from pipeline.training import workers as ray_fit
from pipeline.training.checkpointing import PROGRESS, progress_of
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.job import TrainingSession
from tests.helpers import graphs


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


def settings_of(**settings) -> RunConfig:
    return RunConfig.from_flat(
        {"train.dim": 16, "train.epochs": 40, "train.eval_every": 10, "train.lr": 0.02}
        | {key.replace("__", "."): value for key, value in settings.items()}
    )


def train(run, out, config, **how):
    out.mkdir()
    return train_method(StageContext(config, run), "soft", out, TrainingSession(**how))


def after_epoch(folder, epoch, act):
    """Call ``act`` once the training in ``folder`` has come so far; returns the thread that waits for it."""

    def wait():
        stop = time.monotonic() + 200
        while time.monotonic() < stop:
            time.sleep(0.05)
            seen = progress_of(folder / PROGRESS)
            if seen is not None and seen["epoch"] >= epoch and act():
                return

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_under_ray_train_saves_first_and_this_process_ends_the_training_with_the_same_weights(
    run, tmp_path, ray_local, caplog
):
    config = settings_of(train__epochs=1200, train__eval_every=100, train__patience=100, train__amp="bf16")
    states = CheckpointManager(tmp_path / "states", "key")
    caplog.set_level(logging.INFO, "pipeline")

    def press_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        return True

    waiting = after_epoch(tmp_path / "stopped", 250, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "stopped", config, checkpoints=states, fit_job=ray_fit.run_on_ray)
    waiting.join()
    stopped_in = states.manifest()["epoch"]
    assert 250 <= stopped_in < 1200
    assert any(line.startswith(f"stopped at {states.newest()}; the same command goes on") for line in caplog.messages)
    assert torch.cuda.is_available() or any("train.amp=bf16 needs a GPU" in line for line in caplog.messages)

    out = tmp_path / "soft"
    facts = train(run, out, config, checkpoints=states)
    history = json.loads((out / "history.json").read_text())
    assert history["resumed"] == [stopped_in]
    assert [entry["epoch"] for entry in history["epochs"]] == list(range(100, 1201, 100))
    best = max(history["epochs"], key=lambda entry: entry["capped_recall@20"])
    assert (facts["best_epoch"], facts["validation_capped_recall@20"]) == (best["epoch"], best["capped_recall@20"])
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "history.json", "items.npz", "users.npz"]

    train(run, tmp_path / "whole", config)
    model, users, _ = load_method(out, run / "ingest")
    whole, _, _ = load_method(tmp_path / "whole", run / "ingest")
    for name, weight in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name

    assert facts["bucket_map_hash.users"] == users.content_hash
    # Unknown users are answered like the average one.
    degrees = torch.from_numpy(ShardedCsr.open(run / "ingest" / "train").load().sum(axis=1)).float()
    expected = degrees @ model.user_embedding.all() / degrees.sum()
    torch.testing.assert_close(model.user_embedding.table[users.oov_row], expected)
    metrics = evaluate_method(config, "soft", run / "ingest", out)
    assert metrics["recall@20"] > 0.3
    assert metrics["bytes"] == sum(metrics["bytes_of"].values())
    assert metrics["bytes_of"]["tables"] == (8 + 2) * metrics["rows"]  # int4, and a scale per row
    assert metrics["bytes_full"] == 4 * 16 * (180 + 180 + 2)
    float16 = settings_of(export__precision="float16")
    assert evaluate_method(float16, "soft", run / "ingest", out)["bytes_of"]["tables"] == 2 * 16 * metrics["rows"]
    path = out / "checkpoint" / "model.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(graphhash.DataError, match=r"model\.npz: not a readable checkpoint"):
        load_method(out, run / "ingest")


def test_a_training_that_diverges_says_so_in_one_line(run, tmp_path):
    with pytest.raises(graphhash.DataError, match=r"training diverged; lower train.lr \(1e\+38\)") as error:
        train(run, tmp_path / "soft", settings_of(train__lr=1e38))
    assert "\n" not in str(error.value)


def test_a_worker_of_ray_train_tells_the_driver_by_a_file(run, tmp_path, ray_local, monkeypatch):
    """Then Ray Train does not try again; here without Ray Train."""
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    context = SimpleNamespace(get_world_size=lambda: 1, get_world_rank=lambda: 0)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr(ray_fit, "_assigned_cpus", lambda: 2)

    def fit_job(job, tracker):
        ray_fit._worker(job)
        raise graphhash.DataError((tmp_path / "soft" / ray_fit.FAILURE).read_text())

    with pytest.raises(graphhash.DataError, match=r"training diverged; lower train.lr \(1e\+38\)"):
        train(run, tmp_path / "soft", settings_of(train__lr=1e38), fit_job=fit_job)
