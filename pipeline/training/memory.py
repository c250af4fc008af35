"""Memory: the most that this process has held, what this machine has, and what a training holds."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

# The limit of a container, in bytes; "max" is none.
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def peak_mib(reset: bool = False) -> float:
    """Most resident memory of this process so far; Linux can forget the past first."""
    status = Path("/proc/self/status")
    if not status.exists():
        # Bytes on macOS, else KiB. It cannot be reset, so it may be the peak of loading the graph.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    # Not ru_maxrss, which a new process inherits from its parent.
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def machine_bytes() -> int:
    """Memory of this machine, at most the limit of the container."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(MEMORY_LIMIT.read_text()))
    except (OSError, ValueError):
        return whole


def training_bytes(model: nn.Module) -> int:
    """Bytes that one worker's training holds of a model, computed: the sum of :func:`training_parts`.

    Batches, negatives and the interactions are not counted; they do not depend on the method.
    """
    return sum(training_parts(model).values())


def training_parts(model: nn.Module) -> dict[str, int]:
    """Bytes that one worker's training holds of a model, by part: ``tables`` (all parameters, float32), their ``gradients``, ``optimizer``
    (both moments of Adam, with a float32 counter for each parameter), and ``maps`` (all buffers).
    """
    parameters = list(model.parameters())
    numbers = sum(weight.numel() for weight in parameters)
    return {
        "tables": 4 * numbers,
        "gradients": 4 * numbers,
        "optimizer": 8 * numbers + 4 * len(parameters),
        "maps": sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
    }


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, those of a sparse one's indices among them."""
    if tensor.is_sparse:
        return tensor_bytes(tensor._indices()) + tensor_bytes(tensor._values())
    return tensor.numel() * tensor.element_size()
