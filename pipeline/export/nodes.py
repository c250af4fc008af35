"""Pieces of ONNX graphs, built node by node (opset 20, ai.onnx.ml 4), so that every dtype is chosen and nothing is folded in the file.

graph = Graph()
row = encode_ids(graph, "user", users, "user_id")       # raw ids -> rows, unknown ones to len(users)
table = Table.add(graph, "user", array, "int8")         # stored once, in its small type
vectors = read_vectors(graph, "user", table, add_map(graph, "user", bucket_map), row)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.quantization import STEPS, pack_nibbles, quantize_rows
from serving.errors import BundleError

OPSET, ML_OPSET, IR_VERSION = 20, 4, 10
ONNX_TYPES = {
    "int64": TensorProto.INT64,
    "string": TensorProto.STRING,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
}
# Whole numbers that fill at least a third of their range are looked up in a table over it: 2 or 4 bytes a number and one
# Gather, where LabelEncoder has 16 bytes an id on disk, a hash table in memory, and a probe per id.
_DENSE = 3


class Graph:
    """Nodes and initializers in the order they are added; every method returns the name of what it added.

    The body of an `If`, `Loop` or `Scan` is a `Graph` with the graph around it as its parent: it sees everything
    there, and its initializers become the outermost graph's, so that no name stands for two things.
    """

    def __init__(self, parent: Graph | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = [] if parent is None else parent.initializers

    @property
    def names(self) -> set[str]:
        return {tensor.name for tensor in self.initializers}

    def constant(self, name: str, values: NDArray | np.generic) -> str:
        """An initializer; one that is there already is used again."""
        if name not in self.names:
            self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> str:
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names[0]

    def cast(self, source: str, name: str, dtype: int) -> str:
        return self.node("Cast", [source], name, to=dtype)

    def axis(self, number: int) -> str:
        """The number as int64, shape (1,), for what takes axes, shapes and slices."""
        return self.constant(f"axis_{number}".replace("-", "minus_"), np.array([number], np.int64))

    def body(self, name: str, inputs: list[Any], outputs: list[Any]) -> onnx.GraphProto:
        """This graph as the body of a node of its parent."""
        return helper.make_graph(self.nodes, name, inputs, outputs)

    def model(self, name: str, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        return helper.make_model(
            helper.make_graph(self.nodes, name, inputs, outputs, self.initializers),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)],
            ir_version=IR_VERSION,
            producer_name="graphhash",
        )


def describe(values: list[onnx.ValueInfoProto]) -> dict[str, dict[str, Any]]:
    """Names, types and meanings of graph inputs or outputs, for the manifest."""
    names = {number: name for name, number in ONNX_TYPES.items()}
    return {
        value.name: {
            "dtype": names[value.type.tensor_type.elem_type],
            "shape": [axis.dim_param for axis in value.type.tensor_type.shape.dim],
            "meaning": value.doc_string,
        }
        for value in values
    }


def encode_ids(graph: Graph, name: str, vocabulary: Vocabulary, raw: str) -> str:
    """Rows of the raw ids in the tensor `raw`, int64 of its shape; an unknown id becomes len(vocabulary)."""
    n_ids = len(vocabulary)
    bounds = _dense_bounds(vocabulary)
    if bounds is None:
        attributes = {
            "keys_tensor": ids_tensor(vocabulary, f"{name}_keys"),
            "values_tensor": numpy_helper.from_array(np.arange(n_ids, dtype=np.int64), f"{name}_values"),
            "default_tensor": numpy_helper.from_array(np.array([n_ids], np.int64), f"{name}_default"),
        }
        return graph.node("LabelEncoder", [raw], name, domain="ai.onnx.ml", **attributes)
    low, high = bounds
    first = graph.constant(f"{name}_first_id", np.int64(low))
    last = graph.constant(f"{name}_last_id", np.int64(high))
    inside = [graph.node("GreaterOrEqual", [raw, first], f"{name}_from_first"),
              graph.node("LessOrEqual", [raw, last], f"{name}_to_last")]  # fmt: skip
    is_inside = graph.node("And", inside, f"{name}_in_range")
    # Far outside of the range the difference wraps around, and is not taken.
    place = graph.node("Sub", [raw, first], f"{name}_place")
    ids = vocabulary.ids.to_numpy()
    if np.array_equal(ids - low, np.arange(high - low + 1)):
        return graph.node("Where", [is_inside, place, graph.constant(f"n_{name}s", np.int64(n_ids))], name)
    row_of = np.full(high - low + 2, n_ids, np.uint16 if n_ids < 2**16 else np.int32)
    row_of[ids - low] = np.arange(n_ids)
    outside = graph.constant(f"{name}_outside", np.int64(len(row_of) - 1))
    kept = graph.node("Where", [is_inside, place, outside], f"{name}_place_or_outside")
    stored = graph.node("Gather", [graph.constant(f"{name}_of_place", row_of), kept], f"{name}_stored", axis=0)
    return graph.cast(stored, name, TensorProto.INT64)


def decode_ids(graph: Graph, name: str, vocabulary: Vocabulary, rows: str) -> str:
    """Raw ids, called `name`, of the rows in the tensor `rows`, int64, 0..n_ids - 1."""
    bounds = _dense_bounds(vocabulary)
    if bounds is None:
        graph.initializers.append(ids_tensor(vocabulary, f"{name}s"))
        return graph.node("Gather", [f"{name}s", rows], name, axis=0)
    low, high = bounds
    ids, place = vocabulary.ids.to_numpy(), rows
    if not np.array_equal(ids - low, np.arange(high - low + 1)):
        places = graph.constant(f"{name}_places", (ids - low).astype(np.uint16 if high - low < 2**16 else np.int32))
        place = graph.node("Gather", [places, rows], f"{name}_stored_place", axis=0)
        place = graph.cast(place, f"{name}_place", TensorProto.INT64)
    return graph.node("Add", [place, graph.constant(f"{name}_first", np.int64(low))], name)


def _dense_bounds(vocabulary: Vocabulary) -> tuple[int, int] | None:
    """Smallest and largest id, where a table from one to the other is smaller than a hash table; else None."""
    if vocabulary.kind != "int64":
        return None
    ids = vocabulary.ids.to_numpy()
    low, high = int(ids.min()), int(ids.max())
    return (low, high) if high - low < _DENSE * len(ids) and high - low < 2**31 - 2 else None


def ids_tensor(vocabulary: Vocabulary, name: str) -> onnx.TensorProto:
    """Raw ids in row order, int64 or string, shape (n_ids,)."""
    if vocabulary.kind == "int64":
        return numpy_helper.from_array(vocabulary.ids.to_numpy(), name)
    encoded = [text.encode("utf-8") for text in vocabulary.ids.to_pylist()]
    return helper.make_tensor(name, TensorProto.STRING, [len(encoded)], encoded)


def inside_bytes(vocabulary: Vocabulary, *, decoded: bool) -> int:
    """Bytes that encoded and, perhaps, decoded ids take in the ONNX file itself: neither strings nor attributes can be external."""
    if _dense_bounds(vocabulary) is not None:
        return 0
    n_copies = 2 if decoded and vocabulary.kind == "string" else 1
    return n_copies * vocabulary.ids.nbytes + 8 * len(vocabulary)


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
        codes = pack_nibbles(codes) if precision == "int4" else codes
        return cls(
            graph.constant(f"{name}_table", codes), graph.constant(f"{name}_scales", scales), precision, table.shape
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
        return graph.node("Sub", [codes, zero], f"{name}_codes")


@dataclass(frozen=True)
class StoredMap:
    """A bucket map in its small types; None for rows: an id's row is its number; None for codebook: weights are 1."""

    rows: str | None
    codebook: str | None
    codes: str | None
    indices_per_id: int

    @classmethod
    def add(cls, graph: Graph, name: str, bucket_map: BucketMap, n_entries: int | None = None) -> StoredMap:
        """Store a map as `{name}_rows`, `{name}_codebook` and `{name}_codes`.

        Args:
            n_entries: at least n_ids + 1: the unknown ids' entry is repeated up to so many.
        """
        if bucket_map.identity:
            return cls(None, None, None, 1)
        padding = 0 if n_entries is None else n_entries - len(bucket_map.rows)
        stored = np.pad(bucket_map.rows.astype(bucket_map.rows_dtype), ((0, padding), (0, 0)), mode="edge")
        if bucket_map.codebook is None:
            # One lookup without a weight is a plain Gather, and needs no axis of its own.
            return cls(graph.constant(f"{name}_rows", stored[:, 0]), None, None, 1)
        return cls(
            graph.constant(f"{name}_rows", stored),
            graph.constant(f"{name}_codebook", bucket_map.codebook),
            graph.constant(f"{name}_codes", np.pad(bucket_map.codes, (0, padding), mode="edge")),
            bucket_map.indices_per_id,
        )


