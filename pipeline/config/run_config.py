"""The configuration of a run: a section per stage (`pipeline.config.sections`), all of them in `RunConfig`.

A run is configured by, from weak to strong: the sections' defaults, TOML files, command-line options, and
`section.key=value` overrides. Every value is checked where it is made: a wrong type, an impossible value, a
contradiction or an unknown key raises `ConfigError` in one line that names the key, the value and the remedy.

    config = RunConfig.load(Path("run.toml"), ["train.epochs=50"], **{"data.path": "log.parquet", "run.out": "out"})

This module reads no data and imports nothing heavy. Whether a method or a column exists is known to the stage
that uses it.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.checks import describe, kinds_of, toml_value
from pipeline.config.sections import (
    BUDGET_KEYS,
    CLICK_FORMATS,
    CLICK_KEYS,
    CLUSTER_METHODS,
    CTR_MODELS,
    DEFAULT_RATIO,
    FORMATS,
    HOPS,
    LOSSES,
    MODELS,
    PRECISIONS,
    RUNTIMES,
    SECTIONS,
    TASK_DEFAULTS,
    TASKS,
    ClusterConfig,
    DataConfig,
    ExportConfig,
    JobConfig,
    MapConfig,
    TrainConfig,
)
from pipeline.errors import ConfigError

__all__ = [
    "BUDGET_KEYS",
    "CLICK_FORMATS",
    "CLICK_KEYS",
    "CLUSTER_METHODS",
    "CTR_MODELS",
    "ClusterConfig",
    "DEFAULT_RATIO",
    "DataConfig",
    "ExportConfig",
    "FORMATS",
    "HOPS",
    "JobConfig",
    "LOSSES",
    "MODELS",
    "MapConfig",
    "PRECISIONS",
    "RUNTIMES",
    "RunConfig",
    "SECTIONS",
    "TASKS",
    "TASK_DEFAULTS",
    "TrainConfig",
    "keys",
    "parse_override",
]


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. The field names are the sections of the TOML file."""

    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    map: MapConfig = field(default_factory=MapConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    run: JobConfig = field(default_factory=JobConfig)

    def __post_init__(self) -> None:
        ours = CTR_MODELS if self.run.task == "ctr" else MODELS
        if self.train.model not in ours:
            raise ConfigError(
                f"train.model={self.train.model} is not of run.task={self.run.task}; use {', '.join(ours)}, or another task"
            )
        if self.run.task == "ctr":
            self._check_ctr()
        elif self.data.format in CLICK_FORMATS or self.data.schema or self.data.label_column:
            what = f"format={self.data.format}" if self.data.format in CLICK_FORMATS else "schema and data.label_column"
            raise ConfigError(f"data.{what} is of a log of clicks; add run.task=ctr (--task ctr), or leave it out")
        if self.map.item_bias and self.train.loss == "directau":
            raise ConfigError(
                "map.item_bias=true has no part in train.loss=directau, which compares vectors; leave it out"
            )

    def _check_ctr(self) -> None:
        for key, value in (("data.weight_column", self.data.weight_column), ("data.user_features", self.data.user_features),
                           ("cluster.user_rows", self.cluster.user_rows)):  # fmt: skip
            if value is not None:
                raise ConfigError(f"{key}={value} has no part in run.task=ctr; leave it out")
        if self.train.loss != "bpr":
            raise ConfigError(
                f"train.loss={self.train.loss} has no part in run.task=ctr, whose loss is binary cross-entropy; leave it out"
            )
        if self.data.bad_rows != "error":
            raise ConfigError(
                f"data.bad_rows={self.data.bad_rows} has no part in run.task=ctr, which stops at a bad row; leave it out"
            )
        if self.cluster.shards or self.cluster.levels:
            raise ConfigError("cluster.shards and cluster.levels have no part in run.task=ctr; leave them out")
        if self.cluster.method == "balanced" and all(getattr(self.cluster, key) is None for key in BUDGET_KEYS):
            raise ConfigError("cluster.method=balanced stops at a budget; give rows or ratio")

    def precision_of(self, method: str) -> str:
        """Type of a method's stored tables: one of PRECISIONS but "auto", which is what the run was planned for."""
        chosen = self.export.precision
        return self._precision(method, (self.cluster.budget_precision or chosen) if chosen == "auto" else chosen)

    def planned_precision_of(self, method: str) -> str:
        """Type of a method's tables in which a byte budget counts rows."""
        return self._precision(method, self.cluster.budget_precision or self.export.precision)

    def _precision(self, method: str, chosen: str) -> str:
        if chosen != "auto":
            return chosen
        if method == "full":
            return "float32"
        averaged = method in ("soft", "double_soft") and self.run.task == "retrieval" and self.train.model != "lightgcn"
        return "int4" if averaged else "int8"

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
            defaults: by dotted key, of what is read; stronger than the defaults of this module.
            cli: options by dotted key, `**{"data.path": "log.csv"}`; None stands for "not given".

        Raises:
            ConfigError: unreadable file, unknown key, wrong type, impossible value.
        """
        paths = [] if toml_path is None else [toml_path] if isinstance(toml_path, (str, Path)) else list(toml_path)
        layers = [_read_toml(Path(path)) for path in paths]
        layers.append({key: value for key, value in cli.items() if value is not None})
        layers.append(dict(parse_override(text) for text in overrides))
        settings: dict[str, Any] = dict(defaults)
        for layer in layers:
            # A budget in a stronger layer replaces the weaker layer's budget, whichever kind that was.
            if any(layer.get(f"cluster.{key}") is not None for key in BUDGET_KEYS):
                for key in BUDGET_KEYS:
                    settings.pop(f"cluster.{key}", None)
            settings |= layer
        return cls.from_flat(settings)

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> RunConfig:
        """Make a configuration from dotted keys, `{"train.dim": 16}`; what is absent keeps its default."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in {**TASK_DEFAULTS.get(settings.get("run.task", ""), {}), **settings}.items():
            _check_key(key)
            section, name = key.split(".")
            if isinstance(value, list):
                value = tuple(value)
            sections.setdefault(section, {})[name] = value
        return cls(**{section: SECTIONS[section](**values) for section, values in sections.items()})

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted key, in the order of this file. What MLflow logs."""
        return {
            f"{section}.{f.name}": getattr(getattr(self, section), f.name)
            for section, kind in SECTIONS.items()
            for f in dataclasses.fields(kind)
        }

    def to_toml(self) -> str:
        """The resolved configuration as TOML; `RunConfig.load` reads it back to an equal value. None is left out."""
        lines = []
        for section, kind in SECTIONS.items():
            lines.append(f"[{section}]")
            for f in dataclasses.fields(kind):
                value = getattr(getattr(self, section), f.name)
                if value is not None:
                    lines.append(f"{f.name} = {toml_value(value)}")
            lines.append("")
        return "\n".join(lines)


def keys() -> list[str]:
    """Every dotted key, such as `train.lr`."""
    return [f"{section}.{f.name}" for section, kind in SECTIONS.items() for f in dataclasses.fields(kind)]


def parse_override(text: str) -> tuple[str, Any]:
    """`train.lr=0.01` -> ("train.lr", 0.01), read as the key's own type.

    Raises:
        ConfigError: no `=`, unknown key, or a value that is not of the key's type.
    """
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not separator:
        raise ConfigError(f"{text!r} is no override; write section.key=value, such as train.epochs=50")
    _check_key(key)
    section, name = key.split(".")
    kinds = kinds_of(SECTIONS[section])[name]
    if types.NoneType in kinds and value.lower() in ("none", "null", ""):
        return key, None
    if tuple in kinds:
        return key, tuple(part.strip() for part in value.strip("[]").split(",") if part.strip())
    if str in kinds:
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if bool in kinds and value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return key, kind(value)
            except ValueError:
                pass
    raise ConfigError(f"{key}={value!r} is not {describe(kinds)}")


def _check_key(key: str) -> None:
    known = keys()
    if key in known:
        return
    by_name = [k for k in known if k.split(".")[1] == key.split(".")[-1]]
    names = {k.split(".")[1]: k for k in known}
    close = by_name or difflib.get_close_matches(key, known, 1, 0.6)
    close = close or [names[name] for name in difflib.get_close_matches(key.split(".")[-1], names, 1, 0.6)]
    remedy = f"did you mean {' or '.join(close)}?" if close else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"unknown key {key!r}; {remedy}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: key {section!r} stands outside any section; write it under [{'], ['.join(SECTIONS)}]"
            )
        flat |= {f"{section}.{name}": value for name, value in values.items()}
    try:
        # The file is checked alone, so that an error in it is reported under its name.
        RunConfig.from_flat(flat)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return flat
