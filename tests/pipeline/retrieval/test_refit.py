"""The refit: a training on train and validation, whose model is tested and exported, without anything of the test."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from pipeline.bundles.recommend import recommend
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.refit import refit_method
from pipeline.retrieval.train import train_method
from pipeline.retrieval.weights import load_method
from pipeline.runs.run import run
from pipeline.runs.status import run_status
from pipeline.task import REFIT_PARTS, StageContext
from pipeline.training.checkpointing import fit_and_save
from pipeline.training.here import fit_here
from pipeline.training.job import TrainingSession
from tests.helpers import graphs

WEIGHTS = Path("checkpoint") / "model.npz"


def config_of(folder: Path, **settings) -> RunConfig:
    fixed = {"data.path": str(folder / "log.csv"), "run.out": str(folder / "out"), "run.mlflow": False}
    fixed |= {"run.methods": ("soft",), "cluster.rows": 60, "map.indices_per_id": 4, "map.hops": "1+2"}
    # The same learning rate in every epoch, so that fewer epochs are a part of more of them.
    fixed |= {"train.dim": 8, "train.epochs": 40, "train.eval_every": 5, "train.schedule": "constant"}
    fixed |= {"train.lr": 0.02, "train.l2_total": 0.1, "train.batch_size": 500}
    return RunConfig.from_flat(fixed | {key.replace("__", "."): value for key, value in settings.items()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a log of 180 users, and the whole run of `soft` in `out`."""
    folder = tmp_path_factory.mktemp("refit")
    graphs.write_log(folder / "log.csv", graphs.planted(0, 6, 30, 0.3, 0.02)[0])
    run(config_of(folder))
    return folder


def copy_of(whole: Path, to: Path) -> Path:
    return Path(shutil.copytree(whole / "out", to / "out"))


def history_of(folder: Path) -> dict:
    return json.loads((folder / "history.json").read_text())


def test_the_model_is_that_of_a_training_on_train_and_validation(whole, tmp_path):
    out = copy_of(whole, tmp_path)
    best = history_of(out / "methods" / "soft")["best_epoch"]
    assert 0 < best < 40, "else the refit is as long as the training"
    union = load_interactions(out / "ingest", REFIT_PARTS)
    n_train = ShardedCsr.open(out / "ingest" / "train").n_edges
    assert union.nnz > n_train
    shutil.rmtree(out / "ingest" / "train")
    ShardedCsr.write(out / "ingest" / "train", union, n_shards=2)
    shutil.rmtree(out / "ingest" / "validation")
    ShardedCsr.write(out / "ingest" / "validation", csr_array(union.shape, dtype=np.float32), n_shards=2)
    context = StageContext(config_of(tmp_path, train__epochs=best), out)
    (tmp_path / "trained").mkdir()
    train_method(context, "soft", tmp_path / "trained", TrainingSession())
    ours, theirs = (
        load_method(folder, out / "ingest") for folder in (whole / "out" / "refit" / "soft", tmp_path / "trained")
    )
    assert [m.content_hash for m in ours[1:]] == [m.content_hash for m in theirs[1:]]
    for name, weight in theirs[0].state_dict().items():
        assert ours[0].state_dict()[name].numpy().tobytes() == weight.numpy().tobytes(), name


def test_it_ends_at_the_best_epoch_and_keeps_ids_and_rows(whole):
    trained, refitted = (whole / "out" / place / "soft" for place in ("methods", "refit"))
    best = history_of(trained)["best_epoch"]
    assert [entry["epoch"] for entry in history_of(refitted)["epochs"]] == [best]
    assert history_of(refitted)["facts"]["validation_capped_recall@20"] is None
    for side in ("users", "items"):
        before, now = (BucketMap.load(folder / f"{side}.npz") for folder in (trained, refitted))
        assert (before.n_ids, before.n_buckets) == (now.n_ids, now.n_buckets)
        assert before.content_hash != now.content_hash, "mixtures are of train and validation"


def test_nothing_of_the_test_is_read(whole, tmp_path):
    out = copy_of(whole, tmp_path)
    shutil.rmtree(out / "ingest" / "test")
    (tmp_path / "again").mkdir()
    refit_method(StageContext(config_of(tmp_path), out), "soft", tmp_path / "again", TrainingSession())
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (whole / "out" / "refit" / "soft" / WEIGHTS).read_bytes()


def worker(job: dict) -> dict:
    """What a worker of Ray Train does with a job."""
    return fit_and_save(job["task"], job, torch.device("cpu"), lambda entry: None, lambda line: None)


