"""The refit stage: once the best epoch is known, a training on train and validation together, for as many epochs.

Its model is the one that is tested and exported. Seed, batches, learning rates and weight decay are those of the training whose epochs were
chosen: epoch by epoch the same schedule, which ends at the best epoch, without validation. Ids, rows and communities are those of train, as
the epochs were chosen for them and the budget in bytes was planned with them; what a map says of an id's interactions (mixtures, degrees)
is of train and validation. The test is never read. Files (``RUN/refit/<method>/``): as ``pipeline.retrieval.train`` has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.maps.methods import METHODS
from pipeline.retrieval.derived import derive_method
from pipeline.retrieval.train import fit_method
from pipeline.task import REFIT_PARTS, StageContext
from pipeline.training.job import TrainingSession


def refit_method(context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
    """Train a method on train and validation, and write its files into ``out``.

    Returns: as :func:`pipeline.retrieval.train.train_method`, without a validation score.

    Raises:
        DataError: training failed; the message says why.
    """
    if (trained_as := METHODS[method].trained_as) is not None:
        return derive_method(context, method, context.model_dir(trained_as), out)
    history = json.loads((context.method_dir(method) / "history.json").read_text(encoding="utf-8"))
    return fit_method(context, method, REFIT_PARTS, out, session, history["best_epoch"])
