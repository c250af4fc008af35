"""Retriever: raw user ids in, the best items out, from a checked bundle.

Needs numpy and onnxruntime. Whether a session keeps one float32 vector per item, which makes a request fast, or the
compressed tables alone, is the bundle's own (`runtime` in its manifest).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.bundle import METADATA, MODEL, BundleError, check_bundle, identity
from serving.session import ORT_TYPES, bound_run, check_options, first_line, open_session

# Scores of one chunk of users; ONNX Runtime holds about three times as much while it runs.
_CHUNK_SCORE_BYTES = 64 * 2**20
_MAX_CHUNK_USERS = 4096
# Up to so many users what a request needs is small, and is kept for the next one.
_FEW_USERS = 24


@dataclass(frozen=True, eq=False)
class Recommendations:
    """Answers in the order of the users asked for.

    Attributes:
        item_ids: one array of raw item ids per user, best first, int64 or object holding str. Each holds k
            items, fewer when the catalogue less the excluded items has fewer.
        scores: one float32 array per user, of the same length as its items.
        known: bool, shape (n_users,); False where the model has never seen the user and answered like for the
            average one.
    """

    item_ids: list[NDArray]
    scores: list[NDArray[np.float32]]
    known: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of candidates, in the order of the users and items asked for.

    Attributes:
        scores: float32, shape (n_users, n_candidates).
        known: bool, shape (n_users,); False where the model has never seen the user.
        known_items: bool, shape (n_users, n_candidates); False where the model has never seen the item, and scored it
            like the average one.
    """

    scores: NDArray[np.float32]
    known: NDArray[np.bool_]
    known_items: NDArray[np.bool_]