def test_workers_refit_together(whole, tmp_path, pair):
    states = []

    def together(job, tracker):
        states.extend(pair(worker, job))
        return states[0]

    out = copy_of(whole, tmp_path)
    (tmp_path / "again").mkdir()
    session = TrainingSession(fit_job=together)
    refit_method(StageContext(config_of(tmp_path, train__workers=2), out), "soft", tmp_path / "again", session)
    found, alone = (load_method(folder, out / "ingest") for folder in (tmp_path / "again", out / "refit" / "soft"))
    assert [m.content_hash for m in found[1:]] == [m.content_hash for m in alone[1:]]
    assert history_of(tmp_path / "again")["epochs"][0]["epoch"] == history_of(out / "refit" / "soft")["best_epoch"]
    for name, weight in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], weight), name
    # Other draws of negatives, and the same training otherwise.
    ours, theirs = (history_of(folder)["epochs"][0]["loss"] for folder in (tmp_path / "again", out / "refit" / "soft"))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_it_is_the_model_that_is_tested_and_exported(whole):
    out = whole / "out"
    (metrics,) = json.loads((out / "metrics.json").read_text())
    manifest = json.loads((out / "bundle" / "manifest.json").read_text())
    assert metrics["trained_on"] == manifest["metrics"]["trained_on"] == ["train", "validation"]
    assert "refit" in metrics["seconds"]
    assert "train and validation interactions together" in (out / "report.html").read_text()
    # What a user has in validation is seen as well.
    validation = ShardedCsr.open(out / "ingest" / "validation").load()
    user = int(np.argmax(np.diff(validation.indptr)))
    users, items = (Vocabulary.load(out / "ingest" / f"{side}.parquet") for side in ("users", "items"))
    seen = set(items.take(load_interactions(out / "ingest", REFIT_PARTS)[[user]].indices))
    (answer,) = recommend(out / "bundle", [str(users.take([user])[0])], k=len(items) - len(seen), exclude_seen=True)
    assert {item["item_id"] for item in answer["items"]}.isdisjoint(seen)


def test_one_that_was_killed_goes_on_and_the_training_before_it_is_kept(whole, tmp_path):
    shutil.copy(whole / "log.csv", tmp_path)
    config, calls = config_of(tmp_path), []

    def killed_in_the_refit(job, tracker):
        calls.append(job["settings"].last_epoch)
        if calls[-1] is None:
            return fit_here(job, tracker)
        fit_here(job | {"settings": dataclasses.replace(job["settings"], last_epoch=2)}, tracker)
        raise SystemExit(137)

    with pytest.raises(SystemExit):
        run(config, fit_job=killed_in_the_refit)
    assert run_status(config)[2:4] == ["train soft: up to date", "refit soft: never computed here"]
    run(config)
    assert len(calls) == 2
    assert history_of(tmp_path / "out" / "methods" / "soft")["resumed"] == []
    refitted = tmp_path / "out" / "refit" / "soft"
    assert history_of(refitted)["resumed"] == [2]
    assert (refitted / WEIGHTS).read_bytes() == (whole / "out" / "refit" / "soft" / WEIGHTS).read_bytes()
    assert not (tmp_path / "out" / "checkpoints" / "refit-soft").exists()


def test_switched_off_the_first_training_is_tested_and_exported(whole, tmp_path):
    out = copy_of(whole, tmp_path)
    shutil.copy(whole / "log.csv", tmp_path)
    config = config_of(tmp_path, train__refit=False)
    lines = run_status(config)
    assert lines[2] == "train soft: up to date"
    assert not any(line.startswith("refit") for line in lines)
    (metrics,) = run(config).metrics
    assert metrics["trained_on"] == ["train"]
    assert "refit" not in metrics["seconds"]
    tested = json.loads((whole / "out" / "metrics.json").read_text())[0]
    assert metrics["recall@20"] != tested["recall@20"]
    assert "train and validation interactions together" not in (out / "report.html").read_text()


def test_without_validation_there_is_none(whole, tmp_path):
    shutil.copy(whole / "log.csv", tmp_path)
    lines = run_status(config_of(tmp_path, data__validation=0.0))
    assert not any(line.startswith("refit") for line in lines)


def test_methods_that_store_trained_vectors_store_those_of_the_refit(whole, tmp_path):
    out = copy_of(whole, tmp_path)
    shutil.copy(whole / "log.csv", tmp_path)
    run(config_of(tmp_path, run__methods=("full_int8",)), until="evaluate")
    stored, full = (out / "refit" / method / WEIGHTS for method in ("full_int8", "full"))
    assert stored.read_bytes() == full.read_bytes()
    assert full.read_bytes() != (out / "methods" / "full" / WEIGHTS).read_bytes()
