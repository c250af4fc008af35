"""Jobs that wait together run together, within bounds, and each gets its own result or its own error."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import pytest

from serving.http.micro_batches import MicroBatches, Overloaded


@dataclass(frozen=True)
class Job:
    n_users: int
    width: int = 1


def run_all(jobs, *, workers=1, **limits):
    """Submit a first job, which blocks, then the others; returns the runs and the results."""
    runs, go = [], threading.Event()

    def run(batch):
        runs.append(list(batch))
        if len(runs) == 1:
            go.wait()
        return [("done", job) for job in batch]

    async def submit():
        batches = MicroBatches(
            run, n_workers=workers, **{"max_users": 10, "max_cells": 1000, "max_waiting": 100} | limits
        )
        first = asyncio.create_task(batches.submit(Job(1)))
        while not runs:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batches.submit(job)) for job in jobs]
        await asyncio.sleep(0.01)
        go.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        batches.close()
        return results

    return runs, asyncio.run(submit())


def test_jobs_that_wait_are_joined_in_order_within_the_bounds():
    jobs = [Job(4), Job(5), Job(2), Job(20), Job(1), Job(1, 300), Job(3), Job(1)]
    runs, results = run_all(jobs)
    assert runs[1:] == [[Job(4), Job(5)], [Job(2)], [Job(20)], [Job(1), Job(1, 300)], [Job(3), Job(1)]]
    assert results[1:] == [("done", job) for job in jobs]


def test_a_free_worker_does_not_wait():
    runs, _ = run_all([Job(1), Job(2)], workers=2)
    assert sum(map(len, runs)) == 3


def test_too_many_are_refused_and_the_others_answered():
    _, results = run_all([Job(1)] * 5, max_waiting=3)
    assert [isinstance(result, Overloaded) for result in results[1:]] == [False] * 3 + [True] * 2


def test_an_error_of_a_run_reaches_its_jobs_and_the_next_run_goes_on():
    def run(batch):
        if batch[0].width == 2:
            raise OSError("no")
        return batch

    async def work():
        batches = MicroBatches(run, max_users=10, max_cells=1000)
        with pytest.raises(OSError, match="no"):
            await batches.submit(Job(1, 2))
        return await batches.submit(Job(1, 1))

    assert asyncio.run(work()) == Job(1, 1)


def test_who_gives_up_is_not_run():
    runs, go = [], threading.Event()

    def run(batch):
        runs.append(list(batch))
        go.wait()
        return batch

    async def work():
        batches = MicroBatches(run, max_users=10, max_cells=1000, max_waiting=1)
        first = asyncio.create_task(batches.submit(Job(1)))
        while not runs:
            await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await batches.submit(Job(2))
        second = asyncio.create_task(batches.submit(Job(3)))  # The place is free again.
        await asyncio.sleep(0)
        go.set()
        return await first, await second

    assert asyncio.run(work()) == (Job(1), Job(3))
    assert runs == [[Job(1)], [Job(3)]]
