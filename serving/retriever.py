"""Retriever: raw user ids in, the best items out, from a checked bundle.

Needs numpy and onnxruntime. The bundle decides (`runtime` in its manifest) whether a session keeps one float32 vector per item, which makes
requests fast, or the compressed tables alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.bundle_model import BundleModel, Provider
from serving.errors import InputError
from serving.raw_ids import RawIds, as_id_array, as_id_matrix, checked_k

# Scores of one chunk of users; ONNX Runtime holds about three times as much while it runs.
_CHUNK_SCORE_BYTES = 64 * 2**20
_MAX_CHUNK_USERS = 4096
# Up to this many users, the memory of a request is small, and is kept for the next one.
_FEW_USERS = 24


@dataclass(frozen=True, eq=False)
class Recommendations:
    """Answers in the order of the requested users.

    Attributes:
        item_ids: one array of raw item ids per user, best first, int64 or object holding str. Each holds k
            items, or fewer where fewer are not excluded.
        scores: one float32 array per user, of the same length as its items.
        known: bool, shape (n_users,); False for out-of-vocabulary users, who are answered from the OOV row.
    """

    item_ids: list[NDArray]
    scores: list[NDArray[np.float32]]
    known: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of candidates, in the order of the requested users and items.

    Attributes:
        scores: float32, shape (n_users, n_candidates).
        known: bool, shape (n_users,); False for out-of-vocabulary users.
        known_items: bool, shape (n_users, n_candidates); False for out-of-vocabulary items, which are scored from the OOV row.
    """

    scores: NDArray[np.float32]
    known: NDArray[np.bool_]
    known_items: NDArray[np.bool_]


class Retriever(BundleModel):
    """A retrieval model that is loaded from a bundle; arguments, attributes and errors are those of :class:`BundleModel`.

    Attributes:
        n_users, n_items: in the vocabulary.
    """

    task = "retrieval"
    _run_smaller = "ask for fewer users or items"

    def __init__(
        self, path: Path | str, provider: Provider = "auto", threads: int | None = None, profile: Path | None = None
    ) -> None:
        super().__init__(path, provider, threads, profile)
        self.n_users: int = self.manifest["n_users"]
        self.n_items: int = self.manifest["n_items"]

    @property
    def request_fields(self) -> frozenset[tuple[str, str]]:
        return frozenset(self.manifest["id_types"].items())

    def warm_up(self) -> None:
        self.recommend([0 if self.manifest["id_types"]["user_id"] == "int64" else ""], k=1)

    def recommend(self, user_ids: RawIds, k: int = 20, exclude: Sequence[RawIds] | None = None) -> Recommendations:
        """The k best items of each user; equal scores go to the lower item row.

        Users are scored in chunks, so memory beyond the answers does not grow with their number.

        Args:
            user_ids: raw ids of the type the model was trained on, shape (n_users,). Out-of-vocabulary ones are
                answered, see `known`.
            k: at least 1; more than n_items gives all items.
            exclude: for each user, raw item ids not to recommend; out-of-vocabulary ids and repeats are ignored.

        Raises:
            InputError: ids of another type, k below 1, or `exclude` of another length than `user_ids`.
        """
        types = self.manifest["id_types"]
        users = as_id_array(user_ids, types["user_id"], "user_ids")
        k = checked_k(k, self.n_items)
        if exclude is not None:
            if isinstance(exclude, str | bytes) or not hasattr(exclude, "__len__"):
                raise InputError(f"exclude is {exclude!r:.60}; pass one list of item ids per user")
            if len(exclude) != len(users):
                raise InputError(
                    f"exclude has {len(exclude)} lists for {len(users)} users; pass one list of item ids per user"
                )
        item_ids: list[NDArray] = []
        scores: list[NDArray[np.float32]] = []
        known = np.empty(len(users), np.bool_)
        step = max(1, min(_MAX_CHUNK_USERS, _CHUNK_SCORE_BYTES // (4 * (self.n_items + 1))))
        for start in range(0, len(users), step):
            stop = min(start + step, len(users))
            padded = self._pad([] if exclude is None else exclude[start:stop], start, stop)
            feed = {
                "user_id": users[start:stop],
                "k": np.array(k, np.int64),
                "exclude_item_id": padded,
                "candidate_item_id": np.empty((1, 0), padded.dtype),
            }
            ids, values, known[start:stop] = self.run(
                ["item_id", "score", "known"], feed, self._run_options(len(feed["user_id"]))
            )
            # Excluded items score -inf, and so fill the last slots of users with fewer than k others.
            counts = (values > -np.inf).sum(axis=1)
            item_ids += [row[:n] for row, n in zip(ids, counts, strict=True)]
            scores += [row[:n] for row, n in zip(values, counts, strict=True)]
        return Recommendations(item_ids, scores, known)

    def score(self, user_ids: RawIds, item_ids: Sequence[RawIds] | NDArray) -> Scores:
        """Scores of candidate items, each user's own; no other item is scored.

        Users and candidates are scored in chunks, so memory beyond the answers does not grow with their number.

        Args:
            user_ids: raw ids as for :meth:`recommend`, shape (n_users,).
            item_ids: raw ids of the candidates, shape (n_users, n_candidates): as many for every user. Repeats are scored
                each, out-of-vocabulary ones are answered, see `known_items`.

        Raises:
            InputError: ids of another type, or lists that are not as many as users, or not of one length.
        """
        types = self.manifest["id_types"]
        users = as_id_array(user_ids, types["user_id"], "user_ids")
        items = as_id_matrix(item_ids, types["item_id"], len(users))
        scores, known_items = np.empty(items.shape, np.float32), np.empty(items.shape, np.bool_)
        known = np.empty(len(users), np.bool_)
        bytes_each = 4 * self.manifest["dim"] * (self.manifest["indices_per_id"]["items"] + 1)
        most = max(1, _CHUNK_SCORE_BYTES // bytes_each)
        width = max(1, min(items.shape[1], most))
        height = max(1, min(_MAX_CHUNK_USERS, most // width))
        none = np.empty((0, 0), items.dtype)
        for start in range(0, len(users), height):
            # Without candidates, `known` is still answered.
            for left in range(0, max(1, items.shape[1]), width):
                part = np.s_[start : start + height, left : left + width]
                feed = {
                    "user_id": users[part[0]],
                    "k": np.array(0, np.int64),
                    "exclude_item_id": none,
                    "candidate_item_id": items[part],
                }
                outputs = ["candidate_score", "candidate_known", "known"]
                scores[part], known_items[part], known[part[0]] = self.run(
                    outputs, feed, self._run_options(len(feed["user_id"]))
                )
        return Scores(scores, known, known_items)

    def _run_options(self, n_users: int) -> onnxruntime.RunOptions | None:
        """Compressed bundles are there to save memory: what a request of many users needed goes back to the system."""
        if n_users <= _FEW_USERS or self.manifest["runtime"]["mode"] != "compressed" or self.provider == "cuda":
            return None
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _pad(self, exclude: Sequence[RawIds], start: int, stop: int) -> NDArray:
        """Ragged lists as one array, shape (stop - start, longest list), filled up with an id of no item."""
        kind = self.manifest["id_types"]["item_id"]
        rows = [as_id_array(ids, kind, f"exclude[{start + i}]") for i, ids in enumerate(exclude)]
        shape = (stop - start, max(map(len, rows), default=0))
        padded = np.full(shape, self.manifest["padding_item_id"], np.int64 if kind == "int64" else object)
        for row, ids in zip(padded, rows, strict=False):
            row[: len(ids)] = ids
        return padded
