"""The registry of tasks by name: a further task is a folder with a class like these two, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.ctr.task import Ctr
from pipeline.retrieval.task import Retrieval

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (Retrieval(), Ctr())}


def task_of(config: RunConfig) -> Task:
    """The task that the configuration names."""
    return TASKS[config.run.task]
