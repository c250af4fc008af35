"""Trainings that a run folder holds: trained models are kept by commands of later stages, and unfinished ones are resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.choices import AUTO_LOSS, AUTO_METHODS
from pipeline.config.run_config import RunConfig
from pipeline.config.toml_file import CONFIG_FILE
from pipeline.errors import ConfigError
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import LOG, Step, is_up_to_date, root_reasons
from pipeline.runs.tasks import task_of
from pipeline.task import Task, budget_of

if TYPE_CHECKING:
    from pipeline.training.checkpoints import CheckpointManager


def with_recorded_budget(config: RunConfig) -> RunConfig:
    """The configuration with the rows of a byte budget planned as the finished run folder planned them.

    They depend on the precision of the tables and on the methods that share them. So the run's own precision is kept as
    `cluster.budget_precision`, and its other trained methods follow the ones that are evaluated or exported.
    """
    file = Path(config.run.out) / CONFIG_FILE
    if not file.is_file():
        return config
    recorded, changes = RunConfig.load(file), dict[str, Any]()
    precision = recorded.cluster.budget_precision or recorded.export.precision
    if config.cluster.budget_precision is None and precision != config.export.precision:
        changes["cluster.budget_precision"] = precision
    methods, folder = config.run.methods, RunFolder(config.run.out)
    if set(methods) < set(recorded.run.methods) and all(folder.current(f"train {m}") for m in recorded.run.methods):
        changes["run.methods"] = (*methods, *(m for m in recorded.run.methods if m not in methods))
    return RunConfig.from_flat(config.flat() | changes) if changes else config


def has_defaults_of_log(config: RunConfig) -> bool:
    """Whether the loss or the method follows from the ingested log."""
    return config.train.loss == AUTO_LOSS or config.run.methods == AUTO_METHODS


def with_defaults_of_ingested(config: RunConfig) -> RunConfig:
    """The configuration with the loss and the method that the ingested log decides; with the loss as it is, and with `soft`, where no log
    is ingested yet."""
    if not has_defaults_of_log(config):
        return config
    if not is_ingested(Path(config.run.out)):
        methods = ("soft",) if config.run.methods == AUTO_METHODS else config.run.methods
        return RunConfig.from_flat(config.flat() | {"run.methods": methods})
    facts = json.loads(_ingest_facts(Path(config.run.out)).read_text(encoding="utf-8"))
    return task_of(config).with_log_defaults(config, facts)


def is_ingested(out: Path) -> bool:
    """Whether a run folder holds an ingested log."""
    return _ingest_facts(out).is_file()


def _ingest_facts(out: Path) -> Path:
    return out / "ingest" / "ingest.json"


def check_keeps_trained(folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, until: str) -> None:
    """Raise ConfigError if a trained model would be replaced by a command that is there for a later stage."""
    for method, name in ((m, f"{stage} {m}") for m in config.run.methods for stage in ("train", "refit")):
        if name not in steps or folder.current(name) is None or is_up_to_date(folder, steps[name]):
            continue
        why = root_reasons(folder, steps, name)
        remedy = "run" if why == [f"{LOG} changed"] else "leave it out, or run"
        raise ConfigError(
            f"`graphhash {until}` would train {method} again: {'; '.join(why)}; {remedy} `graphhash train` first"
        )


def warnings_of_bytes(config: RunConfig, task: Task, method: str, metrics: Mapping[str, Any]) -> list[str]:
    """Lines where a method is not stored as the settings ask for: in another precision, or in more bytes than its budget has."""
    from pipeline.maps.methods import METHODS

    own, (kind, ratio) = METHODS[method], budget_of(config, task.default_budget)
    planned, stored = task.planned_precision_of(config, method), task.precision_of(config, method)
    warnings = []
    if own.fixed_precision and config.export.precision not in ("auto", stored):
        how = "codes" if own.stores_codes else stored
        warnings.append(f"{method}: stored in {how}; --precision {config.export.precision} does not change it")
    if kind != "ratio" or method == "full" or metrics["bytes_ratio"] <= ratio:
        return warnings
    above = f"{method}: {metrics['bytes_ratio']:.1%} of the full tables' bytes"
    if planned != stored:
        warnings.append(
            f"{above} in {stored}, above the budget of {ratio:.1%}: rows were planned for {planned}; "
            f"`graphhash run` with --data and --precision {stored} plans them anew"
        )
    elif own.stores_codes and config.map.codes_per_id is not None:
        warnings.append(
            f"{above}, above the budget of {ratio:.1%}: map.codes_per_id={config.map.codes_per_id} goes before it"
        )
    return warnings


def checkpoints_of(folder: RunFolder, step: Step, **facts: Any) -> CheckpointManager:
    """The checkpoints of a training, or of a refit, that is not finished; they outlive the command."""
    from pipeline.training.checkpoints import CheckpointManager

    place = step.name.removeprefix("train ").replace("refit ", "refit-")
    return CheckpointManager(folder.path / "checkpoints" / place, step.key, facts)


def check_resume(folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, resume: bool) -> None:
    """Without `resume`, forget the checkpoints; with it, make sure that there is one."""
    trainings = [steps[name] for m in config.run.methods for name in (f"train {m}", f"refit {m}") if name in steps]
    saved = [checkpoints_of(folder, step) for step in trainings if not is_up_to_date(folder, step)]
    if not resume:
        for checkpoints in saved:
            checkpoints.clear()
    elif saved and not any(checkpoints.newest() for checkpoints in saved):
        raise ConfigError(
            f"--resume: {folder.path}/checkpoints holds none of a training with these settings and data; give the settings that it was "
            "stopped with, or leave --resume out to start one"
        )
