"""Raw ids of a request, checked, as the tensors that a retrieval model takes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.values import text_of, whole_number

# A sequence of int or str, or an array of them, shape (n,).
RawIds = Sequence[Any] | NDArray


def checked_k(k: Any, n_items: int) -> int:
    """`k` as an int, at most `n_items`; InputError unless it is a whole number from 1."""
    try:
        value = operator.index(k)
    except TypeError:
        raise InputError(f"k is {k!r}; pass a whole number from 1") from None
    if isinstance(k, bool) or value < 1:
        raise InputError(f"k is {k!r}; pass a whole number from 1")
    return min(value, n_items)


def as_id_array(ids: Any, kind: str, name: str) -> NDArray:
    """Ids as int64 or as an object array of str, shape (n,); no value is converted that could mean another id.

    Args:
        kind: "int64" or "string".
        name: of the argument, for errors.

    Raises:
        InputError: not a flat sequence of ids of this kind; one line with the first wrong value.
    """
    array = np.asarray(ids) if hasattr(ids, "__array__") else None
    if (
        isinstance(ids, str | bytes)
        or not (hasattr(ids, "__len__") or array is not None)
        or (array is not None and array.ndim != 1)
    ):
        raise InputError(f"{name} is {ids!r:.60}; pass a list of {kind} ids")
    if array is None or array.dtype.kind not in "biufU":
        # A list goes in value by value: numpy would turn [1, "a"] into strings, and [1, True] into integers.
        array = np.fromiter(ids, object, count=len(ids))
    if array.size == 0:
        return np.empty(0, np.int64 if kind == "int64" else object)
    return _as_int64(array, name) if kind == "int64" else _as_strings(array, name)


def as_id_matrix(lists: Any, kind: str, n_users: int) -> NDArray:
    """Candidates as int64 or as an object array of str, shape (n_users, n).

    Raises:
        InputError: not one list per user, lists of several lengths, or as :func:`as_id_array`.
    """
    array = np.asarray(lists) if hasattr(lists, "__array__") else None
    if (
        isinstance(lists, str | bytes)
        or not (hasattr(lists, "__len__") or array is not None)
        or (array is not None and array.ndim == 0)
    ):
        raise InputError(f"item_ids is {lists!r:.60}; pass one list of item ids per user")
    rows = lists if array is None else array
    if len(rows) != n_users:
        raise InputError(f"item_ids has {len(rows)} lists for {n_users} users; pass one list of item ids per user")
    if array is not None and array.ndim == 2 and array.dtype.kind in "iuU":
        return as_id_array(array.ravel(), kind, "item_ids").reshape(array.shape)
    converted = [as_id_array(ids, kind, f"item_ids[{i}]") for i, ids in enumerate(rows)]
    lengths = {len(row) for row in converted}
    if len(lengths) > 1:
        raise InputError(
            f"item_ids has lists of {min(lengths)} to {max(lengths)} items; pass as many for every user, or ask in parts"
        )
    if not converted:
        return np.empty((0, 0), np.int64 if kind == "int64" else object)
    return np.stack(converted)


def _as_int64(array: NDArray, name: str) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu":
        return _by_rule(array, whole_number, "int64", name).astype(np.int64)
    low, high = array.min(), array.max()
    if int(low) < -(2**63) or int(high) > 2**63 - 1:
        raise InputError(f"{name} spans {low}..{high}, which leaves int64; ids are -2^63..2^63-1")
    return array.astype(np.int64)


def _as_strings(array: NDArray, name: str) -> NDArray[np.object_]:
    texts = _by_rule(array, text_of, "string", name)
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {error.object[error.start]!a} cannot be written as UTF-8; pass valid text") from None
    return texts


def _by_rule(array: NDArray, rule: Callable[[Any], Any], kind: str, name: str) -> NDArray[np.object_]:
    found = np.empty(len(array), object)
    for i, value in enumerate(array):
        decided = None if isinstance(value, (bool, np.bool_)) or _is_nan(value) else rule(value)
        if decided is None:
            value = value.item() if isinstance(value, np.generic) else value
            if isinstance(value, int) and not isinstance(value, bool):
                raise InputError(f"{name}[{i}] is {value}, which leaves int64; ids are -2^63..2^63-1")
            raise InputError(f"{name}[{i}] is {value!r:.60}; this model takes {kind} ids")
        found[i] = decided
    return found


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and bool(value != value)
