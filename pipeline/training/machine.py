"""CPUs and GPUs of this machine, and whether a training takes place here or in Ray Train's workers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.run_config import RunConfig
from pipeline.distributed.session import on_cluster

# The quota of a container, in microseconds of CPU time per period: "200000 100000" is two CPUs, "max 100000" is none.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def n_cpus() -> int:
    """CPUs that this process may use: those of its affinity, at most those of the container's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return n if quota == "max" else max(1, min(n, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return n


def n_threads() -> int:
    """Threads of a training in this process: ``OMP_NUM_THREADS`` where it is set, as PyTorch reads it, and at most :func:`n_cpus`."""
    # OpenMP takes a list, of which the first number is for the outermost region.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(asked), n_cpus()) if asked.isdigit() and int(asked) > 0 else n_cpus()


def n_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


@contextmanager
def threads(n: int) -> Iterator[None]:
    """PyTorch and numba use ``n`` threads inside the block, and as many as before after it."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(n)
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def trains_on_ray(config: RunConfig) -> bool:
    """Whether Ray Train's workers train: on a cluster, and where there are several of them; one on this machine needs no Ray.

    ``train.workers`` is one per GPU where it is not set.
    """
    return on_cluster(config.run.address) or (config.train.workers or n_gpus()) > 1
