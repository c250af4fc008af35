"""What a run will do: its stages and their keys. A key follows from the settings that a stage reads and the keys of earlier stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphhash.errors import did_you_mean
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.fingerprints import FileHashes
from pipeline.runs.folder import RunFolder, stage_key
from pipeline.runs.tasks import TASKS, task_of
from pipeline.task import model_stage, refits

STAGES = ("ingest", "cluster", "train", "evaluate", "export", "report")
# Raised by one when a stage's output changes without a change of settings; every folder is then made anew.
VERSIONS = {"ingest": 1, "cluster": 5, "train": 10, "refit": 1, "evaluate": 6, "export": 7}
# Names of inputs that are files, as messages call them.
LOG, UPDATES = "the log", "what updates added"


@dataclass(frozen=True)
class Step:
    """One stage of one run, as planned.

    Args:
        name: unique in the run, such as `train soft`.
        settings: what the output depends on, by dotted key; JSON values.
        inputs: keys of earlier stages and fingerprints of files, by name.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        return stage_key(self.name, self.settings, self.inputs)


def check_methods(methods: Sequence[str], task: str | None = "retrieval") -> None:
    """Raise ConfigError for an unknown method, or one that the task, if there is one, does not support."""
    from pipeline.maps.methods import METHODS

    for method in methods:
        if method not in METHODS:
            hint = did_you_mean(method, METHODS)
            raise ConfigError(f"unknown method {method!r}; {hint}methods are {', '.join(METHODS)}")
    if task is not None:
        TASKS[task].check_methods(methods)


def plan(config: RunConfig, until: str, log: str | None = None, *, hashes: FileHashes | None = None) -> dict[str, Step]:
    """The stages up to `until` with their settings and inputs, by name, in order.

    Args:
        log: fingerprint of the log's files; None: they are hashed, unless their hashes are known.
        hashes: known hashes of files; None: those in the run folder.

    Raises:
        DataError: there is no data at `data.path`, or there are no features where a method needs some.
        ConfigError: such features are not named, or a model cannot be exported as configured.
    """
    task, reached = task_of(config), STAGES.index(until)
    exports = reached >= STAGES.index("export")
    if exports:
        task.check_exportable(config)
    hashes = FileHashes(Path(config.run.out)) if hashes is None else hashes
    steps: dict[str, Step] = {}

    def add(stage: str, name: str, inputs: Mapping[str, str], method: str = "") -> Step:
        settings = {"version": VERSIONS[stage], **task.settings(stage, config, method)}
        steps[name] = Step(name, settings, inputs)
        return steps[name]

    log = hashes.fingerprint(task.log_files(config)) if log is None else log
    ingest = add("ingest", "ingest", {LOG: log})
    if reached >= STAGES.index("cluster"):
        cluster = add("cluster", "cluster", {"ingest": ingest.key})

    def add_training(method: str) -> Step:
        inputs = {"ingest": ingest.key}
        inputs |= {"cluster": cluster.key} if task.needs_clusters(config, method) else {}
        if (trained := task.trained_as(method)) is not None:
            inputs[f"train {trained}"] = add_training(trained).key
        inputs |= {name: hashes.fingerprint([file]) for name, file in task.method_files(config, method).items()}
        return add("train", f"train {method}", inputs, method)

    def add_refit(method: str) -> Step:
        inputs = {f"train {method}": steps[f"train {method}"].key}
        if (trained := task.trained_as(method)) is not None:
            inputs[f"refit {trained}"] = add_refit(trained).key
        return add("refit", f"refit {method}", inputs, method)

    for number, method in enumerate(config.run.methods if reached >= STAGES.index("train") else ()):
        model = add_training(method)
        if refits(config):
            model = add_refit(method)
        if reached >= STAGES.index("evaluate"):
            evaluate = add("evaluate", f"evaluate {method}", {model.name: model.key}, method)
        if exports and number == 0:
            steps["export"] = export_step(config, method, model.key, evaluate.key)
    hashes.save()
    return steps


def export_step(config: RunConfig, method: str, model: str, evaluate: str) -> Step:
    """The export of a method, with the ids that updates have added to its model.

    Args:
        model, evaluate: keys of the stage that made the model (``pipeline.task.model_stage``), and of the evaluation.
    """
    task = task_of(config)
    settings = {"version": VERSIONS["export"], **task.settings("export", config, method)}
    inputs = {model_stage(config, method): model, f"evaluate {method}": evaluate}
    if (updates := task.updates(Path(config.run.out), method, model)) is not None:
        inputs[UPDATES] = updates
    return Step("export", settings, inputs)


def steps_of(steps: Mapping[str, Step], config: RunConfig, method: str) -> list[Step]:
    """The steps of one method, of those that are planned."""
    names = [f"train {method}", f"refit {method}", f"evaluate {method}"]
    if method == config.run.methods[0]:
        names.append("export")
    return [steps[name] for name in names if name in steps]


def is_up_to_date(folder: RunFolder, step: Step) -> bool:
    """Whether a stage need not be computed."""
    return folder.would_skip(step.name, step.settings, step.inputs)


def reasons(folder: RunFolder, step: Step) -> list[str]:
    """Why a stage has to be computed, such as "train.lr changed 0.04 -> 0.02"; empty where it is up to date."""
    return folder.reasons(step.name, step.settings, step.inputs)


def root_reasons(folder: RunFolder, steps: Mapping[str, Step], name: str) -> list[str]:
    """As :func:`reasons`, with those of earlier stages in place of "... changed"."""
    found: list[str] = []
    for reason in reasons(folder, steps[name]):
        earlier = reason.removesuffix(" changed")
        roots = root_reasons(folder, steps, earlier) if earlier in steps else []
        found += [root for root in roots or [reason] if root not in found]
    return found


def describe_plan(folder: RunFolder, steps: Mapping[str, Step]) -> list[str]:
    """One line per stage: why it would be computed, or that it is up to date."""
    return [f"{name}: {'; '.join(reasons(folder, step)) or 'up to date'}" for name, step in steps.items()]
