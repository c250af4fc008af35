"""What a run logs to MLflow: the log, test metrics, and the bundle."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.errors import TrackingError
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import Step, is_up_to_date
from pipeline.storage.uris import uri_of_copy
from pipeline.task import Task
from pipeline.tracking.store import Store, connect, has_undelivered
from pipeline.tracking.tracker import Tracker

# Settings that decide which interactions are in train.
SPLIT = tuple(
    f"data.{name}" for name in ("split", "seed", "validation", "test", "validation_from", "test_from", "last_n")
)

_log = logging.getLogger(__name__)


def open_store(folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, store: Store | None) -> Store | None:
    """The MLflow store, connected to where something new is to be tracked, or something is left from an earlier command."""
    tracked = [step for step in steps.values() if step.name not in ("ingest", "cluster")]
    nothing_new = all(is_up_to_date(folder, step) for step in tracked)
    if not config.run.mlflow or (nothing_new and not has_undelivered(folder.path)):
        return None
    if store is not None:
        return store
    try:
        return connect(config.run.experiment, folder.path)
    except TrackingError as error:
        if not nothing_new:
            raise
        _log.warning("%s; what it should get is kept", error)
        return None


def run_name(config: RunConfig, method: str) -> str:
    """Method, model, loss and log, such as "soft mf bpr log.parquet"."""
    loss = [config.train.loss] if config.run.task == "retrieval" else []
    return " ".join([method, config.train.model, *loss, log_name(config)])


def log_dataset(tracker: Tracker, config: RunConfig, ingest: Mapping[str, Any]) -> None:
    """The log with its numbers; the digest is that of its vocabularies, its numbers and its split.

    Args:
        ingest: the result of the stage ingest.
    """
    known = _flatten(ingest)
    numbers = {
        key: value for key, value in known.items() if isinstance(value, (int, float)) and not key.startswith("seconds")
    }
    hashes = {key: value for key, value in known.items() if "hash" in key}
    split = {key: value for key, value in config.flat().items() if key in SPLIT}
    text = json.dumps(hashes | numbers | split, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    tracker.log_dataset(log_name(config), digest, uri_of_copy(config.data.path), numbers)


def log_test(tracker: Tracker, ingest: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
    """The test metrics, the parts of the log that were trained on, and every hash that says what the numbers belong to."""
    figures = {key: value for key, value in evaluated.items() if key != "trained_on"}
    tracker.log_metrics({f"test.{key}": value for key, value in _flatten(figures).items()})
    known = _flatten({"ingest": ingest}) | _flatten(evaluated)
    tags = {f"graphhash.{key}": value for key, value in known.items() if "hash" in key}
    tracker.set_tags({"graphhash.trained_on": ",".join(evaluated["trained_on"])} | tags)


def log_bundle(tracker: Tracker, folder: RunFolder, task: Task) -> None:
    """The bundle as it is, and its graph as a model of MLflow's onnx flavour with a call that works as example."""
    from pipeline.tracking.onnx_model import BUNDLE_TAG
    from serving.bundle import check_bundle
    from serving.manifest import MODEL

    bundle = folder.path / "bundle"
    manifest = check_bundle(bundle)
    call = task.example_call(manifest, folder.path / "ingest")
    tracker.log_artifact(bundle, "bundle")
    tracker.log_onnx_model(bundle / MODEL, call, {BUNDLE_TAG: manifest["manifest_sha256"]})


def log_name(config: RunConfig) -> str:
    """The last part of the log's path or URI, without a query."""
    return PurePosixPath(uri_of_copy(config.data.path).partition("?")[0]).name or "log"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flatten(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return flat
