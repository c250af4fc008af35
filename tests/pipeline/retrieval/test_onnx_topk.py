"""The best buckets first find what the scan of the whole catalogue finds, ties and exclusions included."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import plain_map
from graphhash.models.mf import MatrixFactorization
from pipeline.retrieval import onnx_topk
from pipeline.retrieval.onnx_graph import retrieval_graph


def session(model, maps, ids, precision, runtime) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    graph = retrieval_graph(model, *maps, *ids, precision, runtime)
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.integers(2, 60),
    n_buckets=st.integers(2, 30),
    item_bias=st.booleans(),
    k=st.integers(1, 70),
    n_exclude=st.integers(0, 6),
    precision=st.sampled_from(["float32", "float16"]),
    runtime=st.sampled_from(["materialized", "compressed"]),
)
def test_buckets_first_are_the_scan(seed, n_items, n_buckets, item_bias, k, n_exclude, precision, runtime):
    """Small whole numbers, so that sums are exact, and buckets and items tie often."""
    rng = np.random.default_rng(seed)
    maps = (
        plain_map(rng.integers(0, 4, (5, 1)), 5, "graph"),
        plain_map(rng.integers(0, n_buckets - 1, (n_items, 1)), n_buckets, "graph"),
    )
    model = MatrixFactorization(*maps, 3, item_bias=item_bias, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.integers(-2, 3, parameter.shape).astype(np.float32)))
    ids = Vocabulary(np.arange(5)), Vocabulary(np.arange(100, 100 + n_items))
    feed = {
        "user_id": np.arange(6),
        "k": np.array(k),
        # Repeats and unknown items among them.
        "exclude_item_id": rng.integers(95, 100 + n_items, (6, n_exclude)),
        "candidate_item_id": np.empty((1, 0), np.int64),
    }
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        for share in (0.0, 1e9):  # Never, and always.
            patch.setattr(onnx_topk, "MOST_BUCKETS", share)
            patch.setattr(onnx_topk, "_most_compared", lambda n_items, n_buckets: 2**60)
            answers.append(session(model, maps, ids, precision, runtime).run(["item_id", "score"], feed))
    (items, scores), (first_items, first_scores) = answers
    assert np.array_equal(scores, first_scores)
    # Slots left over at -inf hold any item.
    assert np.array_equal(np.where(scores == -np.inf, -1, items), np.where(scores == -np.inf, -1, first_items))


def test_large_requests_scan_and_small_ones_do_not(tmp_path):
    """Both branches are taken, as the profile of what ran says."""
    rng = np.random.default_rng(0)
    maps = plain_map(np.zeros((3, 1), int), 2, "graph"), plain_map(rng.integers(0, 50, (2000, 1)), 51, "graph")
    model = MatrixFactorization(*maps, 4, item_bias=True, seed=0)
    graph = retrieval_graph(
        model, *maps, Vocabulary(np.arange(3)), Vocabulary(np.arange(2000)), "float32", "materialized"
    )
    for k, n_exclude, ran in (
        (5, 0, "bounds"),
        (5, 2, "bounds"),
        (1500, 0, "masked_scores"),
        (5, 400, "masked_scores"),
    ):
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix, options.log_severity_level = True, str(tmp_path / "p"), 3
        loaded = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"user_id": np.arange(1), "k": np.array(k), "exclude_item_id": np.arange(n_exclude)[None]}
        loaded.run(["item_id"], feed | {"candidate_item_id": np.empty((1, 0), np.int64)})
        with open(loaded.end_profiling()) as file:
            profile = file.read()
        assert f'"{ran}_kernel_time"' in profile
        assert ('"bounds_kernel_time"' in profile) != ('"masked_scores_kernel_time"' in profile)
