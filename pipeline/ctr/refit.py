"""The refit stage of CTR: once the best epoch is known, a training on train and validation together, for as many epochs.

Its model is the one that is tested and exported. Seed, batch size, learning rates and weight decay are those of the training whose epochs
were chosen. Vocabularies, statistics of columns and communities are those of train; mixtures, and the folds that they are cross-fitted by,
are of train and validation. The test is never read. Files (``RUN/refit/<method>/``): as ``pipeline.ctr.train`` has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.ctr.derived import derive_ctr
from pipeline.ctr.train import fit_ctr
from pipeline.maps.methods import METHODS
from pipeline.task import REFIT_PARTS, StageContext
from pipeline.training.job import TrainingSession


def refit_ctr(context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
    """Train a method on train and validation, and write its files into ``out``.

    Returns: as :func:`pipeline.ctr.train.fit_ctr`, without validation scores.

    Raises:
        DataError: training failed; the message says why.
    """
    if (trained_as := METHODS[method].trained_as) is not None:
        return derive_ctr(context, method, context.model_dir(trained_as), out, context.method_dir(method))
    return fit_ctr(context, method, REFIT_PARTS, out, session, context.method_dir(method))
