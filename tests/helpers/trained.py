"""Methods that are trained into a run folder once, by the tests of a module together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.maps.methods import METHODS


def trained_once(run: Path, method: str, train: Callable[[str, Path], dict[str, Any]]) -> dict[str, Any]:
    """Train a method into a run folder where it is not there yet, and before it the one that it stores otherwise; its facts.

    Args:
        train: of a method and its folder.
    """
    out = run / "methods" / method
    if out.exists():
        return json.loads((out / "history.json").read_text())["facts"]
    if (source := METHODS[method].trained_as) is not None:
        trained_once(run, source, train)
    out.mkdir(parents=True)
    return train(method, out)
