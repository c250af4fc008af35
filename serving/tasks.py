"""The model class of each task, and how a bundle of any task is opened."""

from __future__ import annotations

from pathlib import Path

from serving.bundle_model import Provider
from serving.errors import BundleError
from serving.manifest import task_of
from serving.retriever import Retriever
from serving.scorer import Scorer

MODEL_OF_TASK: dict[str, type[Retriever] | type[Scorer]] = {kind.task: kind for kind in (Retriever, Scorer)}


def model_class(path: Path | str) -> type[Retriever] | type[Scorer]:
    """The class that loads a bundle, by the task in its manifest; raises BundleError for a task that is not known."""
    task = task_of(path)
    if task not in MODEL_OF_TASK:
        raise BundleError(f"{path}: made for the task {task!r}, known are {', '.join(MODEL_OF_TASK)}; update graphhash")
    return MODEL_OF_TASK[task]


def open_bundle(
    path: Path | str, provider: Provider = "auto", threads: int | None = None, profile: Path | None = None
) -> Retriever | Scorer:
    """Load a bundle: a `Retriever` or a `Scorer`, by the task in its manifest. Arguments and errors are theirs."""
    return model_class(path)(path, provider, threads, profile)
