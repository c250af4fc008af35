"""What a command would do in a run folder: every stage with the reason to compute it. Nothing is computed."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.choices import AUTO_METHODS
from pipeline.config.run_config import RunConfig
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import check_methods, describe_plan, plan
from pipeline.runs.remote import Mirror
from pipeline.runs.trained import is_ingested, with_defaults_of_ingested
from pipeline.storage.uris import localised


def run_status(config: RunConfig, until: str = "report") -> list[str]:
    """One line per stage: "cluster: up to date", or why it would be computed, "train soft: train.lr changed 0.04 -> 0.02".

    A run folder at a URI is fetched, and so is a log at one.

    Raises:
        DataError, ConfigError: as :func:`pipeline.runs.plan.plan`.
        RunFolderError: the run folder at a URI cannot be read.
    """
    if config.run.methods != AUTO_METHODS:
        check_methods(config.run.methods, config.run.task)
    out = Path(config.run.out)
    if config.run.remote is not None:
        Mirror(config.run.remote, out).fetch()
    decided = with_defaults_of_ingested(config)
    lines = describe_plan(RunFolder(out), plan(localised(decided), until))
    if config.run.methods == AUTO_METHODS and not is_ingested(out):
        # The log decides; its stages are the same for every method.
        lines = [line.replace(f" {decided.run.methods[0]}:", " auto:", 1) for line in lines]
    return [*lines, "report: written by every run"] if until == "report" else lines
