"""Methods of CTR that store trained full tables otherwise: in small types, or as product codes. Nothing is trained for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphhash.errors import ArgumentError, DataError
from pipeline.ctr.calibration import calibrate
from pipeline.ctr.cluster import clustering_labels
from pipeline.ctr.data import Features
from pipeline.ctr.method_spec import method_spec
from pipeline.ctr.stored_otherwise import with_embeddings
from pipeline.ctr.weights import MIXTURES, load_ctr, save_ctr
from pipeline.maps.derived import take_over
from pipeline.maps.methods import METHODS
from pipeline.task import StageContext


def derive_ctr(
    context: StageContext, method: str, source: Path, out: Path, chosen: Path | None = None
) -> dict[str, Any]:
    """The files of a method (``pipeline.ctr.train``) from those of the one that it is trained as.

    Args:
        source: folder of that one's training, or of its refit.
        chosen: as for `pipeline.ctr.calibration.calibrate`. Codes have a calibration of their own, tables in small types that of full ones.

    Returns: what the training returned, and ``trained_as`` and ``compressed``.

    Raises:
        DataError: the budget is too small for its codes, or FAISS is missing.
    """
    spec, features = METHODS[method], Features.open(context.ingest_dir)
    assert spec.trained_as is not None
    maps = [Path("maps") / f"{number:02d}.npz" for number in range(len(features.all_columns))]
    if spec.embedding == "bucket":
        further = [MIXTURES] if (source / MIXTURES).exists() else []
        return take_over(spec.trained_as, source, out, [*maps, Path("checkpoint") / "model.npz", *further])
    coded = method_spec(context.config, features, method, clustering_labels(context.cluster_dir)).embeddings
    try:
        model = with_embeddings(load_ctr(source, context.ingest_dir).model, coded)
    except ArgumentError as error:
        raise DataError(f"method {method!r}: {error}") from error
    calibration = calibrate(model, context.config, features, chosen)
    save_ctr(model, out)
    return take_over(spec.trained_as, source, out, maps, calibration)
