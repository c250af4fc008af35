"""A command in this process, tracked in a folder of its own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from tests.helpers.mlflow_store import sqlite_store


def exit_code_of(folder: Path, *words: object) -> int:
    """Run ``graphhash WORDS...`` with MLflow's store in ``folder`` and return its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", sqlite_store(folder))
            patch.delenv("MLFLOW_RUN_ID", raising=False)
            with pytest.raises(SystemExit) as exit_:
                cli.main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(exit_.value.code or 0)
