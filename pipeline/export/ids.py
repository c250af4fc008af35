"""Raw ids in ONNX graphs: nodes from raw ids to rows and back, and the ids that a graph holds.

row = encode_ids(graph, "user", users, "user_id")       # raw ids -> rows; out-of-vocabulary (OOV) ids -> len(users)
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphhash.graph.vocabulary import Vocabulary
from pipeline.export.graph import Graph
from serving.errors import BundleError

# Whole numbers that fill at least a third of their range are encoded by a table over it: 2 or 4 bytes a number and one
# Gather, where LabelEncoder has 16 bytes an id on disk, a hash table in memory, and a probe per id.
_DENSE = 3


def encode_ids(graph: Graph, name: str, vocabulary: Vocabulary, raw: str) -> str:
    """Rows of the raw ids in the tensor `raw`, int64 of its shape; an OOV id becomes len(vocabulary)."""
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
    # The last place is that of all other numbers, which are OOV.
    stored = numpy_helper.to_array(tensors[f"{name}_of_place"]).astype(np.int64)
    row_of, n_ids = stored[:-1], stored[-1]
    places = np.flatnonzero(row_of < n_ids)
    ids = np.empty(n_ids, np.int64)
    ids[row_of[places]] = places + low
    return ids
