"""What a run will take: sizes, seconds and memory, told before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take.

    Args:
        name: of the step, such as `train soft`.
        seconds: at least and at most; None: not measured. A training that is validated may stop early.
        peak_bytes: most resident memory of the process; None: not measured.
    """

    name: str
    seconds: tuple[float, float] | None = None
    peak_bytes: int | None = None

    def beside(self, n_bytes: int) -> StageForecast:
        """The same where the process holds ``n_bytes`` for other reasons, such as its packages."""
        return self if self.peak_bytes is None else replace(self, peak_bytes=n_bytes + self.peak_bytes)


@dataclass(frozen=True)
class RunForecast:
    """What the stages of a run will take.

    Args:
        sizes: of the log, by name, such as `rows`.
        is_exact: whether they were counted; otherwise they are estimated from a part of the log.
        training_bytes: that a training holds, by method and part (tables, gradients, optimizer, maps).
        stages: those that have to be computed, in order.
    """

    sizes: Mapping[str, int]
    is_exact: bool
    training_bytes: Mapping[str, Mapping[str, int]]
    stages: tuple[StageForecast, ...]


def of_method(stages: Sequence[str], method: str, trained_as: str | None) -> Iterator[str]:
    """Steps such as `train auto`, those of a method being of this one, and with the training of the method that it stores otherwise."""
    for name in stages:
        stage, _, planned = name.partition(" ")
        if planned and trained_as is not None and stage in ("train", "refit"):
            yield f"{stage} {trained_as}"
        yield f"{stage} {method}" if planned else name
