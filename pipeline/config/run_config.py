"""The configuration of a run: a section per stage (`pipeline.config.sections`), all of them in `RunConfig`.

A run is configured by, from weak to strong: the sections' defaults, TOML files, command-line options, and
`section.key=value` overrides. The values are validated once, after all of these are merged: a wrong type, an impossible value, a
contradiction or an unknown key raises `ConfigError` in one line that names the key, the value and the remedy.

    config = RunConfig.load(Path("run.toml"), ["train.epochs=50"], **{"data.path": "log.parquet", "run.out": "out"})

This module reads no data and imports nothing heavy. Whether a method or a column exists is known to the stage
that uses it.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from pipeline.config.choices import (
    CLUSTER_METHODS,
    CTR_FORMATS,
    CTR_MODELS,
    FORMATS,
    HOPS,
    ID_KINDS,
    LOSSES,
    MODELS,
    PRECISIONS,
    RUNTIMES,
    TASKS,
)
from pipeline.config.cluster import BUDGET_KEYS, ClusterConfig
from pipeline.config.data import DataConfig
from pipeline.config.keys import check_key, check_value, keys, parse_override
from pipeline.config.sections import SECTIONS, TASK_DEFAULTS, EvaluateConfig, ExportConfig, JobConfig, MapConfig
from pipeline.config.task_checks import check_task
from pipeline.config.toml_file import read_toml, write_toml
from pipeline.config.train import TrainConfig
from pipeline.config.validation import STRICT, one_line_errors
from pipeline.errors import ConfigError

__all__ = [
    "BUDGET_KEYS",
    "CLUSTER_METHODS",
    "CTR_FORMATS",
    "CTR_MODELS",
    "FORMATS",
    "HOPS",
    "ID_KINDS",
    "LOSSES",
    "MODELS",
    "PRECISIONS",
    "RUNTIMES",
    "SECTIONS",
    "TASKS",
    "TASK_DEFAULTS",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "JobConfig",
    "MapConfig",
    "RunConfig",
    "TrainConfig",
    "keys",
    "parse_override",
]


@one_line_errors("")
@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """All settings of a run. The field names are the sections of the TOML file."""

    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    map: MapConfig = field(default_factory=MapConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    run: JobConfig = field(default_factory=JobConfig)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_task(self)
        return self

    @classmethod
    def load(
        cls,
        toml_path: Path | str | Sequence[Path | str] | None,
        overrides: Sequence[str] = (),
        *,
        defaults: Mapping[str, Any] = types.MappingProxyType({}),
        **cli: Any,
    ) -> RunConfig:
        """Defaults < TOML file(s) < command-line options < `section.key=value` overrides.

        Args:
            toml_path: one file, several (later ones are stronger), or None.
            overrides: texts such as `train.epochs=50`; `none` unsets a key, a list is written `a,b`.
            defaults: by dotted key, of what is read; stronger than the defaults of the sections.
            cli: options by dotted key, `**{"data.path": "log.csv"}`; None stands for "not given".

        Raises:
            ConfigError: unreadable file, unknown key, wrong type, impossible value.
        """
        paths = [] if toml_path is None else [toml_path] if isinstance(toml_path, (str, Path)) else list(toml_path)
        layers: list[tuple[Path | str | None, Mapping[str, Any]]] = [(None, defaults)]
        layers += [(path, read_toml(Path(path))) for path in paths]
        layers.append((None, {key: value for key, value in cli.items() if value is not None}))
        layers.append((None, dict(parse_override(text) for text in overrides)))
        settings: dict[str, Any] = {}
        files: dict[str, Path | str | None] = {}
        for path, layer in layers:
            # A budget in a stronger layer replaces the weaker layer's budget, whichever kind that was.
            if any(layer.get(f"cluster.{key}") is not None for key in BUDGET_KEYS):
                for key in BUDGET_KEYS:
                    settings.pop(f"cluster.{key}", None)
            settings |= layer
            files |= dict.fromkeys(layer, path)
        try:
            return cls.from_flat(settings)
        except ConfigError as error:
            # Where all settings that the message names are of one file, it names the file as well.
            named = {files[key] for key in keys() if key in files and re.search(rf"\b{re.escape(key)}\b", str(error))}
            file = named.pop() if len(named) == 1 else None
            raise ConfigError(f"{file}: {error}" if file is not None else str(error)) from None

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> RunConfig:
        """Make a configuration from dotted keys, `{"train.dim": 16}`; what is absent keeps its default."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in {**TASK_DEFAULTS.get(settings.get("run.task", ""), {}), **settings}.items():
            check_key(key)
            check_value(key, value)
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = tuple(value) if isinstance(value, list) else value
        return cls(**{section: SECTIONS[section](**values) for section, values in sections.items()})

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted key, in the order of the sections. What MLflow logs."""
        return {key: getattr(getattr(self, section), name) for key in keys() for section, name in [key.split(".")]}

    def to_toml(self) -> str:
        """The resolved configuration as TOML; `RunConfig.load` reads it back to an equal value. None is left out."""
        return write_toml(self.flat().items())