Entry = str | Callable[[Graph, str], str] | None


def read_vectors(graph: Graph, name: str, table: Table, stored: StoredMap, entry: Entry) -> str:
    """Vectors of map entries: float32, shape (n, dim).

    Args:
        entry: a tensor of their numbers, int64, shape (n,); or a function that cuts them out of a stored array, which it
            gets with the graph; None: all of them.
    """

    def of_entry(part: str) -> str:
        if entry is None:
            return part
        return (
            entry(graph, part)
            if callable(entry)
            else graph.node("Gather", [part, entry], f"{name}_{part}_of_entry", axis=0)
        )

    if stored.rows is None:
        return _scaled(graph, name, *table.read(graph, name, of_entry))
    # Gather takes int32 or int64 indices.
    rows = graph.cast(of_entry(stored.rows), f"{name}_buckets", TensorProto.INT32)
    values, scales = table.read(
        graph, name, lambda part: graph.node("Gather", [part, rows], f"{name}_{part}_read", axis=0)
    )
    if stored.codebook is None:
        return _scaled(graph, name, values, scales)
    profile = graph.cast(of_entry(stored.codes), f"{name}_profile", TensorProto.INT32)
    weights = graph.node("Gather", [stored.codebook, profile], f"{name}_weights", axis=0)
    if scales is not None:
        # A number per row that is read, where the values are dim of them.
        scales = graph.node("Squeeze", [scales, graph.axis(2)], f"{name}_scales_row")
        weights = graph.node("Mul", [weights, scales], f"{name}_weights_scaled")
    # (n, 1, indices_per_id) @ (n, indices_per_id, dim): no second array of the size of what was read.
    weights = graph.node("Unsqueeze", [weights, graph.axis(1)], f"{name}_weights_row")
    summed = graph.node("MatMul", [weights, values], f"{name}_weighted_sum")
    return graph.node("Squeeze", [summed, graph.axis(1)], f"{name}_vectors")


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


def stored_ids(model: onnx.ModelProto, name: str) -> NDArray:
    """Raw ids that `encode_ids` wrote into a graph, in row order: int64, or object holding str, shape (n_ids,).

    Raises:
        BundleError: there is no such encoder.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "LabelEncoder" and node.output[0] == name:
            keys = next(a.t for a in node.attribute if a.name == "keys_tensor")
            if keys.data_type == TensorProto.STRING:
                return np.array([text.decode("utf-8") for text in keys.string_data], object)
            return numpy_helper.to_array(keys)
    if f"{name}_first_id" not in tensors:
        raise BundleError(f"the graph has no encoder of {name} ids; export the bundle again")
    low, high = (int(numpy_helper.to_array(tensors[f"{name}_{end}_id"])) for end in ("first", "last"))
    if f"{name}_of_place" not in tensors:
        return low + np.arange(high - low + 1)
    # The last place is that of all other numbers.
    *row_of, n_ids = numpy_helper.to_array(tensors[f"{name}_of_place"]).astype(np.int64)
    row_of = np.array(row_of)
    places = np.flatnonzero(row_of < n_ids)
    ids = np.empty(n_ids, np.int64)
    ids[row_of[places]] = places + low
    return ids
