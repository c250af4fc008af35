"""Empty MLflow stores in SQLite files. MLflow makes the tables in a migration of many steps, which takes seconds: one serves all tests."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path


@functools.cache
def _empty() -> bytes:
    from pipeline.tracking.client import client_of, quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        client_of(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def sqlite_store(folder: Path) -> str:
    """The URI of the store in a folder, which is made where there is none."""
    file = folder / "mlflow.db"
    if not file.exists():
        file.write_bytes(_empty())
    return f"sqlite:///{file}"
