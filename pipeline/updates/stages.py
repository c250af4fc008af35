"""The stages of a run that an update goes on from, and the bundle that it writes anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.errors import RunFolderError
from pipeline.runs.folder import RunFolder, StageResult
from pipeline.runs.plan import LOG, export_step, plan
from pipeline.runs.tasks import task_of
from pipeline.task import StageContext, model_stage


def checked_stages(config: RunConfig, method: str, folder: RunFolder) -> dict[str, StageResult]:
    """The stages that a method came from, by name, each intact and of the folder's settings.

    Raises:
        RunFolderError: the method is none of the run's, a stage is missing, or was made with other settings.
    """
    if method not in config.run.methods:
        raise RunFolderError(
            f"{folder.path}: method {method!r} is none of the run's ({', '.join(config.run.methods)}); name one of these, "
            f"or run 'graphhash run --out {folder.path} --method {method}' first"
        )
    ingest, stages = folder.current("ingest"), {}
    steps = plan(config, "evaluate", ingest.inputs.get(LOG, "") if ingest else "")
    for name in dict.fromkeys(
        ("ingest", "cluster", f"train {method}", model_stage(config, method), f"evaluate {method}")
    ):
        stage = folder.current(name)
        if stage is None or stage.key != steps[name].key:
            why = "is missing or damaged" if stage is None else "was made with other settings than the folder's"
            raise RunFolderError(
                f"{folder.path}: the stage {name!r} {why}; run 'graphhash run --out {folder.path}' first"
            )
        stages[name] = stage
    return stages


def write_bundle(config: RunConfig, method: str, folder: RunFolder, stages: Mapping[str, StageResult]) -> bool:
    """Write the bundle of a method with all that updates have added, unless it is there; whether it was written."""
    train_key = stages[model_stage(config, method)].key
    evaluated = stages[f"evaluate {method}"]
    step = export_step(config, method, train_key, evaluated.key)
    run_id = stages[f"train {method}"].result.get("mlflow_run_id")
    metrics = {"method": method, **evaluated.result, "mlflow_run_id": run_id}

    def compute(out: Path) -> dict[str, Any]:
        return task_of(config).export(StageContext(config, folder.path), method, out, metrics, train_key)

    return not folder.stage(step.name, step.settings, step.inputs, "bundle", compute).skipped
