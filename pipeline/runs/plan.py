"""What a run will do: its stages, and the key of each, which follows from its settings and the keys of the stages before it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.run_config import CLICK_KEYS, RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.folder import fingerprint, stage_key
from pipeline.runs.tasks import check_exportable, task_of

STAGES = ("ingest", "cluster", "train", "evaluate", "export", "report")
# Raised by one when a stage's output changes without a change of settings; every folder is then made anew.
VERSIONS = {"ingest": 1, "cluster": 5, "train": 7, "evaluate": 3, "export": 6}
CLICK_TRAIN_KEYS = ("hidden", "dropout", "n_cross", "structure", "score")


@dataclass(frozen=True)
class Step:
    """One stage of one run, as planned: what its output depends on."""

    name: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]

    @property
    def key(self) -> str:
        return stage_key(self.name, self.settings, self.inputs)


def check_methods(methods: Sequence[str], task: str = "retrieval") -> None:
    """Raise ConfigError if one of the names is no method's, or not of this task."""
    from pipeline.maps.methods import METHODS

    for method in methods:
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"unknown method {method!r}; {hint}methods are {', '.join(METHODS)}")
        if method == "lsh" and task == "ctr":
            raise ConfigError(
                "method 'lsh' needs features of users and items, which run.task=ctr has none of; use lsh_structure"
            )


def plan(config: RunConfig, until: str, log: str | None = None) -> dict[str, Step]:
    """The stages up to `until` with their settings and inputs, by name, in order.

    Args:
        log: fingerprint of the log's files, where it is known; None: they are looked at.

    Raises:
        DataError: there is no data at `data.path`, or there are no features where a method needs some.
        ConfigError: such features are not named.
    """
    from pipeline.logs.features import feature_files

    settings = {
        section: dataclasses.asdict(getattr(config, section)) for section in ("data", "cluster", "map", "train")
    }
    # Where the data lies, and with how many threads it is clustered, changes no output. Features are read by one method alone.
    for key in ("path", "user_features", "item_features"):
        settings["data"].pop(key)
    if config.run.task == "retrieval":
        for key in CLICK_KEYS:
            settings["data"].pop(key)
        for key in CLICK_TRAIN_KEYS:
            settings["train"].pop(key)
    else:
        # What the schema file says counts, and not where it lies.
        settings["data"] |= {"schema": config.data.schema is not None, "task": config.run.task}
    for key in ("threads", "shards"):
        settings["cluster"].pop(key)
    # More workers change figures as another seed does, and no more.
    for key in ("workers", "checkpoint_seconds", "propagation"):
        settings["train"].pop(key)
    if config.cluster.budget[0] == "ratio":
        # How many rows a share of the bytes is depends on what else takes bytes.
        settings["cluster"]["bytes"] = [
            config.train.dim,
            config.map.indices_per_id,
            config.map.item_bias,
            config.map.hops,
            config.train.loss,
            config.train.model,
            *((method, config.precision_of(method)) for method in config.run.methods),
        ]
        if config.run.task == "ctr":
            settings["cluster"]["bytes"] += [getattr(config.train, key) for key in CLICK_TRAIN_KEYS]
    steps: dict[str, Step] = {}

    def add(stage: str, name: str, values: Mapping[str, Any], *inputs: str) -> Step:
        steps[name] = Step(name, {"version": VERSIONS[stage], **values}, inputs)
        return steps[name]

    reached = STAGES.index(until)
    exports = reached >= STAGES.index("export")
    if exports:
        check_exportable(config)
    if log is None:
        log = fingerprint(task_of(config).log_files(config))
    ingest = add("ingest", "ingest", settings["data"], log)
    if reached >= STAGES.index("cluster"):
        cluster = add("cluster", "cluster", settings["cluster"], ingest.key)
    if reached >= STAGES.index("train"):
        for i, method in enumerate(config.run.methods):
            values = {"method": method, "map": settings["map"], "train": settings["train"]}
            features = [fingerprint([file]) for file in feature_files(config.data)] if method == "lsh" else []
            train = add("train", f"train {method}", values, ingest.key, cluster.key, *features)
            if reached >= STAGES.index("evaluate"):
                # The test rounds the tables as the export does.
                tested = {"precision": config.precision_of(method)}
                evaluate = add("evaluate", f"evaluate {method}", tested, train.key)
            if exports and i == 0:
                steps["export"] = export_step(config, method, train.key, evaluate.key)
    return steps


def export_step(config: RunConfig, method: str, train: str, evaluate: str) -> Step:
    """The export of a method, with the ids that updates have folded in since that training.

    Args:
        train, evaluate: keys of these stages.
    """
    from pipeline.retrieval.folded_in import folded_in_id

    values = dataclasses.asdict(config.export) | {"precision": config.precision_of(method)}
    folded_in = folded_in_id(Path(config.run.out), method, train)
    inputs = (train, evaluate) if folded_in is None else (train, evaluate, folded_in)
    return Step("export", {"version": VERSIONS["export"], **values}, inputs)


def steps_of(steps: Mapping[str, Step], config: RunConfig, method: str) -> list[Step]:
    """The steps of one method, of those that are planned."""
    names = [f"train {method}", f"evaluate {method}"]
    if method == config.run.methods[0]:
        names.append("export")
    return [steps[name] for name in names if name in steps]
