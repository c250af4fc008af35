"""Requests that wait for the model at the same time are answered by one run of it.

Nothing waits for company: a run begins as soon as a worker is free, with all that has come meanwhile. So a lone
request costs what it costs, and the runs grow with the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar


class Job(Protocol):
    """What a request asks of the model: an array of n_users x width at most goes in or comes out."""

    @property
    def n_users(self) -> int: ...

    @property
    def width(self) -> int: ...


J = TypeVar("J", bound=Job)


class Overloaded(RuntimeError):
    """Too many requests wait already."""


class MicroBatches(Generic[J]):
    """Runs `run(jobs)`, a blocking function from jobs to as many results, on threads, for one event loop.

    Args:
        run: called on a thread; an exception fails all of its jobs.
        max_users, max_cells: a run takes jobs of up to so many users together, and of so many users times the
            largest width, to which the others are padded; and always one job.
        n_workers: runs at a time.
        max_waiting: jobs that may wait; the next is refused.
    """

    def __init__(
        self,
        run: Callable[[Sequence[J]], Sequence[Any]],
        *,
        max_users: int,
        max_cells: int,
        n_workers: int = 1,
        max_waiting: int = 1024,
    ) -> None:
        self._run, self._max_users, self._max_cells, self._max_waiting = run, max_users, max_cells, max_waiting
        self._waiting: deque[tuple[J, asyncio.Future]] = deque()
        self._idle = n_workers
        self._pool = ThreadPoolExecutor(n_workers, thread_name_prefix="model")
        self._tasks: set[asyncio.Task] = set()

    async def submit(self, job: J) -> Any:
        """The job's result. A caller that is cancelled before its run begins takes its job out.

        Raises:
            Overloaded: `max_waiting` jobs wait.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already")
        future = asyncio.get_running_loop().create_future()
        entry = (job, future)
        self._waiting.append(entry)
        if self._idle:
            self._idle -= 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)  # The loop itself keeps only weak references.
            task.add_done_callback(self._tasks.discard)
        try:
            return await future
        except asyncio.CancelledError:
            with suppress(ValueError):  # Not there any more: its run has begun.
                self._waiting.remove(entry)
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._take():
                try:
                    results = await loop.run_in_executor(self._pool, self._run, [job for job, _ in batch])
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for (_, future), result in zip(batch, results, strict=True):
                        if not future.done():
                            future.set_result(result)
        finally:
            self._idle += 1

    def _take(self) -> list[tuple[J, asyncio.Future]]:
        batch: list[tuple[J, asyncio.Future]] = []
        n_users = width = 0
        while self._waiting:
            job, future = self._waiting[0]
            if future.done():  # Its caller has given up.
                self._waiting.popleft()
                continue
            n_users, width = n_users + job.n_users, max(width, job.width)
            if batch and (n_users > self._max_users or n_users * width > self._max_cells):
                break
            batch.append(self._waiting.popleft())
        return batch
