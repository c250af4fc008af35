"""Scores of the catalogue and of candidates as ONNX nodes, per model and per choice of memory against speed.

`materialized`: the items' vectors are an expression of constants, which ONNX Runtime computes when it loads the graph and keeps: a
float32 vector per item, whatever the file holds. A request is one product. So are the users' vectors where they are few; of
many users a small table, in float32.

`compressed`: nothing but the small table and the map stay in memory. A request goes through the catalogue in chunks, whose
vectors it reads from the table. For few users it is cheaper not to make vectors: every bucket's score, then for each item the
weighted sum of its buckets' scores, which is the same number. Everything in a chunk depends on where it starts, which a
constant does not, so that ONNX Runtime cannot fold it.

Where scores are cosines, vectors are scaled to length 1 as soon as they are read: materialized ones once, when the graph is loaded. A
compressed graph keeps the length of every item's vector beside table and map, for the sums of buckets' scores: 4 bytes an item, which are
in the file where the catalogue is large.

    MF        <p_u, q_i> + b_i
    LightGCN  the same, of vectors that are propagated before the export: they take the full catalogue's size
    NeuMF     a product and the network, a user at a time within what a chunk holds
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graphhash.maps.quantization import STEPS, bias_blocks, rounded
from graphhash.maps.vector_codes import VectorCodes
from graphhash.models.mf import LEAST_LENGTH, RetrievalModel
from graphhash.nn.residual import own_precision, projection_precision
from pipeline.export.graph import Graph
from pipeline.export.tables import (
    IDENTITY,
    CodeTable,
    StoredMap,
    StoredResidual,
    Table,
    add_table,
    as_stored,
    read_vectors,
)
from pipeline.retrieval.onnx_chunks import Chunk, padded, scan_chunks, split_evenly
from pipeline.retrieval.onnx_parts import Parts, Residual, materialized_users, unpacked_rows

# Table rows that a chunk's vectors are read from; at dim 64 they are 2 MiB as float32.
_CHUNK_ROWS = 2**13
# Chunks of vectors in a chunk of sums of buckets' scores, which are smaller.
_PER_SUM = 8
# Numbers of a table that are float32 at a time.
_CHUNK_VALUES = 2**17
# ONNX Runtime folds no more than 1 GiB into one constant. A materialized catalogue is in blocks of at most so many numbers, 512 MiB; what
# is read for them, indices_per_id times as much, in pieces of 256 MiB, because a node's result is in memory twice while it is folded.
_BLOCK_VALUES = 2**27
_PIECE_VALUES = 2**26
# What is read to fold the lengths of a compressed catalogue's vectors, 256 MiB at most. Beyond it they are stored.
FOLDED_VALUES = 2**26
# Users up to whom sums of buckets' scores are cheaper than vectors. On Gowalla, 17 indices per item, in ms of CPU: 1 user 3 and 29,
# 8 users 11 and 34, 32 users 55 and 40.
FEW_USERS = 24


def _padded_rows(table: NDArray[np.float32] | VectorCodes, n_rows: int) -> NDArray[np.float32] | VectorCodes:
    """With rows of zeros, or the first codeword, at the end."""
    if isinstance(table, VectorCodes):
        return replace(table, codes=padded(table.codes, n_rows))
    return padded(table, n_rows)


class Scores:
    """Inner products of user and item vectors, with the items' biases.

    Args:
        graph: where everything goes that all requests share.
        user: rows of the request's users.
        compressed: see the head of this file.

    Attributes:
        n_columns: scores of `all_scores` per user: n_items, the OOV entry, and what fills the last chunk up.
    """

    def __init__(
        self, graph: Graph, model: RetrievalModel, parts: Parts, precision: str, user: str, *, compressed: bool
    ) -> None:
        self.shared, self.dim, self.compressed, self.cosine = graph, parts.dim, compressed, parts.cosine
        n_entries, indices_per_id = parts.item_map.n_ids + 1, parts.item_map.indices_per_id
        self.n_sums = -(-n_entries * indices_per_id // (_CHUNK_ROWS * _PER_SUM))
        self.n_columns = n_entries
        if compressed:
            self.chunk = -(-n_entries // (self.n_sums * _PER_SUM))
            self.n_columns = self.chunk * self.n_sums * _PER_SUM
        self._store(graph, parts, precision, n_entries)
        user_map = StoredMap.add(graph, "user", parts.user_map)
        user_map = self._with_residual(graph, "user", user_map, parts.user_residual, precision)
        if not compressed:
            self._unpack_tables(graph, parts)
            self.blocks = self._materialized_vectors(graph, "item", self.item_table, self.map, n_entries)
        if not compressed and materialized_users(parts.user_map, self.dim):
            vectors = self._materialized_vectors(graph, "user", self.user_table, user_map, parts.user_map.n_ids + 1)
            self.users = graph.node("Gather", [*vectors, user], "user_vectors", axis=0)
        else:
            self.users = self._unit(graph, "user", read_vectors(graph, "user", self.user_table, user_map, user))
        self._prepare(graph, model)

    def _store(self, graph: Graph, parts: Parts, precision: str, n_entries: int) -> None:
        """Tables, maps, bias and a large catalogue's lengths, padded to whole chunks of rows and of items where they are read in chunks."""
        item_table = parts.item_table
        self.n_tables = 1
        if self.compressed and parts.item_map.identity:
            item_table = _padded_rows(item_table, self.n_columns)
        elif self.compressed:
            assert not isinstance(item_table, VectorCodes), "codes have no map"
            self.n_tables = -(-item_table.size // _CHUNK_VALUES)
            item_table = padded(item_table, -(-len(item_table) // self.n_tables) * self.n_tables)
        if parts.item_map.shared:
            # A table that both sides share is stored once.
            self.user_table = self.item_table = add_table(graph, "shared", item_table, precision)
        else:
            self.user_table = add_table(graph, "user", parts.user_table, precision)
            self.item_table = add_table(graph, "item", item_table, precision)
        plain_map = StoredMap.add(graph, "item", parts.item_map, self.n_columns)
        self.map = self._with_residual(graph, "item", plain_map, parts.item_residual, precision)
        self.bias: str | None = None
        if parts.item_bias is not None:
            # The OOV entry has none.
            self.bias = _add_bias(graph, padded(parts.item_bias, self.n_columns), precision)
        self.stored_lengths: str | None = None
        if self.compressed and self.cosine and self.n_columns * self.map.indices_per_id * self.dim > FOLDED_VALUES:
            # ONNX Runtime keeps what it folds until all is folded, however small the pieces: 2 GiB for 150,000 items with 10 indices.
            lengths = np.pad(_vector_lengths(parts, precision), (0, self.n_columns - n_entries), mode="edge")
            self.stored_lengths = graph.constant("item_lengths", lengths)

    def _with_residual(
        self, graph: Graph, side: str, stored: StoredMap, residual: Residual | None, precision: str
    ) -> StoredMap:
        """The map with the ids' own numbers, as `{side}_own_table`, padded as the map of items is; both sides have one `projection`."""
        if residual is None:
            return stored
        own = padded(residual.own, self.n_columns) if side == "item" else residual.own
        table = Table.add(graph, f"{side}_own", own, own_precision(precision, residual.bits))
        if side == "item":
            dtype = projection_precision(precision)
            name = graph.constant("projection", as_stored(residual.projection, "projection", dtype))
            self.projection = name if dtype == "float32" else graph.cast(name, "projection_read", TensorProto.FLOAT)
        return replace(stored, residual=StoredResidual(table, self.projection))

    def _unpack_tables(self, graph: Graph, parts: Parts) -> None:
        """Read small tables as float32: a request then has fewer nodes, and an id's rows are unpacked once."""
        shared = parts.item_map.shared
        if unpacked_rows(parts.item_map, self.dim):
            self.item_table = self.item_table.unpacked(graph, "shared" if shared else "item")
        if shared:
            self.user_table = self.item_table
        elif unpacked_rows(parts.user_map, self.dim):
            self.user_table = self.user_table.unpacked(graph, "user")

    def _materialized_vectors(
        self, graph: Graph, side: str, table: Table | CodeTable, stored: StoredMap, n_entries: int
    ) -> list[str]:
        """Vectors of all map entries, in blocks, as expressions of constants."""
        n_blocks = -(-n_entries * self.dim // _BLOCK_VALUES)
        if n_blocks == 1 and stored.codebook is None:
            return [self._unit(graph, side, read_vectors(graph, side, table, stored, None))]
        blocks = []
        for block, (first, end) in enumerate(itertools.pairwise(split_evenly(n_entries, n_blocks))):
            n_pieces = -(-(end - first) * stored.indices_per_id * self.dim // _PIECE_VALUES)
            bounds = [
                graph.constant(f"{side}_bound_{n}", np.array([n])) for n in first + split_evenly(end - first, n_pieces)
            ]
            names = [f"{side}_{block}_{i}" for i in range(n_pieces)]
            pieces = [
                self._unit(graph, name, read_vectors(graph, name, table, stored, Chunk(name, *ends)))
                for name, ends in zip(names, itertools.pairwise(bounds), strict=True)
            ]
            blocks.append(graph.node("Concat", pieces, f"{side}_block_{block}", axis=0))
        return blocks

    def _unit(self, graph: Graph, name: str, vectors: str) -> str:
        """Vectors as they are multiplied: scaled to length 1 where scores are cosines; those of zeros stay zeros."""
        if not self.cosine:
            return vectors
        return graph.node("Div", [vectors, self._lengths(graph, name, vectors, keep=1)], f"{name}_unit")

    def _lengths(self, graph: Graph, name: str, vectors: str, *, keep: int) -> str:
        """Lengths of vectors, of LEAST_LENGTH at least: shape (n, 1), or (n,) where the axis is not kept."""
        lengths = graph.node("ReduceL2", [vectors, graph.axis(-1)], f"{name}_length", keepdims=keep)
        return graph.node("Max", [lengths, graph.constant("least_length", np.float32(LEAST_LENGTH))], f"{name}_divisor")

    def _item_lengths(self, graph: Graph) -> str:
        """Lengths of the vectors of all columns, shape (n_columns,): stored where the catalogue is large, else folded from constants."""
        if self.stored_lengths is not None:
            return self.stored_lengths
        vectors = read_vectors(graph, "length", self.item_table, self.map, None)
        return self._lengths(graph, "length", vectors, keep=0)

    def _prepare(self, graph: Graph, model: RetrievalModel) -> None:
        """What of a request's users, or of a materialized catalogue, all scores share."""
        if self.compressed or self.bias is None:
            return
        # The bias as one more dimension, where users have a 1: added to (batch, n_items) products it would take another pass over them.
        self.blocks = [
            graph.node(
                "Concat",
                [block, graph.node("Unsqueeze", [bias, graph.axis(1)], f"bias_column_{i}")],
                f"items_and_bias_{i}",
                axis=1,
            )
            for i, (block, bias) in enumerate(zip(self.blocks, self._bias_of_blocks(graph), strict=True))
        ]

    def all_scores(self, graph: Graph) -> str:
        """Scores of every item, shape (batch, n_columns); the columns from n_items on mean nothing."""
        return self._of_chunks(graph) if self.compressed else self._of_materialized(graph)

    def pair_scores(self, graph: Graph, rows: str) -> str:
        """Scores of the items in `rows`, int64, shape (batch or 1, n): shape (batch, n)."""
        flat = graph.node("Reshape", [rows, graph.axis(-1)], "candidate_flat")
        vectors = self._unit(graph, "candidate", read_vectors(graph, "candidate", self.item_table, self.map, flat))
        sizes = [graph.node("Shape", [rows], "candidate_shape"), graph.constant("dim", np.array([self.dim], np.int64))]
        shape = graph.node("Concat", sizes, "candidate_vectors_shape", axis=0)
        scores = self._of_pairs(graph, graph.node("Reshape", [vectors, shape], "candidate_of_user", allowzero=1))
        if self.bias is None:
            return scores
        return graph.node(
            "Add", [scores, graph.node("Gather", [self.bias, rows], "candidate_bias", axis=0)], "candidate_sum"
        )

    def _of_materialized(self, graph: Graph) -> str:
        users = self.users
        if self.bias is not None:
            # Not Pad, which not every provider has in this opset.
            batch = graph.node("Shape", [users], "n_scored", end=1)
            shape = graph.node("Concat", [batch, graph.axis(1)], "ones_shape", axis=0)
            ones = graph.node("Expand", [graph.constant("one", np.float32(1)), shape], "ones")
            users = graph.node("Concat", [users, ones], "users_and_one", axis=1)
        scores = [
            graph.node("Gemm", [users, block], f"catalogue_scores_{i}", transB=1) for i, block in enumerate(self.blocks)
        ]
        return self._joined(graph, scores)

    def _joined(self, graph: Graph, scores: list[str]) -> str:
        return scores[0] if len(scores) == 1 else graph.node("Concat", scores, "catalogue_scores", axis=1)

    def _bias_of_blocks(self, graph: Graph) -> list[str]:
        assert self.bias is not None
        bounds = [
            graph.constant(f"block_bound_{n}", np.array([n])) for n in split_evenly(self.n_columns, len(self.blocks))
        ]
        return [Chunk(f"block_{i}", *ends)(graph, self.bias) for i, ends in enumerate(itertools.pairwise(bounds))]

    def _of_vectors(self, graph: Graph, name: str, vectors: str, bias: str | None) -> str:
        """Scores of items with these vectors, shape (n, dim), and biases, shape (n,), for every user: shape (batch, n)."""
        factors = [self.users, vectors] + ([] if bias is None else [bias])
        return graph.node("Gemm", factors, f"{name}_scores", transB=1)

    def _of_pairs(self, graph: Graph, vectors: str) -> str:
        """Scores, without biases, of each user's own items, shape (batch or 1, n, dim): shape (batch, n)."""
        users = graph.node("Unsqueeze", [self.users, graph.axis(2)], "user_column")
        column = graph.node("MatMul", [vectors, users], "candidate_column")
        return graph.node("Squeeze", [column, graph.axis(2)], "candidate_products")

    def _of_chunks(self, graph: Graph) -> str:
        """All scores from vectors made chunk by chunk or, for few users, from the buckets' scores."""
        if self.map.rows is None:
            return self._scan_vectors(graph)
        few, many = Graph(graph), Graph(graph)
        outputs = [self._scan_sums(few), self._scan_vectors(many)]
        batch = graph.node("Shape", [self.users], "n_scored", end=1)
        is_few = graph.node(
            "LessOrEqual", [batch, graph.constant("few_users", np.array([FEW_USERS], np.int64))], "few_asked"
        )
        branches = [
            part.body(name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None])])
            for part, name, output in zip((few, many), ("sums", "vectors"), outputs, strict=True)
        ]
        is_few = graph.node("Squeeze", [is_few], "is_few")
        return graph.node("If", [is_few], "chunked_scores", then_branch=branches[0], else_branch=branches[1])

    def _scan_vectors(self, graph: Graph) -> str:
        def scores(body: Graph, part: Chunk) -> str:
            vectors = self._unit(body, "chunk", read_vectors(body, "chunk", self.item_table, self.map, part))
            return self._of_vectors(body, "chunk", vectors, None if self.bias is None else part(body, self.bias))

        return scan_chunks(graph, "items", self.n_columns, self.chunk, scores)

    def bucket_scores(self, graph: Graph, n_buckets: int) -> str:
        """Scores, without biases, of the first `n_buckets` rows of the items' table as if they were items: shape (batch, n_buckets)."""
        if self.compressed:
            padded = self._scan_buckets(graph, as_items=True)
            stop = graph.constant("n_bucket_scores", np.array([n_buckets], np.int64))
            return graph.node("Slice", [padded, graph.axis(0), stop, graph.axis(1)], "bucket_scores")
        # Of constants, so that ONNX Runtime folds them where they are not float32 yet.
        values, scales = self.item_table.read(self.shared, "all_buckets", lambda stored: stored)
        table = values if scales is None else self.shared.node("Mul", [values, scales], "bucket_table")
        return graph.node(
            "Gemm", [self.users, self._unit(self.shared, "bucket_table", table)], "bucket_scores", transB=1
        )

    def _scan_buckets(self, graph: Graph, *, as_items: bool = False) -> str:
        """Inner products of every user with the table's rows; ``as_items``: with their vectors, where an item is a row."""

        def of_buckets(body: Graph, part: Chunk) -> str:
            values, scales = self.item_table.read(body, "bucket", lambda stored: part(body, stored))
            if as_items and self.cosine:
                # A row's scale changes its length alone.
                values, scales = self._unit(body, "bucket", values), None
            scores = body.node("Gemm", [self.users, values], "bucket_products", transB=1)
            if scales is None:
                return scores
            return body.node(
                "Mul", [scores, body.node("Reshape", [scales, body.axis(-1)], "bucket_scales_row")], "bucket_scaled"
            )

        n_rows = self.item_table.shape[0]
        return scan_chunks(graph, "buckets", n_rows, n_rows // self.n_tables, of_buckets)

    def _scan_sums(self, graph: Graph) -> str:
        """`sum_j weights[item, j] * <user, table[rows[item, j]]>`: buckets first, then items; and `<user @ projection.T, own[item]>`."""
        buckets = self._scan_buckets(graph)
        lengths = self._item_lengths(self.shared) if self.cosine else None
        residual = self.map.residual
        users_own = ""
        if residual is not None:
            users_own = graph.node("Gemm", [self.users, residual.projection], "users_projected", transB=1)
        batch = graph.node("Shape", [self.users], "n_few", end=1)

        def of_items(body: Graph, part: Chunk) -> str:
            assert self.map.rows is not None, "an id without a stored row reads the row of its number, without a sum"
            # GatherElements copies numbers, where Gather calls memcpy for each.
            rows = body.node(
                "Reshape", [body.cast(part(body, self.map.rows), "sum_rows", TensorProto.INT32), "one_row"], "sum_flat"
            )
            shape = body.node("Concat", [batch, body.axis(1)], "sum_shape", axis=0)
            rows = body.node("Expand", [rows, shape], "sum_rows_of_user")
            sums = body.node("GatherElements", [buckets, rows], "sum_terms", axis=1)
            if self.map.codebook is not None and self.map.codes is not None:
                codes = body.cast(part(body, self.map.codes), "sum_codes", TensorProto.INT32)
                weights = body.node("Gather", [self.map.codebook, codes], "sum_weights", axis=0)
                sums = body.node("Reshape", [sums, "per_index"], "sum_terms_of_item")
                sums = body.node("Mul", [sums, weights], "sum_weighted")
                sums = body.node("ReduceSum", [sums, body.axis(2)], "sum_of_item", keepdims=0)
            if residual is not None:
                own = read_vectors(body, "sum_own", residual.own, IDENTITY, part)
                own = body.node("Gemm", [users_own, own], "sum_of_own", transB=1)
                sums = body.node("Add", [sums, own], "sum_and_own")
            if lengths is not None:
                sums = body.node("Div", [sums, part(body, lengths)], "sum_over_length")
            return sums if self.bias is None else body.node("Add", [sums, part(body, self.bias)], "sum_and_bias")

        graph.constant("one_row", np.array([1, -1], np.int64))
        graph.constant("per_index", np.array([0, -1, self.map.indices_per_id], np.int64))
        return scan_chunks(graph, "sums", self.n_columns, self.chunk * _PER_SUM, of_items)


def _vector_lengths(parts: Parts, precision: str) -> NDArray[np.float32]:
    """Lengths of the items' vectors as they are stored, of LEAST_LENGTH at least, with that of the OOV entry: shape (n_items + 1,)."""
    assert not isinstance(parts.item_table, VectorCodes), "codes have no map"
    item_map, residual = parts.item_map, parts.item_residual
    table, weights = rounded(parts.item_table, precision), item_map.weights
    if residual is not None:
        own = rounded(residual.own, own_precision(precision, residual.bits))
        projection = residual.projection.astype(projection_precision(precision)).astype(np.float32)
    lengths = np.empty(len(weights), np.float32)
    for start in range(0, len(lengths), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        vectors = (weights[part, None] @ table[item_map.rows[part]])[:, 0]
        if residual is not None:
            vectors += own[part] @ projection
        lengths[part] = np.linalg.norm(vectors, axis=1)
    return np.maximum(lengths, np.float32(LEAST_LENGTH))


def _add_bias(graph: Graph, bias: NDArray[np.float32], precision: str) -> str:
    """An item bias as ``graphhash.maps.quantization.rounded_bias`` stores it, read as float32, shape (n_columns,)."""
    if precision not in STEPS:
        stored = graph.constant("item_bias", as_stored(bias, "item bias", precision))
        return stored if precision == "float32" else graph.cast(stored, "bias", TensorProto.FLOAT)
    blocks = Table.add(graph, "item_bias", bias_blocks(bias), "int8").unpacked(graph, "item_bias")
    flat = graph.node("Reshape", [blocks.values, graph.axis(-1)], "bias_flat")
    size = graph.constant("n_biases", np.array([len(bias)], np.int64))
    return graph.node("Slice", [flat, graph.axis(0), size], "bias")
