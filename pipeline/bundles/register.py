"""A bundle into MLflow's model registry: it is checked and opened, and its task says how it compares with the version before."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.sections import EvaluateConfig
from pipeline.errors import RegistryError
from pipeline.runs.tasks import TASKS
from pipeline.tracking.registry import Candidate, Registered, register

# Of bundles whose metrics name none.
DEFAULT_CUTOFFS = EvaluateConfig().cutoffs


def register_bundle(
    bundle: Path, name: str, *, alias: str, experiment: str, metric: str | None = None, force: bool = False
) -> Registered:
    """Check a bundle, register it as a new version of the model `name`, and give it the alias.

    Args:
        alias: one version has it at a time; `champion` by custom.
        experiment: where the model is stored if no run has stored it (trained with --no-mlflow).
        metric: one of the manifest's; None: the main measure of the bundle's task.
        force: do not compare with the version that has the alias. A damaged bundle is refused all the same.

    Raises:
        BundleError: the bundle is damaged, or does not answer.
        RegistryError: it has no such metric, or is not better than the version that has the alias, or cannot be compared with it.
        TrackingError: the store cannot be reached.
    """
    from serving.bundle import check_bundle
    from serving.tasks import open_bundle

    manifest = check_bundle(bundle)
    open_bundle(bundle, provider="cpu")
    metrics = {key: value for key, value in manifest["metrics"].items() if isinstance(value, (int, float))}
    task = TASKS[manifest["task"]]
    measures = task.measures_of(manifest["metrics"].get("k", DEFAULT_CUTOFFS))
    metric = metric or measures[0].key
    if metric not in metrics:
        raise RegistryError(
            f"{bundle}: the manifest has no number for {metric!r}, but for {', '.join(metrics) or 'none'}; choose --metric"
        )
    lower_is_better = any(measure.key == metric and measure.higher_is_better is False for measure in measures)
    candidate = Candidate(bundle, manifest, metrics, metric, lower_is_better, task.example_call(manifest))
    return register(candidate, name, alias=alias, experiment=experiment, force=force)
