"""Processes that have joined one gloo group, as Ray Train's workers on CPUs do, without Ray. They live for many tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.copied import copies

TIMEOUT_S = 120


class Gang:
    """Calls module-level functions in all its processes at once."""

    def __init__(self, pipes: list[Any]) -> None:
        self._pipes = pipes

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` of every process, by rank."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for pipe in self._pipes:
            assert pipe.poll(TIMEOUT_S), "a worker waits for the others"
            result, error = pipe.recv()
            assert error is None, error
            results.append(result)
        return results


@contextmanager
def gang(size: int, rendezvous: str) -> Iterator[Gang]:
    """Args: rendezvous: a file that is not there."""
    context = copies()
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, rank, size, rendezvous), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        yield Gang(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, size: int, rendezvous: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
