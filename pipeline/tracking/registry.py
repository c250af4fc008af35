"""The model registry: a bundle as a version of a registered model, with an alias that only better ones get.

    register(Candidate(...), "gowalla", alias="champion", experiment="graphhash")   # then models:/gowalla@champion loads

A version carries what the next one is compared with: the metrics of its bundle, and what they were measured on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.errors import RegistryError
from pipeline.tracking.client import (
    client_of,
    current_store,
    error_code,
    no_stray_folders,
    one_at_a_time,
    one_line_errors,
    quiet,
)
from pipeline.tracking.mlflow_runs import training_run
from pipeline.tracking.onnx_model import BUNDLE_TAG, ModelCall
from pipeline.tracking.store import Store, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

DATA_TAG, METRICS_TAG = "graphhash.data", "graphhash.metrics"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A checked bundle that may become a version.

    Args:
        bundle: its folder.
        manifest: its manifest.
        metrics: the numbers among its metrics, by name.
        metric: the one that decides.
        lower_is_better: whether the lower value of it is the better one.
        call: an example, stored with the model if no run has stored it.
    """

    bundle: Path
    manifest: Mapping[str, Any]
    metrics: Mapping[str, float]
    metric: str
    lower_is_better: bool
    call: ModelCall

    @property
    def value(self) -> float:
        """The metric that decides."""
        return self.metrics[self.metric]

    @property
    def tags(self) -> dict[str, str]:
        """The tags of the version."""
        numbers = {key: value for key, value in self.metrics.items() if not isinstance(value, bool)}
        return {
            BUNDLE_TAG: self.manifest["manifest_sha256"],
            DATA_TAG: measured_on(self.manifest),
            METRICS_TAG: json.dumps(numbers)[:5000],
        }


class Before(TypedDict):
    """The version that had the alias, and its value of the metric that decides."""

    version: str
    value: float | None


class Registered(TypedDict):
    """What was registered: the version that has the alias now."""

    name: str
    version: str
    alias: str
    uri: str
    metric: str
    value: float
    before: Before | None


@one_line_errors
def register(candidate: Candidate, name: str, *, alias: str, experiment: str, force: bool = False) -> Registered:
    """Register a bundle as a new version of the model `name`, and give it the alias.

    A bundle that the store has already, in any run, is not stored again, and one that has the alias already stays as it is.

    Args:
        alias: one version has it at a time.
        experiment: where the model is stored if no run has stored it.
        force: do not compare with the version that has the alias.

    Raises:
        RegistryError: the bundle is not better than the version that has the alias, or cannot be compared with it.
        TrackingError: the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    tags = candidate.tags
    store = connect(experiment)
    with quiet(), no_stray_folders(store.uri), one_at_a_time(store.uri):
        client = client_of(store.uri)
        holder = _holder(client, name, alias)
        before: Before | None = None
        if holder is not None:
            before = {"version": str(holder.version), "value": _metrics_of(holder).get(candidate.metric)}
            if holder.tags.get(BUNDLE_TAG) == tags[BUNDLE_TAG]:
                return _registered(candidate, name, alias, str(holder.version), before)
            if not force:
                held = f"version {holder.version} of {name}, the {alias}"
                _compare(candidate, held, before["value"], is_same_data=holder.tags.get(DATA_TAG) == tags[DATA_TAG])
        model = _stored(client, tags[BUNDLE_TAG]) or _store(client, store, candidate, name)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        with current_store(store.uri):
            version = client.create_model_version(
                name, f"models:/{model.model_id}", run_id=model.source_run_id, tags=tags, model_id=model.model_id
            )
        client.set_registered_model_alias(name, alias, version.version)
    return _registered(candidate, name, alias, str(version.version), before)


def measured_on(manifest: Mapping[str, Any]) -> str:
    """What the metrics of a bundle were measured on, as a text that is equal for the same log, split in the same way."""
    data = manifest["provenance"].get("data") or manifest.get("vocabulary_hashes")
    return json.dumps(data, sort_keys=True)


def _registered(candidate: Candidate, name: str, alias: str, version: str, before: Before | None) -> Registered:
    return {
        "name": name,
        "version": version,
        "alias": alias,
        "uri": f"models:/{name}@{alias}",
        "metric": candidate.metric,
        "value": candidate.value,
        "before": before,
    }


def _holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has the alias, if any."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # The registry calls an alias that is not there an invalid value, and a model that is not there missing.
        if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _metrics_of(version: ModelVersion) -> dict[str, float]:
    try:
        return dict(json.loads(version.tags[METRICS_TAG]))
    except (KeyError, ValueError, TypeError):
        return {}


def _compare(candidate: Candidate, held: str, old: float | None, *, is_same_data: bool) -> None:
    """Raise RegistryError unless the candidate is known to be no worse than the version that has the alias."""
    metric, value = candidate.metric, candidate.value
    if old is None:
        raise RegistryError(f"{held}, carries no {metric} to compare with; --force registers the bundle all the same")
    if not is_same_data:
        raise RegistryError(
            f"{held}, was measured on another log or split ({metric} {old:.4f} there, {value:.4f} here), so neither is known to be "
            "better; train both on the same data, or --force"
        )
    if (value > old) if candidate.lower_is_better else (value < old):
        raise RegistryError(
            f"{metric} is {value:.4f}, and {held}, has {old:.4f}; --force registers the bundle all the same"
        )


def _stored(client: MlflowClient, bundle_hash: str) -> LoggedModel | None:
    """The logged model of a bundle, if a run has stored it."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_logged_models(
        experiments, filter_string=f"tags.`{BUNDLE_TAG}` = '{bundle_hash}'", max_results=10
    )
    return next((model for model in found if str(model.status) == "READY"), None)


def _store(client: MlflowClient, store: Store, candidate: Candidate, name: str) -> LoggedModel:
    """Store the bundle and its graph in a run that is made for it."""
    from serving.manifest import MODEL

    bundle_hash = candidate.tags[BUNDLE_TAG]
    with training_run(store, f"register {name}", {}) as tracker:
        tracker.log_metrics({f"test.{key}": value for key, value in candidate.manifest["metrics"].items()})
        tracker.log_artifact(candidate.bundle, "bundle")
        tracker.log_onnx_model(candidate.bundle / MODEL, candidate.call, {BUNDLE_TAG: bundle_hash})
    model = _stored(client, bundle_hash)
    assert model is not None, "a model that was logged is found"
    return model
