"""Tables and bucket maps in ONNX graphs, stored in small types, and the nodes that read vectors from them.

table = Table.add(graph, "user", array, "int8")
stored = StoredMap.add(graph, "user", bucket_map)
vectors = read_vectors(graph, "user", table, stored, row)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.quantization import STEPS, pack_nibbles, quantize_rows
from graphhash.maps.vector_codes import VectorCodes
from pipeline.export.graph import Graph
from serving.errors import BundleError


@dataclass(frozen=True)
class Table:
    """A stored table: its values, or codes of 8 bits or, two to a byte, of 4, and a float16 scale per row, whose product they are."""

    values: str
    scales: str | None
    precision: str
    shape: tuple[int, int]

    @classmethod
    def add(cls, graph: Graph, name: str, table: NDArray[np.float32], precision: str) -> Table:
        """Store a table, shape (n_rows, dim), as `{name}_table` (and `{name}_scales`).

        Raises:
            BundleError: a value is not finite in `precision`.
        """
        if precision not in STEPS:
            return cls(
                graph.constant(f"{name}_table", as_stored(table, f"{name} table", precision)),
                None,
                precision,
                table.shape,
            )
        try:
            codes, scales = quantize_rows(table, precision)
        except ValueError as error:
            raise BundleError(
                f"{name} table holds {error}; train with a lower learning rate, or use float32"
            ) from error
        packed = pack_nibbles(codes) if precision == "int4" else codes
        return cls(
            graph.constant(f"{name}_table", packed), graph.constant(f"{name}_scales", scales), precision, table.shape
        )

    def read(self, graph: Graph, name: str, part_of: Callable[[str], str]) -> tuple[str, str | None]:
        """Values as float32, shape (..., dim), and scales, shape (..., 1), of the rows that `part_of` takes out of both."""
        values, scales = part_of(self.values), None
        if self.precision != "float32":
            values = graph.cast(values, f"{name}_read_values", TensorProto.FLOAT)
        if self.precision == "int4":
            values = self._codes(graph, name, values)
        if self.scales is not None:
            scales = graph.cast(part_of(self.scales), f"{name}_read_scales", TensorProto.FLOAT)
        return values, scales

    def unpacked(self, graph: Graph, name: str) -> Table:
        """The whole table in float32, as an expression of constants, which ONNX Runtime computes when it loads the graph."""
        values, scales = self.read(graph, f"{name}_whole", lambda stored: stored)
        return Table(_scaled(graph, f"{name}_whole", values, scales), None, "float32", self.shape)

    def _codes(self, graph: Graph, name: str, packed: str) -> str:
        """Codes of packed rows, shape (..., dim): in float32, because not every provider has bit operations."""
        sixteenth, sixteen, zero = (
            graph.constant(f"{name}_{what}", np.float32(value))
            for what, value in (("16th", 1 / 16), ("16", 16), ("code_0", 8))
        )
        high = graph.node("Floor", [graph.node("Mul", [packed, sixteenth], f"{name}_high_part")], f"{name}_high")
        low = graph.node("Sub", [packed, graph.node("Mul", [high, sixteen], f"{name}_high_16")], f"{name}_low")
        codes = graph.node("Concat", [low, high], f"{name}_nibbles", axis=-1)
        if self.shape[1] % 2:
            ends = [graph.constant(f"{name}_dim", np.array([self.shape[1]], np.int64)), graph.axis(-1)]
            codes = graph.node("Slice", [codes, graph.axis(0), *ends], f"{name}_nibbles_of_dim")
        return graph.node("Sub", [codes, zero], f"{name}_int4_values")


@dataclass(frozen=True)
class CodeTable:
    """Vectors stored as codes of one byte (``graphhash.maps.vector_codes``), codebooks, and a rotation in float16."""

    codes: str
    starts: str
    codebooks: Table
    rotation: str | None
    shape: tuple[int, int]
    n_groups: int
    n_codes: int

    @classmethod
    def add(cls, graph: Graph, name: str, stored: VectorCodes) -> CodeTable:
        """Store the codes as `{name}_codes_of_ids`, with `{name}_codebooks_table`, its `{name}_codebooks_scales` in small types, and, where
        there is one, `{name}_rotation`. Of users and items that share them, they are `shared_codebooks_table` and `shared_rotation`.

        Raises:
            BundleError: a codeword is not finite in its precision.
        """
        n_codes, n_codewords, length = stored.codebooks.shape
        of_books = "shared" if stored.shared else name
        flat = stored.codebooks.reshape(n_codes * n_codewords, length)
        books = Table.add(graph, f"{of_books}_codebooks", flat, stored.precision)
        rotation = None
        if stored.rotation is not None:
            rotation = graph.constant(
                f"{of_books}_rotation", as_stored(stored.rotation, f"{of_books} rotation", "float16")
            )
        # A codeword's row among those of all codebooks.
        starts = graph.constant(f"{of_books}_codebook_starts", (np.arange(n_codes) * n_codewords).astype(np.int32))
        codes = graph.constant(f"{name}_codes_of_ids", stored.codes)
        return cls(codes, starts, books, rotation, stored.shape, stored.n_groups, n_codes)

    def read(self, graph: Graph, name: str, part_of: Callable[[str], str]) -> tuple[str, None]:
        """Vectors as float32, shape (n, dim), of the rows that `part_of` takes out of the codes; there are no scales."""
        codes = graph.cast(part_of(self.codes), f"{name}_codes_read", TensorProto.INT32)
        words = graph.node("Add", [codes, self.starts], f"{name}_words")
        values, scales = self.codebooks.read(
            graph, f"{name}_codewords", lambda part: graph.node("Gather", [part, words], f"{name}_{part}_read", axis=0)
        )
        vectors = _scaled(graph, f"{name}_codewords", values, scales)
        dim = self.shape[1]
        if self.n_codes > self.n_groups:
            terms = np.array([-1, self.n_groups, self.n_codes // self.n_groups, dim // self.n_groups], np.int64)
            vectors = graph.node("Reshape", [vectors, graph.constant(f"{name}_group_shape", terms)], f"{name}_groups")
            vectors = graph.node("ReduceSum", [vectors, graph.axis(2)], f"{name}_sums", keepdims=0)
        shape = graph.constant(f"{name}_vector_shape", np.array([-1, dim], np.int64))
        vectors = graph.node("Reshape", [vectors, shape], f"{name}_decoded")
        if self.rotation is None:
            return vectors, None
        rotation = graph.cast(self.rotation, f"{name}_rotation_read", TensorProto.FLOAT)
        return graph.node("MatMul", [vectors, rotation], f"{name}_rotated"), None

    def unpacked(self, graph: Graph, name: str) -> CodeTable:
        """Itself: an id's vector is decoded where it is read."""
        return self


