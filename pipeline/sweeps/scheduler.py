"""The scheduler of a sweep: many runs, each in a folder of its own, several at once, finished ones kept.

    with sweep_session(config, len(specs), jobs) as on_ray:
        pool = RayPool(len(specs), jobs, store) if on_ray else LocalPool(store)
        for spec, result in schedule(specs, pool):
            ...

`graphhash compare` gives it the points of a grid, `graphhash tune` the trials of a study. The scheduler takes the next run only when a
slot of the pool is free, so a study chooses a trial when the results of all that ended before are known.

A run's folder holds everything that it has computed, and :func:`finished` reads a result from there. A command that was stopped, by
Ctrl-C or by SIGKILL, is therefore continued by the same command. A run that fails has a reason instead of metrics, and the others go on.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from graphhash.errors import GraphHashError
from pipeline.config.run_config import RunConfig
from pipeline.progress import silenced
from pipeline.runs.run import is_done, run
from pipeline.storage.atomic import write_text_atomic
from pipeline.tracking.store import Store

# More of them hardly make one training faster.
CPUS_PER_RUN = 4
MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class RunSpec:
    """A run of a sweep.

    Args:
        name: its folder, relative to that of the sweep, such as "trials/0a1b2c3d4e5f".
        title: how progress lines and MLflow name it.
        config: its settings; ``run.out`` is the folder.
        until: its last stage.
        driver_until: the last stage that the driver computes before a pool's process takes over; None: there is none. Such are the
            stages that other runs reuse, and those that want the whole cluster.
        reuse_from: other run folders. A finished log or clustering with the same settings is reused from there.
    """

    name: str
    title: str
    config: RunConfig
    until: str
    driver_until: str | None = None
    reuse_from: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Args:
        metrics: of its only method, as in ``metrics.json``; None: the run failed, or ends before the first training.
        reason: why it failed, in one line.
        finished_before: an earlier command has finished it.
    """

    metrics: dict[str, Any] | None = None
    reason: str | None = None
    finished_before: bool = False


class Pool(Protocol):
    """Runs up to ``n_slots`` runs at once."""

    n_slots: int

    def submit(self, spec: RunSpec) -> None:
        """Start a run."""

    def next_result(self) -> tuple[RunSpec, Result]:
        """Wait until one of the runs has ended."""

    def cancel(self) -> None:
        """End all runs that have not ended."""


def schedule(specs: Iterable[RunSpec], pool: Pool) -> Iterator[tuple[RunSpec, Result]]:
    """Run all runs and yield each with its result, in the order in which they end.

    Args:
        specs: taken one by one, each when a slot of the pool is free.
    """
    waiting = iter(specs)
    n_running = 0
    try:
        while True:
            while n_running < pool.n_slots and (spec := next(waiting, None)) is not None:
                pool.submit(spec)
                n_running += 1
            if not n_running:
                return
            ended = pool.next_result()
            n_running -= 1
            yield ended
    finally:
        pool.cancel()


def finished(spec: RunSpec) -> Result | None:
    """The result of a run whose every stage is up to date, from its folder; None where something is left to compute."""
    if not is_done(spec.config, spec.until):
        return None
    result = execute(spec, spec.until)
    return Result(result.metrics, result.reason, finished_before=True)


def execute(spec: RunSpec, until: str, **options: Any) -> Result:
    """Run the stages up to and including ``until`` in this process.

    An error becomes the reason of the result. Its traceback is kept in ``error.txt`` of the run's folder.

    Args:
        options: further keyword arguments of :func:`pipeline.runs.run.run`.
    """
    trace = Path(spec.config.run.out) / "error.txt"
    try:
        with silenced():
            metrics = run(spec.config, until=until, reuse_from=spec.reuse_from, **options).metrics
    except Exception as error:
        write_text_atomic(trace, traceback.format_exc())
        # Ray hands on a task's error as a subclass whose text is the remote traceback; `cause` is the error itself.
        cause = getattr(error, "cause", None)
        return Result(reason=one_line(cause if isinstance(cause, Exception) else error))
    trace.unlink(missing_ok=True)
    return Result(metrics=metrics[0] if metrics else None)


