"""The seconds of a training step, by some steps of a training that is then stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from pipeline.training.loop import CONTINUE, STOP, Callbacks

BURST_SECONDS, LEAST_STEPS = 0.3, 3


@dataclass
class StepClock:
    """Ends a training after about BURST_SECONDS, and at least LEAST_STEPS steps. The first step, which loads and compiles, is left out."""

    _backward: list[float] = field(default_factory=list)
    _steps: list[float] = field(default_factory=list)
    _n_forwards: int = 0

    def callbacks(self) -> Callbacks:
        """For `pipeline.training.loop.fit`."""
        return Callbacks(poll=self._poll, on_phase=self._on_phase)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return (self._steps[-1] - self._steps[0]) / (len(self._steps) - 1)

    @property
    def optimizer(self) -> float:
        """Seconds of the optimizer in a step."""
        ends = np.array(self._steps)
        return float(np.mean(ends - np.array(self._backward[: len(ends)])))

    def _on_phase(self, phase: str) -> None:
        self._n_forwards += phase == "forward"
        ends = {"backward": self._backward, "step": self._steps}.get(phase)
        if ends is not None and len(ends) < self._n_forwards:
            ends.append(time.perf_counter())

    def _poll(self) -> int:
        taken = self._steps
        return STOP if len(taken) > LEAST_STEPS and taken[-1] - taken[0] > BURST_SECONDS else CONTINUE
