"""A small CTR data set with planted tastes, as columns and as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

SCHEMA = """
label = "click"
group = "user"
dense = ["price"]
categorical = ["user", "item", "device"]
[columns.user]
partner = "item"
compress = "method"
[columns.item]
partner = "user"
compress = "method"
[multi_valued.genres]
separator = "|"
"""


def columns(n_rows: int = 3000, n_users: int = 60, n_items: int = 40, seed: int = 0) -> dict[str, list]:
    """Users of one of four groups have positive labels with items of the same group; some values are missing (None)."""
    rng = np.random.default_rng(seed)
    # Drawn, so that no hash of an id's number finds them.
    user_group, item_group = rng.integers(4, size=n_users), rng.integers(4, size=n_items)
    users, items = rng.integers(n_users, size=n_rows), rng.integers(n_items, size=n_rows)
    price = rng.normal(10, 3, n_rows)
    chance = np.where(user_group[users] == item_group[items], 0.85, 0.1) * np.where(price > 12, 0.7, 1.0)
    genres = [["drama", "war"], ["comedy"], [], ["war", "comedy", "drama"]]
    gone = rng.random((3, n_rows)) < 0.05
    return {
        "click": (rng.random(n_rows) < chance).astype(int).tolist(),
        "user": [f"u{u:03d}" for u in users],
        "item": (1000 + items).tolist(),
        "device": [None if g else f"d{d}" for g, d in zip(gone[0], rng.integers(5, size=n_rows), strict=True)],
        "price": [None if g else round(p, 3) for g, p in zip(gone[1], price, strict=True)],
        "genres": [
            None if g or not genres[i % 4] else "|".join(genres[i % 4]) for g, i in zip(gone[2], items, strict=True)
        ],
    }


def write_csv(path: Path, log: dict[str, list]) -> Path:
    """The log as csv, nulls as empty fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pa_csv.write_csv(pa.table(log), path)
    return path


def write_schema(folder: Path, text: str = SCHEMA) -> str:
    """The schema as a file; returns its path."""
    file = folder / "schema.toml"
    file.write_text(text)
    return str(file)
