"""What updates have added to a run: ids placed after the training, with everything that a bundle and a further update need.

The folder, ``RUN/update/<method>/``, which appears complete or not at all:

    users.parquet, items.parquet    Vocabulary: the trained ids, and then the placed ones in the order of their updates
    users.npz, items.npz            BucketMap of as many ids
    placed.npz                      of placed ids alone: user_labels, item_labels, int32 (n_levels, n), item_bias, float32 (n,), and
                                    user_rows, float32 (n_rows, dim), which stand before the last row of the trained users' table
    seen/                           ShardedCsr, users x items: training interactions, and those of the updates
    update.json                     train_key (of the training it belongs to), id, and a list of what each update did

It belongs to one training, and another one starts without it; ``id`` changes with the placed ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.community_maps import SIDES
from pipeline.distributed.shards import ShardedCsr
from pipeline.storage.atomic import write_json_atomic

FACTS = "update.json"
SEEN = "seen"


@dataclass(frozen=True, eq=False)
class Placed:
    """The run as it stands: trained ids, and those placed since.

    Args:
        vocabularies, maps: by side, of all these ids.
        labels: communities of the placed ids, by side, int32, shape (n_levels, n_placed).
        item_bias: of the placed items, float32, shape (n_placed,); zeros where the model has none.
        user_rows: of placed users who have rows of their own, float32, shape (n_rows, dim); before the last row of the trained table.
        seen: interactions, shape (n_users, n_items).
        updates: what each update did, for reports.
    """

    vocabularies: dict[str, Vocabulary]
    maps: dict[str, BucketMap]
    labels: dict[str, NDArray[np.int32]]
    item_bias: NDArray[np.float32]
    user_rows: NDArray[np.float32]
    seen: csr_array
    updates: tuple[dict[str, Any], ...]

    @classmethod
    def none(cls, ingest_dir: Path, maps: dict[str, BucketMap], n_levels: int, dim: int) -> Placed:
        """The run as it was trained."""
        vocabularies = {side: Vocabulary.load(ingest_dir / f"{side}.parquet") for side in SIDES}
        labels = {side: np.empty((n_levels, 0), np.int32) for side in SIDES}
        seen = ShardedCsr.open(ingest_dir / "train").load()
        return cls(vocabularies, maps, labels, np.empty(0, np.float32), np.empty((0, dim), np.float32), seen, ())

    @classmethod
    def load(cls, folder: Path) -> Placed:
        """What :meth:`save` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        vocabularies = {side: Vocabulary.load(folder / f"{side}.parquet") for side in SIDES}
        maps = {side: BucketMap.load(folder / f"{side}.npz") for side in SIDES}
        try:
            with np.load(folder / "placed.npz", allow_pickle=False) as arrays:
                labels, bias = {"users": arrays["user_labels"], "items": arrays["item_labels"]}, arrays["item_bias"]
                # Not there in what older versions wrote, which had none.
                rows = arrays["user_rows"] if "user_rows" in arrays else np.empty((0, 0), np.float32)
            updates = json.loads((folder / FACTS).read_text(encoding="utf-8"))["updates"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{folder}: not readable ({error}); remove it, and place the new ids again") from error
        return cls(vocabularies, maps, labels, bias, rows, ShardedCsr.open(folder / SEEN).load(), tuple(updates))

    def save(self, folder: Path, train_key: str, n_shards: int) -> None:
        """Write the files above."""
        for side in SIDES:
            self.vocabularies[side].save(folder / f"{side}.parquet")
            self.maps[side].save(folder / f"{side}.npz")
        arrays = {"user_labels": self.labels["users"], "item_labels": self.labels["items"]}
        arrays |= {"item_bias": self.item_bias, "user_rows": self.user_rows}
        np.savez(folder / "placed.npz", **arrays)
        ShardedCsr.write(folder / SEEN, self.seen, n_shards=n_shards)
        facts = {"train_key": train_key, "id": self.id, "updates": list(self.updates)}
        write_json_atomic(folder / FACTS, facts)

    @property
    def n_placed(self) -> dict[str, int]:
        return {side: self.labels[side].shape[1] for side in SIDES}

    @property
    def n_trained(self) -> dict[str, int]:
        return {side: len(self.vocabularies[side]) - n for side, n in self.n_placed.items()}

    @property
    def id(self) -> str | None:
        """What a bundle depends on; None while nothing is placed."""
        if not any(self.n_placed.values()):
            return None
        return "-".join(
            m.content_hash[:16] + self.vocabularies[side].content_hash[:16] for side, m in self.maps.items()
        )


def placed_dir(run: Path, method: str) -> Path:
    """The folder of a method's placed ids, which need not be there."""
    return run / "update" / method


def placed_id(run: Path, method: str, train_key: str) -> str | None:
    """``id`` of the updates that belong to a training; None where there are none, or none that placed an id."""
    facts = _facts(run, method)
    return facts["id"] if facts["train_key"] == train_key else None


def belongs_to(run: Path, method: str, train_key: str) -> bool:
    """Whether there are updates of this training."""
    return _facts(run, method)["train_key"] == train_key


def _facts(run: Path, method: str) -> dict[str, Any]:
    try:
        facts = json.loads((placed_dir(run, method) / FACTS).read_text(encoding="utf-8"))
        return {key: facts[key] for key in ("train_key", "id")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"train_key": None, "id": None}