def add_table(graph: Graph, name: str, table: NDArray[np.float32] | VectorCodes, precision: str) -> Table | CodeTable:
    """Store a table by :meth:`Table.add`, or codes by :meth:`CodeTable.add`, whose precision is their own."""
    if isinstance(table, VectorCodes):
        return CodeTable.add(graph, name, table)
    return Table.add(graph, name, table, precision)


@dataclass(frozen=True)
class StoredResidual:
    """What vectors of ids have beside table rows: numbers of the id's own, shape (n_entries, own_dim), times a float32 projection."""

    own: Table
    projection: str


@dataclass(frozen=True)
class StoredMap:
    """Names of a bucket map's tensors; None for rows: an id's row is its number; None for codebook and codes: weights are 1.

    ``residual`` is added to the vectors that are read through the map.
    """

    rows: str | None
    codebook: str | None
    codes: str | None
    indices_per_id: int
    residual: StoredResidual | None = None

    @classmethod
    def add(cls, graph: Graph, name: str, bucket_map: BucketMap, n_entries: int | None = None) -> StoredMap:
        """Store a map as `{name}_rows`, `{name}_codebook` and `{name}_codes`.

        Args:
            n_entries: at least n_ids + 1: the OOV entry is repeated up to so many.
        """
        if bucket_map.identity:
            return cls(None, None, None, 1)
        padding = 0 if n_entries is None else n_entries - len(bucket_map.rows)
        stored = np.pad(bucket_map.rows.astype(bucket_map.rows_dtype), ((0, padding), (0, 0)), mode="edge")
        if bucket_map.codebook is None or bucket_map.codes is None:
            # One index per id without a weight is a plain Gather, and needs no axis of its own.
            return cls(graph.constant(f"{name}_rows", stored[:, 0]), None, None, 1)
        return cls(
            graph.constant(f"{name}_rows", stored),
            graph.constant(f"{name}_codebook", bucket_map.codebook),
            graph.constant(f"{name}_codes", np.pad(bucket_map.codes, (0, padding), mode="edge")),
            bucket_map.indices_per_id,
        )


