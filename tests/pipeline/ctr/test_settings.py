"""Default settings of a training hold on a small log."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphhash.maps.bucket_map import full_map
from graphhash.models.ctr_bytes import layer_bytes
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.models import MOST_TABLE_DECAY
from pipeline.ctr.settings import ctr_settings, spec_of
from pipeline.ctr.train import ctr_loss, validated
from pipeline.training.loop import Objective, fit
from tests.helpers.ctr_log import write_csv


def test_full_tables_of_dlrm_learn_what_the_hour_decides(tmp_path):
    """A weight decay of 10 over the 8,000 rows of train shrank all vectors to 0: AUC .500."""
    rng = np.random.default_rng(0)
    hours = rng.integers(0, 24, 10_000)
    log = {
        "click": (rng.random(10_000) < np.where((hours >= 8) & (hours < 20), 0.9, 0.1)).astype(int).tolist(),
        "user_id": rng.integers(0, 200, 10_000).tolist(),
        "item_id": rng.integers(0, 150, 10_000).tolist(),
        "hour": hours.tolist(),
    }
    (tmp_path / "ingest").mkdir()
    ingest_ctr(DataConfig(str(write_csv(tmp_path / "log.csv", log))), tmp_path / "ingest")
    features = Features.open(tmp_path / "ingest")
    config = RunConfig.from_flat({"run.task": "ctr"})
    model = spec_of(config, "full").build([full_map(column.n_ids) for column in features.columns], 0)
    train, validation = features.part("train"), features.part("validation")
    objective = Objective(ctr_loss(0), "auc", lambda fitted: validated(fitted, validation))
    state = fit(model, train.tensors(), ctr_settings(config, len(train)), objective)
    assert max(epoch["auc"] for epoch in state["history"]) > 0.88


@pytest.mark.parametrize(
    ("asked", "decays"),
    [
        ({}, (2e-6, 0.02)),
        ({"train.weight_decay": 0.5}, (0.5, None)),
        ({"train.l2_total": 4.0}, (4e-6, None)),
    ],
)
def test_a_weight_decay_that_is_given_is_that_of_the_tables_too(asked, decays):
    config = RunConfig.from_flat({"run.task": "ctr", "train.model": "finalnet", **asked})
    settings = ctr_settings(config, 1_000_000)
    assert (settings.weight_decay, settings.table_decay) == decays
    assert ctr_settings(config, 1000).table_decay in (None, MOST_TABLE_DECAY)


@pytest.mark.parametrize(("asked", "rank"), [(0, None), (8, 8)])
def test_the_rank_of_cross_layers_is_the_one_asked_for(asked, rank):
    config = RunConfig.from_flat(
        {"run.task": "ctr", "train.model": "dcnv2", "train.dim": 16, "train.cross_rank": asked}
    )
    spec = spec_of(config, "full")
    assert spec.cross_rank == rank
    maps = [full_map(5)] * 4
    without = layer_bytes(dataclasses.replace(spec, n_cross=0).build(maps, 0))
    matrices = 64 * 64 if rank is None else 2 * 64 * rank
    assert layer_bytes(spec.build(maps, 0)) - without == 4 * spec.n_cross * (matrices + 64)
