"""The vectors of a CTR model's fields, and its id biases, as ONNX nodes over tables and bucket maps in their small types."""

from __future__ import annotations

import copy
from collections.abc import Sequence

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
from pipeline.export.layers import as_array, side_by_side, squeezed
from pipeline.export.tables import CodeTable, StoredMap, Table, read_vectors

# Numbers of a column's vectors that are materialized as float32, 4 MiB.
_MATERIALIZED_VALUES = 2**20
_PLAIN = StoredMap(None, None, None, 1)


class FieldVectors:
    """The nodes that read the model's tables.

    Args:
        precisions: of every column's stored table, in the order of the maps.
    """

    def __init__(self, graph: Graph, trained: TrainedCtr, precisions: Sequence[str], inputs: Inputs) -> None:
        self.graph, self.trained, self.precisions = graph, trained, precisions
        self.entries, self.weights = inputs.entries, inputs.weights
        fields, maps = trained.model.fields, trained.maps
        self.maps = {c: StoredMap.add(graph, f"/{c}", maps[c]) for c in fields.own_columns}
        self.first_of = shared_tables(maps)

    def vectors(self, prefix: str, fields: FieldEmbeddings) -> str:
        """Vectors of all fields, float32, shape (batch, n_fields, dim), in the order of ``fields.order``."""
        graph, parts = self.graph, []
        if fields.joint is not None:
            parts += self._joint(f"/{prefix}joint", fields)
        tables: dict[int, Table | CodeTable] = {}
        for c in fields.own_columns:
            name, first = f"/{prefix}{c}", self.first_of.get(c, c)
            if first not in tables:
                tables[first] = self._stored(f"/{prefix}{first}", fields, first)
            if c not in self.weights:
                read = self._read(f"{name}_field", tables[first], c, self.entries[c])
                parts.append(graph.node("Unsqueeze", [read, graph.axis(1)], f"{name}_one_field"))
                continue
            flat = graph.node("Reshape", [self.entries[c], graph.axis(-1)], f"{name}_flat")
            read = self._read(f"{name}_field", tables[first], c, flat)
            size = [graph.node("Shape", [self.entries[c]], f"{name}_size"), graph.axis(fields.dim)]
            shape = graph.node("Concat", size, f"{name}_shape", axis=0)
            values = graph.node("Reshape", [read, shape], f"{name}_values", allowzero=1)
            parts.append(graph.node("MatMul", [self.weights[c], values], f"{name}_pooled"))
        if fields.arrangement is None:
            return graph.node("Concat", parts, f"/{prefix}fields", axis=1)
        order = graph.constant(f"/{prefix}arrangement", as_array(fields.arrangement))
        stored = graph.node("Concat", parts, f"/{prefix}fields_stored", axis=1)
        return graph.node("Gather", [stored, order], f"/{prefix}fields", axis=1)

    def _stored(self, name: str, fields: FieldEmbeddings, column: int) -> Table | CodeTable:
        """What is stored of a column: its table, its codes, or of any other kind the vectors of all ids, as they are read."""
        embedding, precision = fields.columns[column], self._stored_as(fields, column)
        if isinstance(embedding, (BucketEmbedding, TableSlice)):
            return self._table(name, embedding.table, precision)
        if isinstance(embedding, CodeEmbedding):
            return CodeTable.add(self.graph, name, embedding.vector_codes())
        return self._table(name, rounded_vectors(embedding, precision), "float32")

    def _read(self, name: str, table: Table | CodeTable, column: int, entries: str) -> str:
        """Vectors of a column's entries. With few ids they are an expression of constants, which ONNX Runtime computes once."""
        bucket_map = self.trained.maps[column]
        if bucket_map.identity or (bucket_map.n_ids + 1) * table.shape[1] > _MATERIALIZED_VALUES:
            return read_vectors(self.graph, name, table, self.maps[column], entries)
        whole = read_vectors(self.graph, f"{name}_all", table, self.maps[column], None)
        return self.graph.node("Gather", [whole, entries], name, axis=0)

    def biases(self) -> list[str]:
        """The id bias of every compressed column, float32, shape (batch,) each."""
        bias, graph = self.trained.model.bias, self.graph
        if bias is None:
            return []
        terms = []
        for embedding, c in zip(bias.columns, as_array(self.trained.model.bias_columns).tolist(), strict=True):
            table = self._table(f"/bias_{c}", embedding.table, bias_dtype(self.precisions[c]))
            terms.append(
                squeezed(graph, read_vectors(graph, f"/bias_{c}", table, _PLAIN, self.entries[c]), f"/bias_of_{c}")
            )
        return terms

    def _joint(self, name: str, fields: FieldEmbeddings) -> list[str]:
        """Fields of the table that full columns have together: one Gather for all categorical ones."""
        graph = self.graph
        assert fields.joint is not None
        columns = as_array(fields.joint_columns).tolist()
        kinds = {self._stored_as(fields, c) for c in (*columns, *(c for c, _ in fields.joint_multi_valued))}
        if len(kinds) > 1:
            raise ArgumentError(
                f"full columns are stored in {' and '.join(sorted(kinds))}, and have one table; give them one precision"
            )
        table = self._table(name, fields.joint.table, kinds.pop())
        parts = []
        if columns:
            starts = graph.constant(f"{name}_starts", as_array(fields.joint_starts))
            entries = side_by_side(graph, [self.entries[c] for c in columns], f"{name}_entries")
            rows = graph.node("Add", [entries, starts], f"{name}_rows_read")
            parts.append(read_vectors(graph, f"{name}_read", table, _PLAIN, rows))
        for c, start in fields.joint_multi_valued:
            rows = graph.node(
                "Add", [self.entries[c], graph.constant(f"{name}_{c}_start", np.int64(start))], f"{name}_{c}_rows_read"
            )
            parts.append(
                graph.node(
                    "MatMul",
                    [self.weights[c], read_vectors(graph, f"{name}_{c}", table, _PLAIN, rows)],
                    f"{name}_{c}_pooled",
                )
            )
        return parts

    def _stored_as(self, fields: FieldEmbeddings, column: int) -> str:
        precision = self.precisions[column]
        return precision if fields is self.trained.model.fields else bias_dtype(precision)

    def _table(self, name: str, table: torch.Tensor | nn.Module, precision: str) -> Table:
        return Table.add(self.graph, name, as_array(table), precision)


@torch.no_grad()
def rounded_vectors(embedding: CompressedEmbedding, precision: str) -> torch.Tensor:
    """Vectors of all ids, that of the OOV id last, once the embedding's tables are stored in ``precision``."""
    stored = copy.deepcopy(embedding)
    for table, stored_in in stored.stored_tables(precision):
        table.copy_(torch.from_numpy(rounded(table.cpu().numpy(), stored_in)))
    return all_vectors(stored)
