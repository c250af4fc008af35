"""The tasks: what a run computes in each stage, and how it is measured.

The order of the stages, the run folder, tracking, comparison and search are the same for all; what differs is here. Nothing heavy is
imported before a stage needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import DEFAULT_RATIO, RunConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.retrieval.train import FitJob
    from pipeline.tracking.tracker import Tracker
    from pipeline.training.checkpoints import CheckpointManager


@dataclass(frozen=True)
class Measure:
    """A figure of the test, as tables name it.

    Args:
        key: in metrics.  title: of a column.  words: on a picture's axis.
        higher_is_better: None where neither is, and the best value is 1.
    """

    key: str
    title: str
    words: str
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class Task:
    """One way of using compressed tables.

    Args:
        name: as in ``pipeline.config.run_config.JobConfig``.
        models: settings of a model by the name that a comparison gives it; the first is the default.
        measures: of the test, the most important first, which is drawn.
        score: the validation metric that training raises, and that a search compares by.
        budgets: of a comparison that is given none, as (kind, value).
        about_bytes: what the bytes of a comparison's table are.
        log_files: all that decides what is ingested.
        ingest, cluster, train, evaluate: of the stages; they fill the folder they are given and return facts.
        report: draws and writes, and returns the files.
        defaults: learning rate and decay of a method, unless told otherwise, by dotted key.
    """

    name: str
    models: Mapping[str, Mapping[str, str]]
    measures: tuple[Measure, ...]
    score: str
    budgets: tuple[tuple[str, float], ...]
    about_bytes: str
    log_files: Callable[[RunConfig], list[Path]]
    ingest: Callable[[RunConfig, Path], dict[str, Any]]
    cluster: Callable[[RunConfig, Path, Path], dict[str, Any]]
    train: Callable[
        [RunConfig, str, Path, Path, Path, Tracker, FitJob | None, CheckpointManager | None, Callable[[str], None]],
        dict[str, Any],
    ]
    evaluate: Callable[[RunConfig, str, Path, Path], dict[str, Any]]
    report: Callable[[Path], list[Path]]
    defaults: Callable[[RunConfig, str], dict[str, float]]

    @property
    def main(self) -> Measure:
        """The measure that is drawn and said first."""
        return self.measures[0]

    def of_measures(self, metrics: Mapping[str, Any]) -> list[str]:
        """The measures of a training as texts; `-` for what there is not."""
        return ["-" if metrics[m.key] is None else f"{metrics[m.key]:.4f}" for m in self.measures]


def task_of(config: RunConfig) -> Task:
    """The task that the configuration names."""
    return TASKS[config.run.task]


def check_exportable(config: RunConfig) -> None:
    """Raise ConfigError where a trained model cannot become a bundle as asked."""
    if config.run.task == "ctr" and config.export.runtime == "folded":
        raise ConfigError(
            "export.runtime=folded has no part in run.task=ctr, whose tables stay as they are stored; leave it out"
        )


def _retrieval_files(config: RunConfig) -> list[Path]:
    from pipeline.logs.sources import find_sources

    return [Path(source.file) for source in find_sources(config.data.path, config.data.format, config.data.split)]


def _ingest_retrieval(config: RunConfig, out: Path) -> dict[str, Any]:
    from pipeline.retrieval.ingest import ingest

    return ingest(config.data, out)


def _cluster_retrieval(config: RunConfig, ingest_dir: Path, out: Path) -> dict[str, Any]:
    from pipeline.retrieval.cluster import cluster_run

    return cluster_run(config, ingest_dir, out)


def _train_retrieval(config: RunConfig, method: str, *how: Any) -> dict[str, Any]:
    from pipeline.retrieval.train import train_method

    *where, states = how
    return train_method(config, method, *where, states=states)


def _evaluate_retrieval(config: RunConfig, method: str, ingest_dir: Path, method_dir: Path) -> dict[str, Any]:
    from pipeline.retrieval.evaluate import evaluate_method

    return evaluate_method(config, method, ingest_dir, method_dir)


def _report_retrieval(run_dir: Path) -> list[Path]:
    from pipeline.retrieval.report import write_report

    return write_report(run_dir)


def _defaults_retrieval(config: RunConfig, method: str) -> dict[str, float]:
    from pipeline.maps.methods import METHODS
    from pipeline.retrieval.train import default_settings

    return default_settings(config.train, METHODS[method])


def _ctr_files(config: RunConfig) -> list[Path]:
    from pipeline.ctr.log import log_paths

    return log_paths(config.data)


def _ingest_ctr(config: RunConfig, out: Path) -> dict[str, Any]:
    from pipeline.ctr.ingest import ingest_ctr

    return ingest_ctr(config.data, out)


def _cluster_ctr(config: RunConfig, ingest_dir: Path, out: Path) -> dict[str, Any]:
    from pipeline.ctr.cluster import cluster_ctr

    return cluster_ctr(config, ingest_dir, out)


def _train_ctr(config: RunConfig, method: str, *how: Any) -> dict[str, Any]:
    from pipeline.ctr.train import train_ctr

    *where, states = how
    return train_ctr(config, method, *where, states=states)


def _evaluate_ctr(config: RunConfig, method: str, ingest_dir: Path, method_dir: Path) -> dict[str, Any]:
    from pipeline.ctr.evaluate import evaluate_ctr

    return evaluate_ctr(config, method, ingest_dir, method_dir)


def _report_ctr(run_dir: Path) -> list[Path]:
    from pipeline.ctr.report import write_ctr_report

    return write_ctr_report(run_dir)


def _defaults_ctr(config: RunConfig, method: str) -> dict[str, float]:
    from pipeline.ctr.models import CTR_PRESETS

    preset = CTR_PRESETS[config.train.model]
    return {"train.lr": preset.lr, "train.decay": preset.decay}


def _named(models: Sequence[str]) -> dict[str, dict[str, str]]:
    return {name: {"train.model": name} for name in models}


TASKS: dict[str, Task] = {
    "retrieval": Task(
        "retrieval",
        {
            "mf": {"train.model": "mf", "train.loss": "bpr"},
            "neumf": {"train.model": "neumf", "train.loss": "bpr"},
            "lightgcn": {"train.model": "lightgcn", "train.loss": "bpr"},
            "directau": {"train.model": "mf", "train.loss": "directau"},
            "ials": {"train.model": "mf", "train.loss": "ials"},
        },
        (
            Measure("recall@20", "recall@20", "recall@20 on the test interactions"),
            Measure("ndcg@20", "NDCG@20", "NDCG@20 on the test interactions"),
        ),
        "recall@20",
        (("ratio", DEFAULT_RATIO / 2), ("ratio", DEFAULT_RATIO)),
        "Bytes are those of everything kept (tables, bucket maps, biases, and the graph that LightGCN reads), over those of full float32 "
        "tables; recall@20 and NDCG@20 are of the test interactions.",
        _retrieval_files,
        _ingest_retrieval,
        _cluster_retrieval,
        _train_retrieval,
        _evaluate_retrieval,
        _report_retrieval,
        _defaults_retrieval,
    ),
    "ctr": Task(
        "ctr",
        _named(("dlrm", "dcnv2", "deepfm", "widedeep")),
        (
            Measure("log_loss", "log loss", "log loss on the test rows", higher_is_better=False),
            Measure("auc", "AUC", "AUC on the test rows"),
            Measure("group_auc", "group AUC", "AUC within groups"),
            Measure("calibration", "calibration", "mean prediction over mean label", higher_is_better=None),
            Measure("ece", "ECE", "expected calibration error", higher_is_better=False),
        ),
        "auc",
        (("resolution", 5.0),),
        "Bytes are those of everything kept (tables, bucket maps, first-order weights, biases and layers), over those of the model with full "
        "float32 tables; the measures are of the test rows. Calibration is the mean prediction over the mean label, ECE the expected "
        "calibration error, group AUC the mean over the groups (users).",
        _ctr_files,
        _ingest_ctr,
        _cluster_ctr,
        _train_ctr,
        _evaluate_ctr,
        _report_ctr,
        _defaults_ctr,
    ),
}
