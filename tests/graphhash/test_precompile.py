"""Kernels that are compiled ahead: for the types that are called, into the folder that is read."""

from __future__ import annotations

import subprocess
import sys

import torch

from graphhash import MatrixFactorization, cluster, precompile, soft_maps
from graphhash.clustering.refinement import n_disconnected
from graphhash.graph.local import LocalGraph
from graphhash.metrics.ranking import top_k
from graphhash.models.losses import pairwise_logistic_loss
from tests.helpers.graphs import planted


def test_they_are_compiled_for_the_types_that_a_training_calls():
    """All but the loss's own kernels and ranking, which the last lines call, run inside clustering and maps."""
    graph, *_ = planted(0, 30, 20, 0.2, 0.02)
    labels = cluster(graph, resolution=1.0)
    n_disconnected(LocalGraph(graph), labels.users, labels.items)
    users, items = soft_maps(graph, labels, indices_per_id=8)
    model = MatrixFactorization(users, items, 8, item_bias=False, seed=0)
    ids = torch.arange(100)
    pairwise_logistic_loss(model.score_differences(ids, ids, ids.flip(0), read_all=True)).backward()
    top_k(model.score_all_items()(ids).detach().numpy(), 5, graph[:100])
    for kernel, signature in precompile.KERNELS:
        assert signature in kernel.signatures, kernel.py_func.__name__


def test_another_process_compiles_what_is_not_there(tmp_path, monkeypatch):
    """In a folder without any: one kernel stands for all, the others take half a minute."""
    short = f"import {precompile.__name__} as p; p.KERNELS[:-1] = []; print(p.is_compiled()); p.main(); print(p.is_compiled())"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_nothing_is_started_where_they_are_on_disk(monkeypatch):
    kernel, signature = precompile.KERNELS[-1]
    kernel.compile(signature)
    monkeypatch.setattr(precompile.subprocess, "run", lambda *_, **__: 1 / 0)
    assert precompile.compile_beside() is None


def test_without_compilation_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    short = f"import {precompile.__name__} as p; p.main(); print(p.compile_beside())"
    done = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None"]
