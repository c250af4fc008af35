"""A CSR graph on disk, cut into ranges of rows that hold about the same number of edges.

A folder of plain .npy files, so that a task can memory-map one shard and read nothing else. `meta.json` is written last: a folder
without it is not a graph. `docs/formats.md` (Graph in shards) lists the files. Shards are written one by one by whoever holds
them (`write_shard`, in Ray tasks) and then declared complete (`finish`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import ArgumentError, DataError
from pipeline.storage.mapped import load_array

FORMAT_VERSION = 1
_REMEDY = "run the ingest stage again"


class ShardFacts(TypedDict):
    """What `write_shard` found, for `finish`. JSON-able, a few hundred bytes."""

    n_rows: int
    n_edges: int
    unit_weights: bool
    total_weight: tuple[int, int]
    files: dict[str, str]


@dataclass(frozen=True)
class ShardedCsr:
    """An opened graph. Make it with `open` or `write`, which check it.

    Attributes:
        path: the folder.
        n_rows, n_cols, n_edges: size of the whole graph.
        starts: row boundaries of the shards, ascending from 0 to n_rows, shape (n_shards + 1,). A shard may
            be empty.
        unit_weights: every weight is 1 and none is stored.
        index_dtype: "int32" or "int64".
        total_weight: sum of the weights, correctly rounded, so the same for every sharding.
        files: sha256 (hex) of each file.
    """

    path: Path
    n_rows: int
    n_cols: int
    n_edges: int
    starts: tuple[int, ...]
    unit_weights: bool
    index_dtype: str
    total_weight: float
    files: dict[str, str]

    @classmethod
    def open(cls, path: Path | str) -> ShardedCsr:
        """Open a folder, reading headers only.

        Raises DataError when a file is missing, short or of another type or shape.
        """
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text())
            version = meta.pop("format_version")
            meta["starts"] = tuple(meta["starts"])
            graph = cls(path=path, **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: no readable graph (meta.json: {error}); {_REMEDY}") from None
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {_REMEDY}")
        starts = np.array(graph.starts)
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != graph.n_rows or np.any(np.diff(starts) < 0):
            raise DataError(f"{path}/meta.json: starts {graph.starts} do not cut {graph.n_rows} rows; {_REMEDY}")
        n_edges = sum(len(graph._array(shard, "indices")) for shard in range(graph.n_shards))
        if n_edges != graph.n_edges:
            raise DataError(f"{path}: shards hold {n_edges} edges, meta.json says {graph.n_edges}; {_REMEDY}")
        for shard in range(graph.n_shards):
            graph._shard(shard)
        return graph

    @classmethod
    def write(cls, path: Path | str, biadjacency: csr_array, *, n_shards: int) -> ShardedCsr:
        """Write a graph held in memory: CSR, indices ascending, no duplicates, weights positive."""
        starts = balanced_starts(np.diff(biadjacency.indptr), n_shards)
        facts = []
        for shard in range(n_shards):
            indptr = biadjacency.indptr[starts[shard] : starts[shard + 1] + 1].astype(np.int64)
            edges = slice(int(indptr[0]), int(indptr[-1]))
            arrays = (indptr - indptr[0], biadjacency.indices[edges], biadjacency.data[edges])
            facts.append(write_shard(path, shard, *arrays, n_cols=biadjacency.shape[1]))
        return finish(path, facts, n_cols=biadjacency.shape[1])

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the files' own sums."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def n_shards(self) -> int:
        return len(self.starts) - 1

    @property
    def shards(self) -> list[tuple[int, int]]:
        """The row range [start, stop) of each shard."""
        return list(zip(self.starts[:-1], self.starts[1:], strict=True))

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.float32]]:
        """Rows [start, stop), 0 <= start <= stop <= n_rows, as CSR arrays; read-only memory maps when one
        shard holds them all.

        Returns: indptr int64 (stop - start + 1,) from 0; indices index_dtype (n,); weights float32 (n,), or
            (0,) for unit weights.
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise ArgumentError(f"rows {start}..{stop} are not within 0..{self.n_rows}")
        indptrs, indices, weights = [np.zeros(1, np.int64)], [], []
        n_before = 0
        for shard, (first, last) in enumerate(self.shards):
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            shard_indptr, shard_indices, shard_weights = self._shard(shard)
            local = shard_indptr[low - first : high - first + 1]
            edges = slice(int(local[0]), int(local[-1]))
            indptrs.append(local[1:] - local[0] + n_before)
            n_before += edges.stop - edges.start
            indices.append(shard_indices[edges])
            weights.append(shard_weights[edges])
        if not indices:
            return indptrs[0], np.empty(0, self.index_dtype), np.empty(0, np.float32)
        if len(indices) == 1:
            return np.concatenate(indptrs), indices[0], weights[0]
        return np.concatenate(indptrs), np.concatenate(indices), np.concatenate(weights)

    def load(self) -> csr_array:
        """The whole graph in memory, (n_rows, n_cols) float32, checked against its sha256 sums first."""
        self.verify()
        indptr, indices, weights = self.read(0, self.n_rows)
        if self.unit_weights:
            weights = np.ones(len(indices), np.float32)
        # Copies: arrays of the caller's own, not read-only maps. scipy needs indptr and indices of one type,
        # and shrinks both to int32 by itself where the edges allow it.
        return csr_array((np.array(weights), np.array(indices), indptr), shape=(self.n_rows, self.n_cols))

    def verify(self) -> None:
        """Read every file and compare its sha256. Raises DataError naming the first that differs."""
        for name, expected in self.files.items():
            found = _sha256(self.path / name)
            if found != expected:
                raise DataError(f"{self.path / name}: sha256 {found[:12]}, meta.json says {expected[:12]}; {_REMEDY}")

    def _array(self, shard: int, name: str) -> NDArray:
        file = self.path / _file_name(shard, name)
        try:
            array = load_array(file)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file}: missing or short ({error}); {_REMEDY}") from None
        dtype = {"indptr": "int64", "indices": self.index_dtype, "weights": "float32"}[name]
        if array.ndim != 1 or array.dtype != dtype:
            raise DataError(f"{file}: holds {array.ndim}-D {array.dtype}, not 1-D {dtype}; {_REMEDY}")
        return array

    def _shard(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.float32]]:
        first, last = self.shards[shard]
        indptr, indices = self._array(shard, "indptr"), self._array(shard, "indices")
        weights = np.empty(0, np.float32) if self.unit_weights else self._array(shard, "weights")
        if len(indptr) != last - first + 1 or indptr[0] != 0 or indptr[-1] != len(indices):
            raise DataError(
                f"{self.path}: shard {shard} has {len(indptr) - 1} rows and {len(indices)} edges, "
                f"not the {last - first} rows of meta.json or the edges of its own indptr; {_REMEDY}"
            )
        if not self.unit_weights and len(weights) != len(indices):
            raise DataError(f"{self.path}: shard {shard}: {len(weights)} weights, {len(indices)} edges; {_REMEDY}")
        return indptr, indices, weights