# An id's row is its number.
IDENTITY = StoredMap(None, None, None, 1)
Entry = str | Callable[[Graph, str], str] | None


def read_vectors(graph: Graph, name: str, table: Table | CodeTable, stored: StoredMap, entry: Entry) -> str:
    """Vectors of map entries: float32, shape (n, dim).

    Args:
        entry: a tensor of their numbers, int64, shape (n,); or a function that cuts them out of a stored array, which it
            gets with the graph; None: all of them.
    """
    vectors, is_row = _read_rows(graph, name, table, stored, entry)
    if is_row:
        vectors = graph.node("Squeeze", [vectors, graph.axis(1)], f"{name}_vectors")
    if stored.residual is None:
        return vectors
    own, _ = _read_rows(graph, f"{name}_own", stored.residual.own, IDENTITY, entry)
    residual = graph.node("MatMul", [own, stored.residual.projection], f"{name}_residual")
    return graph.node("Add", [vectors, residual], f"{name}_with_residual")


def read_field(graph: Graph, name: str, table: Table | CodeTable, stored: StoredMap, entry: Entry) -> str:
    """As :func:`read_vectors` of a map without a residual, with the shape (n, 1, dim)."""
    assert stored.residual is None
    vectors, is_row = _read_rows(graph, name, table, stored, entry)
    return vectors if is_row else graph.node("Unsqueeze", [vectors, graph.axis(1)], f"{name}_rows")


def _read_rows(graph: Graph, name: str, table: Table | CodeTable, stored: StoredMap, entry: Entry) -> tuple[str, bool]:
    """Vectors, float32, shape (n, dim), and False; or of shape (n, 1, dim), and True, as the product with the weights has it."""

    def of_entry(part: str) -> str:
        if entry is None:
            return part
        return (
            entry(graph, part)
            if callable(entry)
            else graph.node("Gather", [part, entry], f"{name}_{part}_of_entry", axis=0)
        )

    if stored.rows is None:
        return _scaled(graph, name, *table.read(graph, name, of_entry)), False
    # Gather takes int32 or int64 indices.
    rows = graph.cast(of_entry(stored.rows), f"{name}_buckets", TensorProto.INT32)
    values, scales = table.read(
        graph, name, lambda part: graph.node("Gather", [part, rows], f"{name}_{part}_read", axis=0)
    )
    if stored.codebook is None or stored.codes is None:
        return _scaled(graph, name, values, scales), False
    codes = graph.cast(of_entry(stored.codes), f"{name}_code", TensorProto.INT32)
    # (n, 1, indices_per_id) @ (n, indices_per_id, dim): no second array of the size of what was read.
    codebook = graph.node("Unsqueeze", [stored.codebook, graph.axis(1)], f"{name}_codebook_rows")
    weights = graph.node("Gather", [codebook, codes], f"{name}_weights", axis=0)
    if scales is not None:
        # A number per row that is read, where the values are dim of them.
        scales = graph.node("Squeeze", [scales, graph.axis(2)], f"{name}_scales_of_rows")
        scales = graph.node("Unsqueeze", [scales, graph.axis(1)], f"{name}_scales_row")
        weights = graph.node("Mul", [weights, scales], f"{name}_weights_scaled")
    return graph.node("MatMul", [weights, values], f"{name}_weighted_sum"), True


def _scaled(graph: Graph, name: str, values: str, scales: str | None) -> str:
    return values if scales is None else graph.node("Mul", [values, scales], f"{name}_vectors")


def as_stored(array: NDArray, name: str, dtype: str) -> NDArray:
    """`array` in `dtype`; BundleError where a value is not finite in it."""
    with np.errstate(over="ignore"):
        values = array.astype(dtype)
    if not np.isfinite(values).all():
        worst = array[~np.isfinite(values)].flat[0]
        raise BundleError(
            f"{name} holds {worst}, which is not finite in {dtype}; train with a lower learning rate, or use float32"
        )
    return values
