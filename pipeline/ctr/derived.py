"""Methods of CTR that store trained full tables otherwise: in small types, or as product codes. Nothing is trained for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphhash.errors import ArgumentError, DataError
from pipeline.ctr.cluster import clustering_labels
from pipeline.ctr.data import Features
from pipeline.ctr.method_spec import method_spec
from pipeline.ctr.stored_otherwise import with_embeddings
from pipeline.ctr.weights import load_ctr, save_ctr
from pipeline.maps.derived import take_over
from pipeline.maps.methods import METHODS
from pipeline.task import StageContext


def derive_ctr(context: StageContext, method: str, source: Path, out: Path) -> dict[str, Any]:
    """The files of a method (``pipeline.ctr.train``) from those of the one that it is trained as.

    Args:
        source: folder of that one's training, or of its refit.

    Returns: what the training returned, and ``trained_as`` and ``compressed``.

    Raises:
        DataError: the budget is too small for its codes, or FAISS is missing.
    """
    spec, features = METHODS[method], Features.open(context.ingest_dir)
    assert spec.trained_as is not None
    files = [Path("maps") / f"{number:02d}.npz" for number in range(len(features.all_columns))]
    files += [Path("checkpoint") / "model.npz"] if spec.embedding == "bucket" else []
    facts = take_over(spec.trained_as, source, out, files)
    if spec.embedding != "bucket":
        coded = method_spec(context.config, features, method, clustering_labels(context.cluster_dir)).embeddings
        try:
            save_ctr(with_embeddings(load_ctr(source, context.ingest_dir).model, coded), out)
        except ArgumentError as error:
            raise DataError(f"method {method!r}: {error}") from error
    return facts
