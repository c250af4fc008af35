"""What the stages that a run has to compute will take on this machine, as lines. Nothing is written."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.run_config import RunConfig
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import plan, reasons
from pipeline.runs.tasks import task_of
from pipeline.runs.trained import with_defaults_of_ingested
from pipeline.storage.uris import localised
from pipeline.task import StageContext
from pipeline.training.forecast import RunForecast
from pipeline.training.memory import machine_bytes

GIB = 2**30


def run_forecast(config: RunConfig) -> list[str]:
    """Sizes, seconds and memory of the stages that are not up to date, as lines; none where all are, or where the task has no forecast.

    Raises:
        DataError: the log cannot be read, or the budget leaves no rows.
    """
    folder, given = RunFolder(config.run.out), config
    config = localised(with_defaults_of_ingested(config))
    todo = [name for name, step in plan(config, "report").items() if reasons(folder, step)]
    if not todo:
        return []
    # What the log decides, the forecast decides by its sample.
    undecided = config if "ingest" not in todo else localised(given)
    told = task_of(config).forecast(StageContext(undecided, Path(config.run.out)), todo)
    if told is None:
        return [f"task {config.run.task}: seconds and memory are not forecast"]
    return forecast_lines(told, machine_bytes())


def forecast_lines(told: RunForecast, memory: int) -> list[str]:
    """A forecast as a person reads it.

    Args:
        memory: of this machine, in bytes.
    """
    about = "" if told.is_exact else "about "
    lines = ["log: " + ", ".join(f"{name} {about}{number:,}" for name, number in told.sizes.items())]
    for method, parts in told.training_bytes.items():
        named = ", ".join(f"{part} {size_text(n_bytes)}" for part, n_bytes in parts.items())
        lines.append(f"training of {method} holds {size_text(sum(parts.values()))}: {named}")
    lines.append(f"{'stage':<24}{'seconds':>14}{'peak memory':>14}")
    for stage in told.stages:
        seconds = "-" if stage.seconds is None else range_text(*stage.seconds)
        peak = "-" if stage.peak_bytes is None else size_text(stage.peak_bytes)
        lines.append(f"{stage.name:<24}{seconds:>14}{peak:>14}")
    measured = [stage.seconds for stage in told.stages if stage.seconds is not None]
    if measured:
        total = range_text(sum(low for low, _ in measured), sum(high for _, high in measured))
        lines.append(f"{'all of these':<24}{total:>14}{'':>14}")
    for stage in told.stages:
        if stage.peak_bytes is not None and stage.peak_bytes > memory:
            lines.append(
                f"warning: {stage.name} needs about {size_text(stage.peak_bytes)}, and this machine has {size_text(memory)}; "
                "use a larger machine, a lower --ratio or --dim, or a --batch-size"
            )
    return lines


def range_text(low: float, high: float) -> str:
    """Seconds, such as "12" or "12-40"; two figures."""
    texts = [f"{value:.1f}" if value < 9.95 else f"{value:,.0f}" for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def size_text(n_bytes: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:,.0f} B"
