"""bf16, TF32 and ``torch.compile`` where the device supports them; elsewhere a line warns, and training is in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# Ampere, the first to have either.
CAPABILITY = (8, 0)


@contextmanager
def reduced_precision(
    amp: str | None, device: torch.device, warn: Callable[[str], None]
) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """What to compute a loss in, while the block lasts.

    Args:
        amp: ``bf16``: matrix products in bfloat16, weights and gradients stay float32 (``torch.autocast``); ``tf32``: float32 products
            with 10 bits of mantissa; None: float32 throughout.
        warn: called with a line where it is unavailable.
    """
    if amp is None:
        yield nullcontext
        return
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < CAPABILITY:
        where = "a CPU" if found is None else f"one of {found[0]}.{found[1]}"
        warn(
            f"train.amp={amp} needs a GPU of compute capability 8.0 or newer, and this is {where}: training is in float32"
        )
        yield nullcontext
    elif amp == "bf16":
        yield lambda: torch.autocast("cuda", torch.bfloat16)
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield nullcontext
        finally:
            torch.set_float32_matmul_precision(before)


def compiled(loss_of: Callable[..., Any], device: torch.device, warn: Callable[[str], None]) -> Callable[..., Any]:
    """``loss_of`` compiled by ``torch.compile``; as it is, with a line that says why, off a GPU and where that fails."""
    if device.type != "cuda":
        warn(
            "train.compile=true is for a GPU; the lookups on a CPU are compiled by numba already: training goes on without it"
        )
        return loss_of
    chosen: Callable[..., Any] = torch.compile(loss_of)
    call: Callable[..., Any]

    def first(*arguments: Any) -> Any:
        nonlocal chosen, call
        try:
            loss = chosen(*arguments)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(f"train.compile=true failed ({reason}): training goes on without it")
            chosen, loss = loss_of, loss_of(*arguments)
        call = chosen
        return loss

    call = first
    return lambda *arguments: call(*arguments)
