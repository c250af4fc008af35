"""Vocabulary: raw ids of the log <-> dense row numbers.

Raw ids are int64 or UTF-8 strings, never both in one vocabulary. The row order is part of the value: it
decides which row of a bucket map or of a CSR belongs to which id, so it is kept exactly as given, saved and
hashed. `from_ids` gives ascending order (strings by their UTF-8 bytes); the constructor takes any order,
because new ids are appended later.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from graphhash.errors import ArgumentError, DataError, first_line


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Unique raw ids in row order.

    Attributes:
        ids: int64, string or large_string, shape (n_ids,), no nulls, no duplicates. The constructor also
            takes a chunked array, a numpy array or a list, and narrows them to one of these types.

    Raises DataError for a null, a duplicate, or ids that are neither integers nor strings.
    """

    ids: pa.Array

    def __post_init__(self) -> None:
        ids = as_ids(self.ids)
        object.__setattr__(self, "ids", ids)
        is_distinct = _ascends(ids) or pc.count_distinct(ids).as_py() == len(ids)
        counts = None if is_distinct else pc.value_counts(ids)
        if counts is not None:
            repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
            raise DataError(f"id {repeated!r} occurs more than once in a vocabulary; pass unique ids, or use from_ids")

    @classmethod
    def from_ids(cls, ids: pa.Array | pa.ChunkedArray | ArrayLike) -> Vocabulary:
        """The unique values of `ids`, ascending (strings by UTF-8 bytes), in any order or chunking."""
        unique = pc.unique(as_ids(ids))
        return cls(unique.take(pc.array_sort_indices(unique)))

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    @property
    def kind(self) -> Literal["int64", "string"]:
        return "int64" if pa.types.is_int64(self.ids.type) else "string"

    @property
    def row_dtype(self) -> type[np.signedinteger]:
        """int32 while every row and the fallback row fit it, int64 beyond."""
        return np.int32 if len(self) < 2**31 else np.int64

    def rows(
        self, ids: pa.Array | pa.ChunkedArray | ArrayLike, missing: Literal["error", "fallback"] = "error"
    ) -> NDArray[np.int32] | NDArray[np.int64]:
        """Row numbers of raw ids, shape (len(ids),), int32 (int64 when the vocabulary has 2^31 ids or more).

        Args:
            ids: raw ids of this vocabulary's kind. Strings cost a pass over the whole vocabulary in each
                call: look up in batches.
            missing: "error" raises DataError naming the first out-of-vocabulary id; "fallback" gives it row len(self).
        """
        if missing not in ("error", "fallback"):
            raise ArgumentError(f"missing is {missing!r}; use 'error' or 'fallback'")
        wanted = as_ids(ids)
        if len(wanted) == 0:
            return np.empty(0, self.row_dtype)
        if pa.types.is_int64(wanted.type) != (self.kind == "int64") and len(self):
            found = "int64" if pa.types.is_int64(wanted.type) else "string"
            raise DataError(
                f"ids are {found} (first {wanted[0].as_py()!r}), the vocabulary holds {self.kind}; cast them"
            )
        if len(self) == 0:
            rows = np.zeros(len(wanted), np.int64)
        elif self.kind == "int64":
            keys = wanted.to_numpy()
            sorted_ids, order = self._sorted
            position = np.minimum(np.searchsorted(sorted_ids, keys), len(self) - 1)
            known = sorted_ids[position] == keys
            rows = np.where(known, position if order is None else order[position], len(self))
        else:
            found_rows = pc.index_in(wanted.cast(self.ids.type), value_set=self.ids)
            rows = found_rows.fill_null(len(self)).to_numpy()
        if missing == "error":
            unknown = np.flatnonzero(rows == len(self))
            if len(unknown):
                raise DataError(
                    f"{len(unknown)} of {len(rows)} ids are not in the vocabulary, the first is "
                    f"{wanted[int(unknown[0])].as_py()!r}; drop them, or pass missing='fallback'"
                )
        return rows.astype(self.row_dtype)

    def take(self, rows: ArrayLike) -> NDArray:
        """Raw ids of rows, same shape as `rows`: int64, or object dtype holding str.

        Raises ArgumentError outside 0..n_ids-1.
        """
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise ArgumentError(f"rows span {rows.min()}..{rows.max()}, the vocabulary has rows 0..{len(self) - 1}")
        taken = self.ids.take(pa.array(rows.ravel().astype(np.int64)))
        return taken.to_numpy(zero_copy_only=False).reshape(rows.shape)

    def only(self, kept: NDArray[np.bool_]) -> Vocabulary:
        """The ids that are marked, shape (n_ids,), in their order."""
        return Vocabulary(self.ids.filter(pa.array(kept)))

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) of kind, order and content; the same for every chunking, offset and string width."""
        digest = hashlib.sha256(f"{self.kind} {len(self)}\n".encode())
        if self.kind == "int64":
            digest.update(np.ascontiguousarray(self.ids.to_numpy(), "<i8").data)
        else:
            offsets, text = string_bytes(self.ids)
            digest.update(np.diff(offsets).astype("<i8").data)
            digest.update(np.ascontiguousarray(text[offsets[0] : offsets[-1]]).data)
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write a parquet file with the one column `id`, in row order."""
        pq.write_table(pa.table({"id": self.ids}), path, compression="zstd")

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read what `save` wrote. Raises DataError for a missing or damaged file."""
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: not a readable vocabulary ({first_line(error)}); run the ingest stage again"
            ) from None
        if table.column_names != ["id"]:
            raise DataError(f"{path}: a vocabulary has one column 'id', not {table.column_names}; run ingest again")
        return cls(table.column("id"))

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """int64 ids ascending, and the row of each (None when the rows are in that order already)."""
        ids = self.ids.to_numpy()
        if np.all(ids[:-1] < ids[1:]):
            return ids, None
        order = np.argsort(ids, kind="stable")
        return ids[order], order


def as_ids(ids: pa.Array | pa.ChunkedArray | ArrayLike) -> pa.Array:
    """One contiguous int64, string or large_string array without nulls; DataError for anything else."""
    if isinstance(ids, pa.ChunkedArray):
        # Chunks are joined as large_string: together they may pass the 2 GiB that string offsets can address.
        wide = pa.large_string() if _is_text(ids.type) else ids.type
        array = pa.chunked_array(ids.cast(wide).chunks, type=wide).combine_chunks()
        array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    elif isinstance(ids, pa.Array):
        array = ids
    else:
        try:
            array = pa.array(ids)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise DataError(f"ids must be all int64 or all strings: {first_line(error)}") from None
    if pa.types.is_null(array.type) and len(array) == 0:
        return array.cast(pa.int64())
    if array.null_count:
        first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{array.null_count} of {len(array)} ids are null, the first at {first}; drop or fill them")
    if pa.types.is_dictionary(array.type):
        return as_ids(array.dictionary_decode())
    if pa.types.is_integer(array.type):
        try:
            return array.cast(pa.int64())
        except pa.ArrowException as error:
            raise DataError(f"ids must fit int64: {first_line(error)}") from None
    if _is_text(array.type):
        fits = array.nbytes < 2**31
        return array.cast(pa.string() if fits else pa.large_string())
    raise DataError(f"ids are {array.type}; cast them to int64 or to strings")


def string_bytes(strings: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets, (n + 1,), into the byte buffer of a (large_)string array without nulls, and that buffer."""
    width = np.int64 if pa.types.is_large_string(strings.type) else np.int32
    _, offsets, data = strings.buffers()
    if offsets is None or len(strings) == 0:
        return np.zeros(len(strings) + 1, np.int64), np.empty(0, np.uint8)
    bounds = np.frombuffer(offsets, width)[strings.offset : strings.offset + len(strings) + 1].astype(np.int64)
    return bounds, np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)


def _ascends(ids: pa.Array) -> bool:
    """Whether each id is above the one before it: then none is there twice."""
    return len(ids) < 2 or bool(pc.all(pc.less(ids.slice(0, len(ids) - 1), ids.slice(1))).as_py())


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