@contextmanager
def sweep_session(config: RunConfig, n_runs: int, jobs: int | None) -> Iterator[bool]:
    """Ray for the length of a sweep, where there is room for several runs at once, or on a cluster.

    Yields: whether the runs are Ray tasks; they take place in this process, one after the other, if not.
    """
    from pipeline.distributed.session import check_shared, on_cluster, ray_session
    from pipeline.training.machine import n_cpus, n_gpus

    if not on_cluster(config.run.address) and share_resources(n_runs, jobs, [n_cpus()], n_gpus())[0] < 2:
        yield False
        return
    with ray_session(config.run.address):
        check_shared(Path(config.run.out))
        yield True


class LocalPool:
    """One run after the other in this process, each when its result is waited for.

    Args:
        store: where the trainings are tracked; None: nowhere.
    """

    n_slots = 1

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._waiting: list[RunSpec] = []

    def submit(self, spec: RunSpec) -> None:
        self._waiting.append(spec)

    def next_result(self) -> tuple[RunSpec, Result]:
        from pipeline.training.here import fit_here

        spec = self._waiting.pop()
        return spec, execute(spec, spec.until, store=self._store, fit_job=fit_here)

    def cancel(self) -> None:
        self._waiting.clear()


class RayPool:
    """Runs in Ray tasks, on the Ray that is running.

    Args:
        n_runs: of the sweep; fewer than there is room for get more CPUs each.
        jobs: runs at once; None: as many as the CPUs and GPUs allow.
        store: where the trainings are tracked; None: nowhere.
    """

    def __init__(self, n_runs: int, jobs: int | None, store: Store | None) -> None:
        import ray

        from pipeline.distributed.session import cpus_of_machines

        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.n_slots, resources = share_resources(n_runs, jobs, cpus_of_machines(), gpus)
        # A task whose process was killed is tried once more, and goes on from the last checkpoint.
        self._task = ray.remote(max_retries=1, **resources)(_execute_in_task)
        self._store = store
        self._running: dict[Any, RunSpec] = {}
        self._failed: list[tuple[RunSpec, Result]] = []

    def submit(self, spec: RunSpec) -> None:
        """Compute the driver's stages here, then start a task for the others."""
        if spec.driver_until is not None:
            result = execute(spec, spec.driver_until)
            if result.reason is not None:
                self._failed.append((spec, result))
                return
        self._running[self._task.remote(spec, self._store)] = spec

    def next_result(self) -> tuple[RunSpec, Result]:
        import ray

        if self._failed:
            return self._failed.pop()
        (ref, *_), _ = ray.wait(list(self._running), num_returns=1)
        spec = self._running.pop(ref)
        try:
            return spec, ray.get(ref)
        except ray.exceptions.RayError as error:
            return spec, Result(reason=f"its process ended: {one_line(error)}")

    def cancel(self) -> None:
        import ray

        for ref in self._running:
            ray.cancel(ref, force=True)
        self._running.clear()


def _execute_in_task(spec: RunSpec, store: Store | None) -> Result:
    """The body of a Ray task. It trains in its own process, because Ray Train's workers take ten seconds to start."""
    from pipeline.training.here import fit_in_task

    return execute(spec, spec.until, store=store, fit_job=fit_in_task)


def share_resources(n_runs: int, jobs: int | None, machines: Sequence[int], n_gpus: int) -> tuple[int, dict[str, Any]]:
    """How many runs there is room for at once, and what ``ray.remote`` is to reserve for each.

    Each gets a GPU where there are any; else at least CPUS_PER_RUN CPUs, or all of the widest machine if it has fewer.

    Args:
        n_runs: to be done.
        jobs: runs at once; None: as many as possible.
        machines: CPUs of each.
        n_gpus: of all machines.
    """
    if n_gpus:
        return min(n_runs, jobs or n_gpus, n_gpus), {"num_cpus": 1, "num_gpus": 1}
    if jobs is None:
        n_per_machine = max(1, min(max(machines) // CPUS_PER_RUN, math.ceil(n_runs / len(machines))))
        cpus = max(1, max(machines) // n_per_machine)
        return max(1, min(n_runs, sum(n // cpus for n in machines))), {"num_cpus": cpus}
    return jobs, {"num_cpus": max(1, min(max(machines), sum(machines) // jobs))}


def one_line(error: BaseException) -> str:
    """An error's message in one line, after the name of its class where the message is not meant for users."""
    text = " ".join(str(error).split()) or "no reason given"
    for_users = isinstance(error, (GraphHashError, OSError))
    return (text if for_users else f"{type(error).__name__}: {text}")[:MAX_REASON_LENGTH]
