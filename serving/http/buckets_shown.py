"""Which rows of the tables a user reads, and which items read the same: for the page of `graphhash serve --explain`.

Reads the bucket maps from the bundle's graph, under the names that export gives them (pipeline/export):
`user_rows`, `item_rows`, `SIDE_codebook` and `SIDE_codes` for weights, `shared_table` where users and items have
one table. A side without rows has a vector for each id, and no buckets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.http.onnx_tensors import OnnxTensors, Strings, read_tensors
from serving.manifest import MODEL

N_SHOWN_ITEMS = 8
# Maps and ids; not the tables, which are the bulk.
_WANTED = re.compile(
    r"(user|item)_(rows|codebook|codes|ids|first_id|last_id|of_place|id_first|id_places)|n_users|n_items"
)


class BucketsShown:
    """The maps of one bundle, in memory, with an index from buckets to the ids that read them.

    Args:
        bundle: a checked bundle.

    Attributes:
        shared: whether users and items read rows of one table, so that a bucket of a user has items.

    Raises:
        ValueError: the model is no well-formed ONNX file, or lacks the ids.
    """

    def __init__(self, bundle: Path) -> None:
        tensors = read_tensors(bundle / MODEL, lambda name: _WANTED.fullmatch(name) is not None)
        try:
            self.user_ids = _user_ids(tensors)
            self.item_ids = _item_ids(tensors)
        except KeyError as error:
            raise ValueError(f"it has no tensor {error}") from None
        self._index = {"user": _IdIndex(self.user_ids), "item": _IdIndex(self.item_ids)}
        self._maps = {side: _map_of(tensors.arrays, side) for side in ("user", "item")}
        self._readers = {
            side: None if part is None else _Readers(part, len(ids))
            for (side, part), ids in zip(self._maps.items(), (self.user_ids, self.item_ids), strict=True)
        }
        self.shared = "shared_table" in tensors.initializers

    def random_user(self, rng: np.random.Generator) -> int | str:
        """A known raw user id."""
        return _plain(self.user_ids, int(rng.integers(len(self.user_ids))))

    def buckets(self, side: str, entry: int) -> dict[int, float]:
        """Bucket -> weight of the map entry of one id, largest weight first; empty where ids have rows of their own.

        Args:
            side: "user" or "item".
            entry: row of the id; the number of ids for out-of-vocabulary ones.
        """
        part = self._maps[side]
        if part is None:
            return {}
        sums: dict[int, float] = {}
        for bucket, weight in zip(part.rows[entry].tolist(), part.weights(entry).tolist(), strict=True):
            sums[bucket] = sums.get(bucket, 0.0) + weight
        return dict(sorted(((b, w) for b, w in sums.items() if w), key=lambda pair: (-pair[1], pair[0])))

    def of_user(self, user_id: int | str) -> list[dict[str, Any]]:
        """The user's buckets, each with the numbers of users and items that read it and some of the items.

        Returns: `{"bucket", "weight", "n_users", "n_items", "items"}` per bucket. `items` are raw ids, those with the
            largest weight first; `n_items` is None and `items` empty where items have a table of their own.
        """
        entry = self._index["user"].find(user_id)
        users, shown = self._readers["user"], []
        for bucket, weight in self.buckets("user", len(self.user_ids) if entry is None else entry).items():
            assert users is not None
            items = self.readers("item", bucket) if self.shared else None
            shown.append(
                {
                    "bucket": bucket,
                    "weight": weight,
                    "n_users": len(users.of(bucket)),
                    "n_items": None if items is None else len(items),
                    "items": [] if items is None else self._heaviest(items, bucket),
                }
            )
        return shown

    def of_item(self, item_id: int | str) -> dict[int, float]:
        """Bucket -> weight of an item that the model knows."""
        entry = self._index["item"].find(item_id)
        return {} if entry is None else self.buckets("item", entry)

    def readers(self, side: str, bucket: int) -> NDArray[np.int32]:
        """Rows of the ids that read a bucket of their table, ascending."""
        readers = self._readers[side]
        return np.empty(0, np.int32) if readers is None else readers.of(bucket)

    def _heaviest(self, items: NDArray[np.int32], bucket: int) -> list[int | str]:
        part = self._maps["item"]
        assert part is not None
        weights = np.where(part.rows[items] == bucket, part.weights(items), 0).sum(axis=1)
        best = items[np.argsort(-weights, kind="stable")[:N_SHOWN_ITEMS]]
        return [_plain(self.item_ids, item) for item in best.tolist()]


@dataclass(frozen=True, eq=False)
class _SideMap:
    """The bucket map of users or of items: `rows` of shape (n_ids + 1 or more, indices per id); no codebook: weights are 1."""

    rows: NDArray
    codebook: NDArray | None
    codes: NDArray | None

    def weights(self, entries: int | slice | NDArray) -> NDArray[np.float32]:
        if self.codebook is None or self.codes is None:
            return np.ones(np.shape(self.rows[entries]), np.float32)
        return self.codebook[self.codes[entries]]


def _map_of(tensors: dict[str, NDArray], side: str) -> _SideMap | None:
    rows = tensors.get(f"{side}_rows")
    if rows is None:
        return None
    rows = rows.reshape(len(rows), -1)
    codebook = tensors.get(f"{side}_codebook")
    return _SideMap(rows, codebook, None if codebook is None else tensors[f"{side}_codes"])


class _Readers:
    """From a bucket to the ids that read it; entries behind the ids are the OOV entry and padding, and are left out."""

    def __init__(self, part: _SideMap, n_ids: int) -> None:
        rows = part.rows[:n_ids]
        reads = part.weights(slice(n_ids)) != 0
        ids = np.repeat(np.arange(n_ids, dtype=np.int32), reads.sum(axis=1))
        buckets = rows[reads].astype(np.int32)
        order = np.lexsort((ids, buckets))
        ids, buckets = ids[order], buckets[order]
        # An id may read a bucket twice.
        first = np.r_[True, (ids[1:] != ids[:-1]) | (buckets[1:] != buckets[:-1])][: len(ids)]
        self._ids, self._buckets = ids[first], buckets[first]

    def of(self, bucket: int) -> NDArray[np.int32]:
        start, stop = np.searchsorted(self._buckets, [bucket, bucket + 1])
        return self._ids[start:stop]


class _IdIndex:
    """From a raw id to its row, by a binary search."""

    def __init__(self, ids: NDArray[np.int64] | Strings) -> None:
        self._ids = ids
        keys = _hashes(ids) if isinstance(ids, Strings) else ids
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, raw_id: int | str) -> int | None:
        """The id's row, or None."""
        key = hash(raw_id) if isinstance(self._ids, Strings) else raw_id
        start, stop = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        rows: Sequence[int] = self._order[start:stop].tolist()
        return next((row for row in rows if _plain(self._ids, row) == raw_id), None)


