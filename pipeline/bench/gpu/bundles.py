"""A bundle answered by ONNX Runtime on CUDA beside ONNX Runtime on the CPU."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from graphhash.graph.vocabulary import Vocabulary
from pipeline.bench.gpu.data import Data
from pipeline.retrieval.models import ModelSpec

N_REQUESTS, N_USERS, K = 20, 64, 20


def compare_runtimes(data: Data, dim: int, provider: str) -> dict[str, Any]:
    """Scores and times of the same requests.

    Args:
        provider: "cuda", or "cpu" to run this function where there is no GPU.

    Returns: ``skipped`` with the reason, or ``provider``, ``difference`` (largest one of the scores, over the largest score),
        ``same_items`` (share of the places with the same item), ``ms`` and ``cpu_ms`` (medians of a request for N_USERS users).
    """
    try:
        from pipeline.retrieval.export import ExportOptions, TrainedRetrieval, export_retrieval
        from serving.retriever import Retriever
        from serving.session import knows_cuda
    except ImportError as error:
        return {"skipped": f"{error.name or error} is not installed"}
    if provider == "cuda" and not knows_cuda():
        return {"skipped": "ONNX Runtime has no CUDA here; install onnxruntime-gpu"}
    users, items = data.maps("soft")
    model = ModelSpec("mf", dim, True, 0, 0, std=0.1).build(users, items, None)
    vocabularies = [Vocabulary(np.arange(n)) for n in data.graph.shape]
    with tempfile.TemporaryDirectory(prefix="graphhash-gpu-") as folder:
        trained = TrainedRetrieval(model, users, items, *vocabularies)
        export_retrieval(trained, Path(folder) / "bundle", ExportOptions(), metrics={}, provenance={"run": "gpu check"})
        rng = np.random.default_rng(0)
        requests = [rng.integers(0, data.graph.shape[0], N_USERS) for _ in range(N_REQUESTS)]
        (expected, cpu_ms), (found, ms) = (
            _answers(Retriever(Path(folder) / "bundle", name), requests)  # type: ignore[arg-type]  # A name that it knows.
            for name in ("cpu", provider)
        )
    scores = np.stack([e.scores for e in expected]), np.stack([f.scores for f in found])
    same = [np.mean(np.asarray(e.item_ids) == np.asarray(f.item_ids)) for e, f in zip(expected, found, strict=True)]
    return {
        "provider": provider,
        "difference": float(np.abs(scores[0] - scores[1]).max() / np.abs(scores[0]).max()),
        "same_items": float(np.mean(same)),
        "ms": ms,
        "cpu_ms": cpu_ms,
    }


def _answers(retriever: Any, requests: list[Any]) -> tuple[list[Any], float]:
    """Answers, and the median of milliseconds."""
    retriever.warm_up()
    answers, seconds = [], []
    for users in requests:
        start = time.perf_counter()
        answers.append(retriever.recommend(users, K))
        seconds.append(time.perf_counter() - start)
    return answers, 1000 * statistics.median(seconds)
