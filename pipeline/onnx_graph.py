"""The ONNX graph of a retrieval model: raw user ids in, the best raw item ids out.

Built node by node from the model's arrays (opset 20, ai.onnx.ml 4), so that every dtype is chosen and nothing
is folded:

    user_id -> LabelEncoder -> user -> Gather rows and weights -> Gather table -> weighted sum
    item rows and weights -> Gather table -> weighted sum (the unknown ids' entry is the last one)
    Gemm(user vectors, item vectors, item bias) -> excluded columns to -inf -> TopK -> Gather raw ids

Tables, rows and numbers of weight profiles are stored in their small types. ONNX Runtime folds the item vectors to float32
when it loads the graph, with n_items * n_lookups * dim * 4 bytes needed meanwhile. A user left with fewer
than k items that are not excluded gets excluded ones at score -inf behind them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphhash.buckets import BucketMap
from graphhash.embedding import BucketEmbedding
from graphhash.quantization import bias_dtype, quantize_rows
from graphhash.retrieval import MatrixFactorization
from graphhash.vocabulary import Vocabulary
from serving.bundle import BundleError

OPSET, ML_OPSET, IR_VERSION = 20, 4, 10


def retrieval_graph(
    model: MatrixFactorization,
    user_map: BucketMap,
    item_map: BucketMap,
    users: Vocabulary,
    items: Vocabulary,
    precision: str,
) -> onnx.ModelProto:
    """The graph as described above.

    Args:
        model, user_map, item_map, users, items: of one run; the caller has checked that they fit.
        precision: type of the stored tables, "float32", "float16" or "int8" (with a float16 scale per row).

    Raises:
        BundleError: a value of a table or of the bias is not finite in `precision`.
    """
    graph = _Graph()
    n_users, n_items = len(users), len(items)
    graph.constant("n_users", np.int64(n_users))
    graph.constant("n_items", np.int64(n_items))
    graph.constant("axis_1", np.array([1], np.int64))

    user = graph.node("LabelEncoder", ["user_id"], "user", domain="ai.onnx.ml", **_encoder(users, "user"))
    graph.node("Less", [user, "n_users"], "known")
    user_vectors = _vectors(graph, "user", model.user_embedding, user_map, precision, user)
    item_vectors = _vectors(graph, "item", model.item_embedding, item_map, precision, None)
    factors = [user_vectors, item_vectors]
    if model.item_bias is not None:
        bias = np.append(_array(model.item_bias), 0)
        stored = graph.constant("item_bias", _values(bias, "item bias", bias_dtype(precision)))
        factors.append(stored if precision == "float32" else graph.node("Cast", [stored], "bias", to=TensorProto.FLOAT))
    scores = graph.node("Gemm", factors, "all_scores", transB=1)

    # Column n_items is the unknown ids' entry: it takes the excluded ids that are no items, and is always
    # excluded itself.
    excluded = graph.node(
        "LabelEncoder", ["exclude_item_id"], "excluded_items", domain="ai.onnx.ml", **_encoder(items, "item")
    )
    batch = graph.node("Shape", ["user_id"], "batch")
    column = graph.node("Concat", [batch, "axis_1"], "column_shape", axis=0)
    padding = graph.node("Expand", ["n_items", column], "unknown_column")
    columns = graph.node("Concat", [excluded, padding], "excluded_columns", axis=1)
    graph.constant("minus_infinity", np.float32(-np.inf))
    updates = graph.node(
        "Expand", ["minus_infinity", graph.node("Shape", [columns], "excluded_shape")], "excluded_scores"
    )
    masked = graph.node("ScatterElements", [scores, columns, updates], "masked_scores", axis=1)

    k = graph.node("Reshape", [graph.node("Min", ["k", "n_items"], "k_or_all"), "axis_1"], "k_vector")
    graph.node("TopK", [masked, k], ["score", "item"], axis=1, largest=1, sorted=1)
    graph.initializers.append(_ids_tensor(items, "item_ids"))
    graph.node("Gather", ["item_ids", "item"], "item_id", axis=0)

    types = {"int64": TensorProto.INT64, "string": TensorProto.STRING}
    value = helper.make_tensor_value_info
    inputs = [
        value("user_id", types[users.kind], ["batch"], "raw user ids; unknown ones read the fallback vector"),
        value("k", TensorProto.INT64, [], "items per user, from 1; more than n_items gives n_items"),
        value(
            "exclude_item_id",
            types[items.kind],
            ["batch", "n_exclude"],
            "raw item ids not to recommend; unknown ids are ignored",
        ),
    ]
    outputs = [
        value("item_id", types[items.kind], ["batch", "k_or_all"], "raw item ids, best first"),
        value(
            "score",
            TensorProto.FLOAT,
            ["batch", "k_or_all"],
            "score of each item; -inf marks an excluded item in a slot left over",
        ),
        value("known", TensorProto.BOOL, ["batch"], "whether the user is in the model"),
    ]
    return helper.make_model(
        helper.make_graph(graph.nodes, "retrieval", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)],
        ir_version=IR_VERSION,
        producer_name="graphhash",
    )


def describe(values: Any) -> dict[str, dict[str, Any]]:
    """Names, types and meanings of graph inputs or outputs, for the manifest."""
    names = {
        TensorProto.INT64: "int64",
        TensorProto.STRING: "string",
        TensorProto.FLOAT: "float32",
        TensorProto.BOOL: "bool",
    }
    return {
        value.name: {
            "dtype": names[value.type.tensor_type.elem_type],
            "shape": [axis.dim_param for axis in value.type.tensor_type.shape.dim],
            "meaning": value.doc_string,
        }
        for value in values
    }


class _Graph:
    """Nodes and initializers in the order they are added; every method returns the name of what it added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    @property
    def names(self) -> set[str]:
        return {tensor.name for tensor in self.initializers}

    def constant(self, name: str, values: NDArray | np.generic) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> str:
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names[0]


