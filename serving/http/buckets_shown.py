"""Which rows of the tables a user reads, and which items read the same: for the page of `graphhash serve`.

Reads the bucket maps from the bundle's graph, under the names that export gives them (pipeline/export):
`user_rows`, `item_rows`, `SIDE_codebook` and `SIDE_codes` for weights, `shared_table` where users and items have
one table. A side without rows has a vector for each id, and no buckets.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import BundleError
from serving.http.answers import id_from_text
from serving.http.onnx_tensors import OnnxTensors, Strings, read_tensors
from serving.manifest import MANIFEST, MODEL
from serving.retriever import Retriever

N_SHOWN_ITEMS = 8


class BucketsShown:
    """The maps of one bundle, which stay in the file until they are asked for.

    Args:
        bundle: a checked bundle.

    Attributes:
        shared: whether users and items read rows of one table, so that a bucket of a user has items.

    Raises:
        ValueError: the model is no well-formed ONNX file, or lacks the ids.
    """

    def __init__(self, bundle: Path) -> None:
        tensors = read_tensors(bundle / MODEL)
        try:
            self.user_ids = _user_ids(tensors)
            self.item_ids = _item_ids(tensors)
        except KeyError as error:
            raise ValueError(f"it has no tensor {error}") from None
        self._tensors = tensors.arrays
        self.shared = "shared_table" in self._tensors

    def random_user(self, rng: np.random.Generator) -> int | str:
        """A known raw user id."""
        return _plain(self.user_ids, int(rng.integers(len(self.user_ids))))

    def buckets(self, side: str, entry: int) -> dict[int, float]:
        """Bucket -> weight of the map entry of one id, largest weight first; empty where ids have rows of their own.

        Args:
            side: "user" or "item".
            entry: row of the id; the number of ids for out-of-vocabulary ones.
        """
        rows, weights = self._rows(side), self._weights(side, entry)
        if rows is None:
            return {}
        sums: dict[int, float] = {}
        for bucket, weight in zip(rows[entry].tolist(), weights.tolist(), strict=True):
            sums[bucket] = sums.get(bucket, 0.0) + weight
        return dict(sorted(((b, w) for b, w in sums.items() if w), key=lambda pair: (-pair[1], pair[0])))

    def of_user(self, user_id: int | str) -> list[dict[str, Any]]:
        """The user's buckets, each with the numbers of users and items that read it and some of the items.

        Returns: `{"bucket", "weight", "n_users", "n_items", "items"}` per bucket. `items` are raw ids, those with the
            largest weight first; `n_items` is None and `items` empty where items have a table of their own.
        """
        entry = find(self.user_ids, user_id)
        shown = []
        for bucket, weight in self.buckets("user", len(self.user_ids) if entry is None else entry).items():
            items = self._readers("item", bucket) if self.shared else None
            shown.append(
                {
                    "bucket": bucket,
                    "weight": weight,
                    "n_users": len(self._readers("user", bucket)),
                    "n_items": None if items is None else len(items),
                    "items": [] if items is None else self._heaviest(items, bucket),
                }
            )
        return shown

    def of_item(self, item_id: int | str) -> dict[int, float]:
        """Bucket -> weight of an item that the model knows."""
        entry = find(self.item_ids, item_id)
        return {} if entry is None else self.buckets("item", entry)

    def n_item_readers(self, bucket: int) -> int:
        """How many items read a bucket of their table."""
        return len(self._readers("item", bucket))

    def _rows(self, side: str) -> NDArray | None:
        rows = self._tensors.get(f"{side}_rows")
        if rows is None:
            return None
        rows = rows.reshape(len(rows), -1)
        # Places in blocks of the table, of one byte each, are stored without the blocks' first rows.
        starts = self._tensors.get(f"{side}_block_starts")
        return rows if starts is None else rows + starts

    def _weights(self, side: str, entry: int | NDArray) -> NDArray[np.float32]:
        codebook = self._tensors.get(f"{side}_codebook")
        if codebook is None:
            rows = self._rows(side)
            return np.ones((*np.shape(entry), 1 if rows is None else rows.shape[1]), np.float32)
        return codebook[self._tensors[f"{side}_codes"][entry]]

    def _readers(self, side: str, bucket: int) -> NDArray[np.int64]:
        """Ids that read a bucket; the entries behind theirs are the OOV entry and padding."""
        rows = self._rows(side)
        assert rows is not None, side
        rows = rows[: len(self.user_ids if side == "user" else self.item_ids)]
        readers = np.flatnonzero((rows == bucket).any(axis=1))
        reads = (rows[readers] == bucket) & (self._weights(side, readers) != 0)
        return readers[reads.any(axis=1)]

    def _heaviest(self, items: NDArray[np.int64], bucket: int) -> list[int | str]:
        rows = self._rows("item")
        assert rows is not None
        weights = np.where(rows[items] == bucket, self._weights("item", items), 0).sum(axis=1)
        best = items[np.argsort(-weights, kind="stable")[:N_SHOWN_ITEMS]]
        return [_plain(self.item_ids, item) for item in best.tolist()]


def find(ids: NDArray[np.int64] | Strings, wanted: int | str) -> int | None:
    """Row of a raw id, or None."""
    if isinstance(ids, Strings):
        return ids.find(str(wanted))
    found = np.flatnonzero(ids == wanted)
    return int(found[0]) if len(found) else None


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


class Explainer:
    """A user's answer with its reasons, of the bundle in use, whose maps are read when they are first asked for."""

    def __init__(self) -> None:
        self._of: tuple[str, BucketsShown] | None = None
        self._rng = np.random.default_rng()

    def explain(self, retriever: Retriever, text: str | None, k: int) -> dict[str, Any]:
        """What `/v1/explain` answers, JSON-able, ids as text.

        Args:
            text: the raw user id; None draws a known one.
            k: items.

        Raises:
            ValueError: the id is not of the model's type.
            BundleError: the bundle's files are being replaced.
        """
        if self._of is None or self._of[0] != retriever.name:
            self._of = (retriever.name, _shown(retriever))
        shown = self._of[1]
        kind = retriever.manifest["id_types"]["user_id"]
        user_id = shown.random_user(self._rng) if text is None else id_from_text(text, kind)
        answer = retriever.recommend([user_id], k)
        buckets = shown.of_user(user_id)
        mine = {entry["bucket"] for entry in buckets} if shown.shared else set()
        # Where tables are shared the user's buckets say how many items read them, and counting is not free.
        n_items = functools.cache(lambda b: None if shown.shared else shown.n_item_readers(b))
        items = []
        for item_id, score in zip(answer.item_ids[0].tolist(), answer.scores[0].tolist(), strict=True):
            of_item = shown.of_item(item_id)
            items.append(
                {
                    "item_id": str(item_id),
                    "score": score,
                    "buckets": [
                        {"bucket": b, "weight": w, "with_user": b in mine, "n_items": n_items(b)}
                        for b, w in of_item.items()
                    ],
                }
            )
        return {
            "bundle": retriever.name,
            "user_id": str(user_id),
            "known": bool(answer.known[0]),
            "shared_table": shown.shared,
            "buckets": [{**entry, "items": list(map(str, entry["items"]))} for entry in buckets],
            "items": items,
        }


def _shown(retriever: Retriever) -> BucketsShown:
    """The maps of the loaded bundle: the folder may hold a newer one by now."""
    path, manifest = retriever.path, retriever.manifest
    try:
        shown = BucketsShown(path)
        # After the file is mapped: bundles are only ever replaced by newer ones.
        same = json.loads((path / MANIFEST).read_bytes())["manifest_sha256"] == manifest["manifest_sha256"]
    except (ValueError, OSError, KeyError) as error:
        raise BundleError(f"the bundle's maps cannot be read now ({error}); try again") from error
    if not same:
        raise BundleError("the bundle is being replaced; try again")
    return shown
