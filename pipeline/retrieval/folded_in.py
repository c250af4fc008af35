"""Ids that updates have folded into a run after its training, with everything that a bundle and a further update need of them.

The folder, ``RUN/update/<method>/``, which appears complete or not at all:

    users.parquet, items.parquet    Vocabulary: the trained ids, then the folded-in ones in the order of their updates
    users.npz, items.npz            BucketMap of as many ids
    folded_in.npz                   of folded-in ids alone: user_labels, item_labels, int32 (n_levels, n); item_bias, float32 (n,);
                                    user_rows, item_rows, float32 (n_rows, dim), which stand before the last row of the trained table
    seen/                           ShardedCsr, users x items: training interactions, and those of the updates
    update.json                     train_key (of the training it belongs to), id, and a list of what each update did

The folder belongs to one training; another training starts without it. ``id`` changes with the folded-in ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from pipeline.distributed.shards import ShardedCsr
from pipeline.storage.atomic import write_json_atomic

FACTS = "update.json"
ARRAYS = "folded_in.npz"
SEEN = "seen"


class _Facts(TypedDict):
    train_key: str | None
    id: str | None


@dataclass(frozen=True, eq=False)
class FoldedIn:
    """The ids of a run: those that were trained, and those folded in since.

    Args:
        vocabularies, maps: by side, of all these ids.
        labels: communities of the folded-in ids, by side, int32, shape (n_levels, n_folded_in).
        item_bias: of the folded-in items, float32, shape (n_folded_in,); where the model has none, beside zeros of trained items.
        rows: by side, embeddings of folded-in ids that have a table row of their own, float32, shape (n_rows, dim); they stand before
            the last row of the trained table.
        seen: interactions, shape (n_users, n_items).
        updates: what each update did, for reports.
    """

    vocabularies: dict[str, Vocabulary]
    maps: dict[str, BucketMap]
    labels: dict[str, NDArray[np.int32]]
    item_bias: NDArray[np.float32]
    rows: dict[str, NDArray[np.float32]]
    seen: csr_array
    updates: tuple[dict[str, Any], ...]

    @classmethod
    def none(cls, ingest_dir: Path, maps: dict[str, BucketMap], seen: csr_array, n_levels: int, dim: int) -> FoldedIn:
        """The run as it was trained, on the interactions ``seen``."""
        vocabularies = {side: Vocabulary.load(ingest_dir / f"{side}.parquet") for side in SIDES}
        labels = {side: np.empty((n_levels, 0), np.int32) for side in SIDES}
        rows = {side: np.empty((0, dim), np.float32) for side in SIDES}
        return cls(vocabularies, maps, labels, np.empty(0, np.float32), rows, seen, ())

    @classmethod
    def load(cls, folder: Path) -> FoldedIn:
        """What :meth:`save` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        vocabularies = {side: Vocabulary.load(folder / f"{side}.parquet") for side in SIDES}
        maps = {side: BucketMap.load(folder / f"{side}.npz") for side in SIDES}
        try:
            with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
                labels = {"users": arrays["user_labels"], "items": arrays["item_labels"]}
                bias, rows = arrays["item_bias"], {"users": arrays["user_rows"]}
                # Updates of earlier versions gave no item a row.
                rows["items"] = arrays["item_rows"] if "item_rows" in arrays else rows["users"][:0]
            updates = json.loads((folder / FACTS).read_text(encoding="utf-8"))["updates"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{folder}: not readable ({error}); remove it, and run 'graphhash update' again") from error
        return cls(vocabularies, maps, labels, bias, rows, ShardedCsr.open(folder / SEEN).load(), tuple(updates))

    def save(self, folder: Path, train_key: str, n_shards: int) -> None:
        """Write the files above."""
        for side in SIDES:
            self.vocabularies[side].save(folder / f"{side}.parquet")
            self.maps[side].save(folder / f"{side}.npz")
        np.savez(
            folder / ARRAYS,
            user_labels=self.labels["users"],
            item_labels=self.labels["items"],
            item_bias=self.item_bias,
            user_rows=self.rows["users"],
            item_rows=self.rows["items"],
        )
        ShardedCsr.write(folder / SEEN, self.seen, n_shards=n_shards)
        facts = {"train_key": train_key, "id": self.id, "updates": list(self.updates)}
        write_json_atomic(folder / FACTS, facts)

    @property
    def n_folded_in(self) -> dict[str, int]:
        """The number of folded-in ids by side."""
        return {side: self.labels[side].shape[1] for side in SIDES}

    @property
    def n_trained(self) -> dict[str, int]:
        """The number of trained ids by side."""
        return {side: len(self.vocabularies[side]) - n for side, n in self.n_folded_in.items()}

    @property
    def id(self) -> str | None:
        """What a bundle depends on; None while no id is folded in."""
        if not any(self.n_folded_in.values()):
            return None
        return "-".join(
            m.content_hash[:16] + self.vocabularies[side].content_hash[:16] for side, m in self.maps.items()
        )


def folded_in_dir(run: Path, method: str) -> Path:
    """The folder of a method's folded-in ids, which need not exist."""
    return run / "update" / method


def folded_in_id(run: Path, method: str, train_key: str) -> str | None:
    """``id`` of the updates of a training; None where there are none, or none that folded an id in."""
    facts = _facts(run, method)
    return facts["id"] if facts["train_key"] == train_key else None


def belongs_to(run: Path, method: str, train_key: str) -> bool:
    """Whether there are updates of this training."""
    return _facts(run, method)["train_key"] == train_key


def _facts(run: Path, method: str) -> _Facts:
    try:
        facts = json.loads((folded_in_dir(run, method) / FACTS).read_text(encoding="utf-8"))
        return {"train_key": facts["train_key"], "id": facts["id"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"train_key": None, "id": None}
