"""Community ids at several resolutions, with raw ids, as parquet: features of users and items for any model.

Files (``RUN/cluster/``): ``levels_users.parquet`` with the columns ``user_id``, ``level_1``, ``level_2``, ...
(int32, coarse to fine), and ``levels_items.parquet`` with ``item_id``. A fine community lies in one coarse
community, and users and items share the ids of a level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graphhash.clustering.hierarchy import Hierarchy
from graphhash.graph.vocabulary import Vocabulary


def write_levels(hierarchy: Hierarchy, ingest_dir: Path, out_dir: Path) -> dict[str, dict[str, Any]]:
    """Write both files.

    Args:
        ingest_dir: holds the vocabularies ``users.parquet`` and ``items.parquet``.
        out_dir: exists.

    Returns: resolution, modularity and rows of every level, by the name of its column.

    Raises:
        DataError: a vocabulary is missing or damaged.
    """
    for side, levels in (("users", hierarchy.users), ("items", hierarchy.items)):
        columns = {f"{side[:-1]}_id": Vocabulary.load(ingest_dir / f"{side}.parquet").ids}
        columns |= {f"level_{i + 1}": levels[:, i] for i in range(levels.shape[1])}
        pq.write_table(pa.table(columns), out_dir / f"levels_{side}.parquet", compression="zstd")
    return {
        f"level_{i + 1}": {
            "resolution": resolution,
            "modularity": modularity,
            "user_rows": len(np.unique(hierarchy.users[:, i])),
            "item_rows": len(np.unique(hierarchy.items[:, i])),
        }
        for i, (resolution, modularity) in enumerate(zip(hierarchy.resolutions, hierarchy.modularity, strict=True))
    }