def balanced_starts(edges_per_row: NDArray[np.integer], n_shards: int) -> NDArray[np.int64]:
    """Row boundaries, shape (n_shards + 1,), that give each shard about the same number of edges."""
    if n_shards < 1:
        raise ArgumentError(f"n_shards is {n_shards}; use 1 or more")
    cumulative = np.cumsum(edges_per_row, dtype=np.int64)
    total = int(cumulative[-1]) if len(cumulative) else 0
    targets = np.arange(1, n_shards, dtype=np.int64) * total // n_shards
    inner = np.searchsorted(cumulative, targets, side="left") + (targets > 0)
    return np.concatenate([[0], np.minimum(inner, len(cumulative)), [len(cumulative)]]).astype(np.int64)


def write_shard(
    path: Path | str,
    shard: int,
    indptr: NDArray[np.integer],
    indices: NDArray[np.integer],
    weights: NDArray | None,
    *,
    n_cols: int,
) -> ShardFacts:
    """Write the files of one shard, creating the folder.

    Args:
        weights: shape (n,), stored as float32; None if all are 1, which are not stored.

    Raises ValueError when a row's indices are not strictly ascending within 0..n_cols-1 or a weight is not
    positive and finite.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if not _ascend_in_rows(indptr, indices) or (len(indices) and (indices.min() < 0 or indices.max() >= n_cols)):
        raise ArgumentError(f"shard {shard}: indices must ascend within each row and lie in 0..{n_cols - 1}")
    arrays = {"indptr": np.asarray(indptr, np.int64), "indices": np.asarray(indices, _index_dtype(n_cols))}
    total = Fraction(len(indices))
    if weights is not None:
        weights = np.asarray(weights, np.float32)
        if not (np.all(weights > 0) and np.all(np.isfinite(weights))) or len(weights) != len(indices):
            raise ArgumentError(
                f"shard {shard}: {len(indices)} edges need as many positive finite weights, got {len(weights)}"
            )
        if not np.all(weights == 1):
            arrays["weights"], total = weights, _exact_sum(weights)
    for name, array in arrays.items():
        np.save(path / _file_name(shard, name), array)
    return ShardFacts(
        n_rows=len(indptr) - 1,
        n_edges=len(indices),
        unit_weights="weights" not in arrays,
        total_weight=(total.numerator, total.denominator),
        files={_file_name(shard, name): _sha256(path / _file_name(shard, name)) for name in arrays},
    )


def finish(path: Path | str, facts: Sequence[ShardFacts], *, n_cols: int) -> ShardedCsr:
    """Declare the shards a graph: write weights of 1 where other shards have others, write meta.json, open it."""
    path = Path(path)
    unit_weights = all(fact["unit_weights"] for fact in facts)
    files: dict[str, str] = {}
    for shard, fact in enumerate(facts):
        files |= fact["files"]
        if fact["unit_weights"] and not unit_weights:
            name = _file_name(shard, "weights")
            np.save(path / name, np.ones(fact["n_edges"], np.float32))
            files[name] = _sha256(path / name)
    meta = {
        "format_version": FORMAT_VERSION,
        "n_rows": sum(fact["n_rows"] for fact in facts),
        "n_cols": n_cols,
        "n_edges": sum(fact["n_edges"] for fact in facts),
        "starts": np.cumsum([0, *(fact["n_rows"] for fact in facts)]).tolist(),
        "unit_weights": unit_weights,
        "index_dtype": np.dtype(_index_dtype(n_cols)).name,
        "total_weight": float(sum((Fraction(*fact["total_weight"]) for fact in facts), Fraction(0))),
        "files": files,
    }
    (path / "meta.json").write_text(json.dumps(meta, indent=1))
    return ShardedCsr.open(path)


def _ascend_in_rows(indptr: NDArray[np.integer], indices: NDArray[np.integer]) -> bool:
    """Whether the indices of each row ascend: they may descend at the first of a row alone."""
    descends = indices[1:] <= indices[:-1]
    starts = indptr[1:-1]
    starts = starts[(starts > 0) & (starts < len(indices)) & (indptr[2:] > starts)]
    return bool(np.count_nonzero(descends) == np.count_nonzero(descends[starts - 1]))


def _file_name(shard: int, name: str) -> str:
    return f"shard-{shard:05d}.{name}.npy"


def _index_dtype(n_cols: int) -> type[np.signedinteger]:
    return np.int32 if n_cols < 2**31 else np.int64


def _exact_sum(weights: NDArray[np.float32]) -> Fraction:
    """The sum without rounding, so that it does not depend on where the shards were cut."""
    mantissas, exponents = np.frexp(weights)
    # A float32 mantissa times 2^24 is an integer; fewer than 2^29 of them add up exactly in float64.
    sums = np.zeros(512)
    for part in range(0, len(weights), 2**28):
        span = slice(part, part + 2**28)
        partial = np.bincount(exponents[span] + 256, weights=mantissas[span].astype(np.float64) * 2**24, minlength=512)
        sums = sums + partial
    return sum(
        (Fraction(int(value)) * Fraction(2) ** (int(e) - 256 - 24) for e, value in enumerate(sums) if value),
        Fraction(0),
    )


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: missing ({error.strerror}); {_REMEDY}") from None