class Retriever:
    """A loaded bundle.

    Args:
        path: the bundle's folder.
        provider: "cuda", "cpu", or "auto": CUDA where a session really gets it, else the CPU.
        threads: CPU threads of one request; None leaves it to ONNX Runtime (one per core).
        profile: begin of the name of a file for ONNX Runtime's profile, see :meth:`end_profiling`; None: none is written.

    Attributes:
        manifest: as in serving.bundle.
        provider: "cuda" or "cpu", the one in use.

    Raises:
        BundleError: the bundle fails its check, ONNX Runtime cannot load it, or CUDA was asked for and is not
            in use.
    """

    def __init__(
        self,
        path: Path | str,
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        profile: Path | None = None,
    ) -> None:
        check_options(provider, threads)
        self.path = Path(path)
        self.manifest = check_bundle(self.path)
        if self.manifest["task"] != "retrieval":
            raise BundleError(
                f"{self.path}: made for the task {self.manifest['task']!r}, not 'retrieval'; pass a retrieval bundle"
            )
        self._session = open_session(self.path / MODEL, provider, threads, profile)
        self.provider = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self._check_signature()
        self._check_identity()
        self.n_users: int = self.manifest["n_users"]
        self.n_items: int = self.manifest["n_items"]

    def recommend(self, user_ids: Sequence, k: int = 20, exclude: Sequence[Sequence] | None = None) -> Recommendations:
        """The k best items of each user; equal scores go to the lower item row.

        Users are scored in chunks, so memory beyond the answers does not grow with their number.

        Args:
            user_ids: raw ids of the type the model was trained on, shape (n_users,). Unknown ones are
                answered, see `known`.
            k: at least 1; more than the catalogue gives all of it.
            exclude: for each user, raw item ids not to recommend; unknown ids and repeats are ignored.

        Raises:
            ValueError: ids of another type, k below 1, or `exclude` of another length than `user_ids`.
        """
        types = self.manifest["id_types"]
        users = _as_ids(user_ids, types["user_id"], "user_ids")
        k = _as_k(k, self.n_items)
        if exclude is not None:
            if isinstance(exclude, str | bytes) or not hasattr(exclude, "__len__"):
                raise ValueError(f"exclude is {exclude!r:.60}; pass one list of item ids per user")
            if len(exclude) != len(users):
                raise ValueError(
                    f"exclude has {len(exclude)} lists for {len(users)} users; pass one list of item ids per user"
                )
        item_ids: list[NDArray] = []
        scores: list[NDArray[np.float32]] = []
        known = np.empty(len(users), np.bool_)
        step = max(1, min(_MAX_CHUNK_USERS, _CHUNK_SCORE_BYTES // (4 * (self.n_items + 1))))
        for start in range(0, len(users), step):
            stop = min(start + step, len(users))
            padded = self._pad([] if exclude is None else exclude[start:stop], start, stop)
            feed = {"user_id": users[start:stop], "k": np.array(k, np.int64), "exclude_item_id": padded}
            ids, values, known[start:stop] = self._run(["item_id", "score", "known"], feed)
            # Excluded items score -inf and so come last, where the catalogue has run out.
            counts = (values > -np.inf).sum(axis=1)
            item_ids += [row[:n] for row, n in zip(ids, counts, strict=True)]
            scores += [row[:n] for row, n in zip(values, counts, strict=True)]
        return Recommendations(item_ids, scores, known)

    def score(self, user_ids: Sequence, item_ids: Sequence[Sequence]) -> Scores:
        """Scores of the items asked for, each user's own; the catalogue is not scanned.

        Users and candidates are scored in chunks, so memory beyond the answers does not grow with their number.

        Args:
            user_ids: raw ids as for :meth:`recommend`, shape (n_users,).
            item_ids: raw ids of the candidates, shape (n_users, n_candidates): as many for every user. Repeats are scored
                each, unknown ones are answered, see `known_items`.

        Raises:
            ValueError: ids of another type, or lists that are not as many as users, or not of one length.
            BundleError: the bundle is of format 1, which has no candidates.
        """
        if "candidate_score" not in self.manifest["outputs"]:
            raise BundleError(
                f"{self.path}: a bundle of format {self.manifest['format_version']} scores no candidates; export it again"
            )
        types = self.manifest["id_types"]
        users = _as_ids(user_ids, types["user_id"], "user_ids")
        items = _as_matrix(item_ids, types["item_id"], len(users))
        scores, known_items = np.empty(items.shape, np.float32), np.empty(items.shape, np.bool_)
        known = np.empty(len(users), np.bool_)
        bytes_each = 4 * self.manifest["dim"] * (self.manifest["indices_per_id"]["items"] + 1)
        most = max(1, _CHUNK_SCORE_BYTES // bytes_each)
        width = max(1, min(items.shape[1], most))
        height = max(1, min(_MAX_CHUNK_USERS, most // width))
        none = np.empty((0, 0), items.dtype)
        for start in range(0, len(users), height):
            # Without candidates there is still the question of who is known.
            for left in range(0, max(1, items.shape[1]), width):
                part = np.s_[start : start + height, left : left + width]
                feed = {
                    "user_id": users[part[0]],
                    "k": np.array(0, np.int64),
                    "exclude_item_id": none,
                    "candidate_item_id": items[part],
                }
                outputs = ["candidate_score", "candidate_known", "known"]
                scores[part], known_items[part], known[part[0]] = self._run(outputs, feed)
        return Scores(scores, known, known_items)

    def end_profiling(self) -> str:
        """Write the profile, a JSON file in Chrome's trace format, and return its path."""
        return self._session.end_profiling()

    def _check_identity(self) -> None:
        """The graph itself says what it is of, where the format has it."""
        stated = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        if self.manifest["format_version"] > 1 and stated != identity(self.manifest):
            raise BundleError(f"{self.path}: manifest and model are of different bundles; export the bundle again")

    def _run(self, outputs: list[str], feed: dict[str, NDArray]) -> list[NDArray]:
        try:
            # ONNX Runtime binds no strings; it copies the other inputs itself then.
            if self.provider == "cuda" and "string" not in self.manifest["id_types"].values():
                return self._run_bound(outputs, feed, "cuda")
            return self._session.run(outputs, feed, self._run_options(len(feed["user_id"])))
        except Exception as error:  # onnxruntime's own classes have no common base but Exception.
            raise BundleError(
                f"{self.path}: ONNX Runtime failed ({first_line(error)}); ask for fewer users or items at a time"
            ) from error

    def _run_options(self, n_users: int) -> onnxruntime.RunOptions | None:
        """A compressed bundle is there to save memory: what a request of many users worked with goes back to the system."""
        if (
            n_users <= _FEW_USERS
            or self.manifest.get("runtime", {}).get("mode") != "compressed"
            or self.provider == "cuda"
        ):
            return None
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _run_bound(self, outputs: list[str], feed: dict[str, NDArray], device: str) -> list[NDArray]:
        return bound_run(self._session, outputs, feed, device)

    def _pad(self, exclude: Sequence[Sequence], start: int, stop: int) -> NDArray:
        """Ragged lists as one array, shape (stop - start, longest list), filled up with an id of no item."""
        kind = self.manifest["id_types"]["item_id"]
        rows = [_as_ids(ids, kind, f"exclude[{start + i}]") for i, ids in enumerate(exclude)]
        shape = (stop - start, max(map(len, rows), default=0))
        padded = np.full(shape, self.manifest["padding_item_id"], np.int64 if kind == "int64" else object)
        for row, ids in zip(padded, rows, strict=False):
            row[: len(ids)] = ids
        return padded

    def _check_signature(self) -> None:
        """The manifest speaks for the graph, so they must agree on every name and type."""
        sides = (
            ("inputs", self._session.get_inputs()),
            ("optional_inputs", self._session.get_overridable_initializers()),
            ("outputs", self._session.get_outputs()),
        )
        for side, nodes in sides:
            # Format 1 has no optional inputs.
            stated = {name: ORT_TYPES.get(spec["dtype"]) for name, spec in self.manifest.get(side, {}).items()}
            actual = {node.name: node.type for node in nodes}
            if stated != actual:
                raise BundleError(
                    f"{self.path}: the manifest states {side} {stated}, the model has {actual}; export the bundle again"
                )


def _as_k(k: Any, n_items: int) -> int:
    try:
        value = operator.index(k)
    except TypeError:
        raise ValueError(f"k is {k!r}; pass a whole number from 1") from None
    if isinstance(k, bool) or value < 1:
        raise ValueError(f"k is {k!r}; pass a whole number from 1")
    return min(value, n_items)


def _as_ids(ids: Any, kind: str, name: str) -> NDArray:
    """Ids as int64 or as an object array of str, shape (n,); nothing is converted that could mean another
    id."""
    array = np.asarray(ids) if hasattr(ids, "__array__") else None
    if (
        isinstance(ids, str | bytes)
        or not (hasattr(ids, "__len__") or array is not None)
        or (array is not None and array.ndim != 1)
    ):
        raise ValueError(f"{name} is {ids!r:.60}; pass a list of {kind} ids")
    if array is None or array.dtype.kind not in "biufU":
        # A list goes in value by value: numpy would turn [1, "a"] into strings, and [1, True] into integers.
        array = np.fromiter(ids, object, count=len(ids))
    if array.size == 0:
        return np.empty(0, np.int64 if kind == "int64" else object)
    return _as_int64(array, name) if kind == "int64" else _as_strings(array, name)


def _as_matrix(lists: Any, kind: str, n_users: int) -> NDArray:
    """Candidates as int64 or as an object array of str, shape (n_users, n)."""
    array = np.asarray(lists) if hasattr(lists, "__array__") else None
    if (
        isinstance(lists, str | bytes)
        or not (hasattr(lists, "__len__") or array is not None)
        or (array is not None and array.ndim == 0)
    ):
        raise ValueError(f"item_ids is {lists!r:.60}; pass one list of item ids per user")
    rows = lists if array is None else array
    if len(rows) != n_users:
        raise ValueError(f"item_ids has {len(rows)} lists for {n_users} users; pass one list of item ids per user")
    if array is not None and array.ndim == 2 and array.dtype.kind in "iuU":
        return _as_ids(array.ravel(), kind, "item_ids").reshape(array.shape)
    converted = [_as_ids(ids, kind, f"item_ids[{i}]") for i, ids in enumerate(rows)]
    lengths = {len(row) for row in converted}
    if len(lengths) > 1:
        raise ValueError(
            f"item_ids has lists of {min(lengths)} to {max(lengths)} items; pass as many for every user, or ask in parts"
        )
    if not converted:
        return np.empty((0, 0), np.int64 if kind == "int64" else object)
    return np.stack(converted)


def _as_int64(array: NDArray, name: str) -> NDArray[np.int64]:
    if array.dtype.kind == "O":
        _refuse_others(array, (int, np.integer), "int64", name)
    elif array.dtype.kind not in "iu":
        raise ValueError(f"{name}[0] is {array[0].item()!r}; this model takes int64 ids")
    low, high = array.min(), array.max()
    if int(low) < -(2**63) or int(high) > 2**63 - 1:
        raise ValueError(f"{name} spans {low}..{high}, which leaves int64; ids are -2^63..2^63-1")
    return array.astype(np.int64)


def _as_strings(array: NDArray, name: str) -> NDArray[np.object_]:
    if array.dtype.kind == "U":
        array = array.astype(object)
    if array.dtype.kind != "O":
        raise ValueError(f"{name}[0] is {array[0].item()!r}; this model takes string ids, pass str values")
    _refuse_others(array, (str,), "string", name)
    try:
        "".join(array).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {error.object[error.start]!a} cannot be written as UTF-8; pass valid text") from None
    return array


def _refuse_others(array: NDArray, types: tuple[type, ...], kind: str, name: str) -> None:
    for i, value in enumerate(array):
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(f"{name}[{i}] is {value!r:.60}; this model takes {kind} ids")
