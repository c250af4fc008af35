"""A pool of a sweep's scheduler without Ray: runs are done in this process, when their result is waited for."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.sweeps.scheduler import Result, RunSpec


class SerialPool:
    """Up to ``n_slots`` runs wait at once; the one submitted first ends first, or last where ``newest_first``."""

    def __init__(self, n_slots: int, run: Callable[[RunSpec], Result], newest_first: bool = False) -> None:
        self.n_slots, self._run, self._newest_first = n_slots, run, newest_first
        self.running: list[RunSpec] = []
        self.most_running = 0
        self.cancelled: list[RunSpec] = []

    def submit(self, spec: RunSpec) -> None:
        self.running.append(spec)
        self.most_running = max(self.most_running, len(self.running))

    def next_result(self) -> tuple[RunSpec, Result]:
        spec = self.running.pop(-1 if self._newest_first else 0)
        return spec, self._run(spec)

    def cancel(self) -> None:
        self.cancelled, self.running = self.running, []
