"""The vectors of a CTR model's fields, and its id biases, as ONNX nodes over tables and bucket maps in their small types.

A request of one row takes as long as the graph has nodes, hardly longer for what they do. The vectors of all columns with few ids, full
or compressed, are therefore one float32 table, an expression of constants that ONNX Runtime computes when it loads the graph, and one
Gather reads the fields of a row. An id bias is one more Gather. Columns with many ids are read through their maps, request by request,
out of a table that is in float32 as well if it is small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from graphhash.errors import ArgumentError
from graphhash.maps.quantization import bias_dtype, rounded
from graphhash.models.ctr_fields import FieldEmbeddings, TableSlice, shared_tables
from graphhash.nn.codes import CodeEmbedding
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.embedding import BucketEmbedding
from pipeline.ctr.onnx_inputs import Inputs
from pipeline.ctr.stored_otherwise import all_vectors
from pipeline.ctr.weights import TrainedCtr
from pipeline.export.graph import Graph
from pipeline.export.layers import as_array, squeezed
from pipeline.export.tables import CodeTable, StoredMap, Table, read_field, read_vectors

# Numbers of a table, or of the vectors of a column's ids, that are materialized as float32, 4 MiB.
_MATERIALIZED_VALUES = 2**20
_PLAIN = StoredMap(None, None, None, 1)


@dataclass(frozen=True)
class _Together:
    """Columns whose vectors lie in one table, and are read by one Gather.

    Attributes:
        table: what is stored of them.
        starts: row of the first entry of every categorical column, by its number, in the order in which they are read.
        multi_valued: likewise of multi-valued columns.
    """

    table: Table
    starts: dict[int, int]
    multi_valued: dict[int, int]


class FieldVectors:
    """The nodes that read the model's tables.

    Args:
        precisions: of every column's stored table, in the order of the maps.
        arranged: whether fields come in the order of the model's; else in one that needs no node.

    Attributes:
        order: the number of the column behind every field that comes out.
    """

    def __init__(
        self, graph: Graph, trained: TrainedCtr, precisions: Sequence[str], inputs: Inputs, *, arranged: bool
    ) -> None:
        self.graph, self.trained, self.precisions, self.arranged = graph, trained, precisions, arranged
        self.inputs, self.entries, self.weights = inputs, inputs.entries, inputs.weights
        fields, maps = trained.model.fields, trained.maps
        self.maps = {c: StoredMap.add(graph, f"/{c}", maps[c]) for c in fields.own_columns}
        self.first_of = shared_tables(maps)
        self.rows_of: dict[tuple[tuple[int, int], ...], str] = {}
        self.order: list[int] = []

    def vectors(self, prefix: str, fields: FieldEmbeddings) -> str:
        """Vectors of all fields, float32, shape (batch, n_fields, dim), in the order that ``order`` then has."""
        graph, parts, made = self.graph, [], []
        stored = self._stored_columns(prefix, fields)
        for name, together in self._together(prefix, fields, stored).items():
            if together.starts:
                rows = self._rows(name, together.starts)
                parts.append(read_vectors(graph, name, together.table, _PLAIN, rows))
            for c, start in together.multi_valued.items():
                first = graph.constant(f"{name}_{c}_start", np.int64(start))
                rows = graph.node("Add", [self.entries[c], first], f"{name}_{c}_rows")
                read = read_vectors(graph, f"{name}_{c}", together.table, _PLAIN, rows)
                parts.append(graph.node("MatMul", [self.weights[c], read], f"{name}_{c}_pooled"))
            made += [*together.starts, *together.multi_valued]
        for c in (c for c in fields.own_columns if c not in made):
            parts.append(self._field(f"/{prefix}{c}", stored[c], c, fields.dim))
            made.append(c)
        if len(parts) > 1:
            parts = [graph.node("Concat", parts, f"/{prefix}fields", axis=1)]
        self.order = fields.order if self.arranged else made
        if made == self.order:
            return parts[0]
        order = graph.constant(f"/{prefix}arrangement", np.array([made.index(c) for c in fields.order], np.int64))
        return graph.node("Gather", [parts[0], order], f"/{prefix}fields_arranged", axis=1)

    def _rows(self, name: str, starts: dict[int, int]) -> str:
        """Rows of categorical columns' entries in a table they have together, int64, shape (batch, n): for two tables with the same rows
        one tensor."""
        key = tuple(starts.items())
        if key not in self.rows_of:
            entries = self.inputs.of_columns(self.graph, f"{name}_entries", list(starts))
            firsts = self.graph.constant(f"{name}_starts", np.array(list(starts.values()), np.int64))
            self.rows_of[key] = self.graph.node("Add", [entries, firsts], f"{name}_rows")
        return self.rows_of[key]

    def _together(
        self, prefix: str, fields: FieldEmbeddings, stored: dict[int, Table | CodeTable]
    ) -> dict[str, _Together]:
        """Tables that hold several columns, by the name of their nodes: that of columns with few ids, and one of full columns that is too
        large for it."""
        graph, blocks, starts, found = self.graph, list[str](), dict[int, int](), dict[str, _Together]()
        n_rows = 0
        if fields.joint is not None:
            table, starts = self._joint(f"/{prefix}joint", fields)
            if table.shape[0] * fields.dim > _MATERIALIZED_VALUES:
                found[f"/{prefix}joint_read"], starts = self._columns(fields, table, starts), {}
            else:
                blocks, n_rows = [table.values], table.shape[0]
        for c in fields.own_columns:
            n_entries = self.trained.maps[c].n_ids + 1
            if n_entries * fields.dim <= _MATERIALIZED_VALUES:
                blocks.append(read_vectors(graph, f"/{prefix}{c}_all", stored[c], self.maps[c], None))
                starts[c], n_rows = n_rows, n_rows + n_entries
        if blocks:
            values = _one_below_another(graph, blocks, f"/{prefix}few_ids_table")
            table = Table(values, None, "float32", (n_rows, fields.dim))
            found[f"/{prefix}few_ids"] = self._columns(fields, table, starts)
        return found

    def _columns(self, fields: FieldEmbeddings, table: Table, starts: dict[int, int]) -> _Together:
        ordered = [c for c in fields.order if c in starts] if self.arranged else sorted(starts)
        single, several = (
            {c: starts[c] for c in ordered if (c in self.weights) is is_multi_valued}
            for is_multi_valued in (False, True)
        )
        return _Together(table, single, several)

    def _field(self, name: str, table: Table | CodeTable, column: int, dim: int) -> str:
        """The field of a column with many ids, which are read through its bucket map: float32, shape (batch, 1, dim)."""
        graph, entries = self.graph, self.entries[column]
        if column not in self.weights:
            return read_field(graph, f"{name}_field", table, self.maps[column], entries)
        flat = graph.node("Reshape", [entries, graph.axis(-1)], f"{name}_flat")
        read = read_vectors(graph, f"{name}_field", table, self.maps[column], flat)
        size = [graph.node("Shape", [entries], f"{name}_size"), graph.axis(dim)]
        shape = graph.node("Concat", size, f"{name}_shape", axis=0)
        values = graph.node("Reshape", [read, shape], f"{name}_values", allowzero=1)
        return graph.node("MatMul", [self.weights[column], values], f"{name}_pooled")

    def _stored_columns(self, prefix: str, fields: FieldEmbeddings) -> dict[int, Table | CodeTable]:
        """What is stored of every column with an embedding of its own, by number; columns that share a table have one."""
        stored: dict[int, Table | CodeTable] = {}
        for c in fields.own_columns:
            first = self.first_of.get(c, c)
            stored[c] = stored[first] if first in stored else self._stored(f"/{prefix}{first}", fields, first)
        return stored

    def _stored(self, name: str, fields: FieldEmbeddings, column: int) -> Table | CodeTable:
        """What is stored of a column: its table, its codes, or of any other kind the vectors of all ids, as they are read."""
        embedding, precision = fields.columns[column], self._stored_as(fields, column)
        if isinstance(embedding, (BucketEmbedding, TableSlice)):
            return self._table(name, embedding.table, precision)
        if isinstance(embedding, CodeEmbedding):
            return CodeTable.add(self.graph, name, embedding.vector_codes())
        return self._table(name, rounded_vectors(embedding, precision), "float32")

    def biases(self) -> list[str]:
        """The id bias of every compressed column, float32, shape (batch,) each."""
        bias, graph = self.trained.model.bias, self.graph
        if bias is None:
            return []
        terms = []
        for embedding, c in zip(bias.columns, as_array(self.trained.model.bias_columns).tolist(), strict=True):
            name, entries = f"/bias_{c}", self.entries[c]
            table = self._table(name, embedding.table, bias_dtype(self.precisions[c]))
            if table.shape[0] <= _MATERIALIZED_VALUES:
                whole = squeezed(graph, table.values, f"{name}_all")
                terms.append(graph.node("Gather", [whole, entries], f"/bias_of_{c}", axis=0))
            else:
                terms.append(squeezed(graph, read_vectors(graph, name, table, _PLAIN, entries), f"/bias_of_{c}"))
        return terms

    def _joint(self, name: str, fields: FieldEmbeddings) -> tuple[Table, dict[int, int]]:
        """The table that full columns have together, and the first row of each."""
        assert fields.joint is not None
        columns = as_array(fields.joint_columns).tolist()
        starts = dict(zip(columns, as_array(fields.joint_starts).tolist(), strict=True)) | dict(
            fields.joint_multi_valued
        )
        kinds = {self._stored_as(fields, c) for c in starts}
        if len(kinds) > 1:
            raise ArgumentError(
                f"full columns are stored in {' and '.join(sorted(kinds))}, and have one table; give them one precision"
            )
        return self._table(name, fields.joint.table, kinds.pop()), starts

    def _stored_as(self, fields: FieldEmbeddings, column: int) -> str:
        precision = self.precisions[column]
        return precision if fields is self.trained.model.fields else bias_dtype(precision)

    def _table(self, name: str, table: torch.Tensor | nn.Module, precision: str) -> Table:
        """What is stored of a table; a small one is materialized."""
        stored = Table.add(self.graph, name, as_array(table), precision)
        return stored.unpacked(self.graph, name) if math.prod(stored.shape) <= _MATERIALIZED_VALUES else stored


def _one_below_another(graph: Graph, blocks: list[str], name: str) -> str:
    return blocks[0] if len(blocks) == 1 else graph.node("Concat", blocks, name, axis=0)


@torch.no_grad()
def rounded_vectors(embedding: CompressedEmbedding, precision: str) -> torch.Tensor:
    """Vectors of all ids, that of the OOV id last, once the embedding's tables are stored in ``precision``."""
    stored = copy.deepcopy(embedding)
    for table, stored_in in stored.stored_tables(precision):
        table.copy_(torch.from_numpy(rounded(table.cpu().numpy(), stored_in)))
    return all_vectors(stored)