def _hashes(ids: Strings) -> NDArray[np.int64]:
    return np.fromiter((hash(ids[row]) for row in range(len(ids))), np.int64, len(ids))


def _user_ids(tensors: OnnxTensors) -> NDArray[np.int64] | Strings:
    """Raw user ids in row order, out of what the graph looks rows up in."""
    if "user_id" in tensors.encoder_keys:
        return tensors.encoder_keys["user_id"]
    stored = tensors.arrays
    first = int(stored["user_first_id"])
    if "user_of_place" not in stored:
        return np.arange(first, int(stored["user_last_id"]) + 1)
    rows = stored["user_of_place"]
    places = np.flatnonzero(rows < stored["n_users"])
    ids = np.empty(len(places), np.int64)
    ids[rows[places]] = first + places
    return ids


def _item_ids(tensors: OnnxTensors) -> NDArray[np.int64] | Strings:
    """Raw item ids in row order, out of what the graph makes them from."""
    if "item_ids" in tensors.initializers:
        return tensors.initializers["item_ids"]
    stored = tensors.arrays
    first = int(stored["item_id_first"])
    places = stored["item_id_places"] if "item_id_places" in stored else np.arange(int(stored["n_items"]))
    return first + places.astype(np.int64)


def _plain(ids: NDArray[np.int64] | Strings, row: int) -> int | str:
    return ids[row] if isinstance(ids, Strings) else int(ids[row])