def _vectors(
    graph: _Graph,
    side: str,
    embedding: BucketEmbedding,
    bucket_map: BucketMap,
    precision: str,
    entry: str | None,
) -> str:
    """Vectors of the map entries in the tensor `entry`, or of all n_ids + 1: shape (n_entries, dim)."""

    def of_entry(stored: str) -> str:
        if entry is None:
            return stored
        return graph.node("Gather", [stored, entry], f"{stored}_of_entry", axis=0)

    def cast(source: str, name: str, dtype: int) -> str:
        return graph.node("Cast", [source], name, to=dtype)

    # A table that both sides share is stored once, by the users.
    owner = "shared" if bucket_map.shared else side
    if bucket_map.shared and side == "item":
        tables = [name for name in (f"{owner}_table", f"{owner}_scales") if name in graph.names]
    else:
        tables = _tables(graph, owner, _array(embedding.table), precision)
    if bucket_map.identity:
        read = [of_entry(table) for table in tables]
    else:
        stored = bucket_map.rows.astype(bucket_map.rows_dtype)
        # One lookup without a weight is a plain Gather, and needs no axis of its own.
        graph.constant(f"{side}_rows", stored if bucket_map.profiles is not None else stored[:, 0])
        rows = of_entry(f"{side}_rows")
        if stored.dtype == np.uint16:  # Gather takes int32 or int64 indices.
            rows = cast(rows, f"{side}_buckets", TensorProto.INT32)
        read = [graph.node("Gather", [table, rows], f"{side}_{table}_read", axis=0) for table in tables]
    if precision != "float32":
        read = [cast(source, f"{source}_float32", TensorProto.FLOAT) for source in read]
    # The scales of 8-bit rows have shape (..., 1).
    rows_read = read[0] if len(read) == 1 else graph.node("Mul", read, f"{side}_rows_scaled")
    if bucket_map.profiles is None:
        return rows_read
    graph.constant(f"{side}_profiles", bucket_map.profiles)
    graph.constant(f"{side}_profile_of", bucket_map.profile_of)
    profile = cast(of_entry(f"{side}_profile_of"), f"{side}_profile", TensorProto.INT32)
    weights = graph.node("Gather", [f"{side}_profiles", profile], f"{side}_weights", axis=0)
    # (n, 1, n_lookups) @ (n, n_lookups, dim): no second array of the size of what was read.
    weights = graph.node("Unsqueeze", [weights, "axis_1"], f"{side}_weights_row")
    summed = graph.node("MatMul", [weights, rows_read], f"{side}_weighted_sum")
    return graph.node("Squeeze", [summed, "axis_1"], f"{side}_vectors")


def _tables(graph: _Graph, side: str, table: NDArray, precision: str) -> list[str]:
    """What is stored of a table: its values, or 8-bit codes and their scales, whose product they are."""
    if precision != "int8":
        return [graph.constant(f"{side}_table", _values(table, f"{side} table", precision))]
    try:
        codes, scales = quantize_rows(table)
    except ValueError as error:
        raise BundleError(f"{side} table holds {error}; train with a lower learning rate, or use float32") from error
    return [graph.constant(f"{side}_table", codes), graph.constant(f"{side}_scales", scales)]


def _array(tensor: torch.Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()


def _values(array: NDArray, name: str, precision: str) -> NDArray:
    with np.errstate(over="ignore"):
        values = array.astype(precision)
    if not np.isfinite(values).all():
        worst = array[~np.isfinite(values)].flat[0]
        raise BundleError(
            f"{name} holds {worst}, which is not finite in {precision}; "
            "train with a lower learning rate, or use float32"
        )
    return values


def _encoder(vocabulary: Vocabulary, side: str) -> dict[str, onnx.TensorProto]:
    """Attributes of the LabelEncoder raw id -> row; an unknown id becomes len(vocabulary)."""
    return {
        "keys_tensor": _ids_tensor(vocabulary, f"{side}_keys"),
        "values_tensor": numpy_helper.from_array(
            np.arange(len(vocabulary), dtype=np.int64), f"{side}_values"
        ),
        "default_tensor": numpy_helper.from_array(np.array([len(vocabulary)], np.int64), f"{side}_default"),
    }


def _ids_tensor(vocabulary: Vocabulary, name: str) -> onnx.TensorProto:
    if vocabulary.kind == "int64":
        return numpy_helper.from_array(vocabulary.ids.to_numpy(), name)
    encoded = [text.encode("utf-8") for text in vocabulary.ids.to_pylist()]
    return helper.make_tensor(name, TensorProto.STRING, [len(encoded)], encoded)
