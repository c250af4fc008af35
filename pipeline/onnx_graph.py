"""The ONNX graph of a retrieval model: raw user ids in, the best raw item ids out, and scores of candidates.

    user_id -> rows -> Gather rows and weights -> Gather table -> weighted sum
    item rows and weights -> Gather table -> weighted sum (the unknown ids' entry is the last one)
    If k > 0: Gemm(user vectors, item vectors, item bias) -> excluded columns to -inf -> TopK -> raw ids
    candidate_item_id -> rows -> vectors -> product with the user's vector, and bias

Candidates are an input with an empty default, so that who only recommends need not know of them, and k = 0 leaves the
catalogue out, so that who only scores does not pay for it: ONNX Runtime computes all outputs, asked for or not.
A second file would hold the ids' encoders again, which are most of a small bundle with string ids.

Tables, rows and numbers of weight profiles are stored in their small types. ONNX Runtime folds the item vectors to float32
when it loads the graph, with n_items * n_lookups * dim * 4 bytes needed meanwhile. A user left with fewer
than k items that are not excluded gets excluded ones at score -inf behind them.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graphhash.buckets import BucketMap
from graphhash.quantization import bias_dtype
from graphhash.retrieval import MatrixFactorization
from graphhash.vocabulary import Vocabulary
from pipeline.onnx_nodes import (
    ONNX_TYPES,
    Graph,
    StoredMap,
    Table,
    as_stored,
    decode_ids,
    encode_ids,
    read_vectors,
)

OPTIONAL_INPUTS = ("candidate_item_id",)


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
    graph = Graph()
    graph.constant("n_users", np.int64(len(users)))
    graph.constant("n_items", np.int64(len(items)))
    user = encode_ids(graph, "user", users, "user_id")
    graph.node("Less", [user, "n_users"], "known")
    excluded, candidates = _item_rows(graph, items)
    factors = _Factors(graph, model, user_map, item_map, precision, user)
    _best_items(graph, factors, items, excluded)
    _candidates(graph, factors, candidates)

    value, item_type = helper.make_tensor_value_info, ONNX_TYPES[items.kind]
    inputs = [
        value("user_id", ONNX_TYPES[users.kind], ["batch"], "raw user ids; unknown ones read the fallback vector"),
        value("k", TensorProto.INT64, [], "items per user; more than n_items gives n_items, and 0 leaves the catalogue out"),
        value("exclude_item_id", item_type, ["batch", "n_exclude"], "raw item ids not to recommend; unknown ids are ignored"),
        value(
            "candidate_item_id",
            item_type,
            ["batch_or_1", "n_candidates"],
            "raw item ids to score, a row per user or one row for all; none by default; unknown ones read the fallback vector",
        ),
    ]
    graph.initializers.append(helper.make_tensor("candidate_item_id", item_type, [1, 0], []))
    outputs = [
        value("item_id", item_type, ["batch", "k_or_all"], "raw item ids, best first"),
        value(
            "score", TensorProto.FLOAT, ["batch", "k_or_all"], "score of each item; -inf marks an excluded item in a slot left over"
        ),
        value("known", TensorProto.BOOL, ["batch"], "whether the user is in the model"),
        value("candidate_score", TensorProto.FLOAT, ["batch", "n_candidates"], "score of each candidate"),
        value("candidate_known", TensorProto.BOOL, ["batch_or_1", "n_candidates"], "whether the candidate is in the model"),
    ]
    return graph.model("retrieval", inputs, outputs)


def _item_rows(graph: Graph, items: Vocabulary) -> tuple[str, str]:
    """Rows of excluded items and of candidates, in the shapes of the inputs; one encoder serves both."""
    inputs = ("exclude_item_id", "candidate_item_id")
    flat = [graph.node("Reshape", [name, graph.axis(-1)], f"{name}_flat") for name in inputs]
    rows = encode_ids(graph, "item", items, graph.node("Concat", flat, "raw_items", axis=0))
    sizes = [graph.node("Shape", [name], f"{name}_size") for name in flat]
    parts = [f"{name}_rows" for name in inputs]
    graph.node("Split", [rows, graph.node("Concat", sizes, "item_sizes", axis=0)], parts, axis=0)
    shapes = [graph.node("Shape", [name], f"{name}_shape") for name in inputs]
    # Without allowzero a 0 would mean "as before".
    excluded, candidates = (
        graph.node("Reshape", [part, shape], f"{part}_shaped", allowzero=1) for part, shape in zip(parts, shapes, strict=True)
    )
    return excluded, candidates


class _Factors:
    """Scores that are inner products of user and item vectors, with the items' biases.

    Attributes:
        graph: where everything lies that does not depend on the request.
        users: the users' vectors, shape (batch, dim).
    """

    def __init__(
        self, graph: Graph, model: MatrixFactorization, user_map: BucketMap, item_map: BucketMap, precision: str, user: str
    ) -> None:
        self.graph, self.dim = graph, model.user_embedding.dim
        user_table = Table.add(graph, "shared" if user_map.shared else "user", _array(model.user_embedding.table), precision)
        # A table that both sides share is stored once.
        self.table = user_table if item_map.shared else Table.add(graph, "item", _array(model.item_embedding.table), precision)
        self.map = StoredMap.add(graph, "item", item_map)
        self.users = read_vectors(graph, "user", user_table, StoredMap.add(graph, "user", user_map), user)
        self.items = read_vectors(graph, "item", self.table, self.map, None)
        self.bias: str | None = None
        if model.item_bias is not None:
            # The unknown ids' entry has none.
            bias = as_stored(np.append(_array(model.item_bias), np.float32(0)), "item bias", bias_dtype(precision))
            stored = graph.constant("item_bias", bias)
            self.bias = stored if bias.dtype == np.float32 else graph.cast(stored, "bias", TensorProto.FLOAT)

    def all_scores(self, graph: Graph) -> str:
        """Scores of every item and, last, of the unknown ids' entry: shape (batch, n_items + 1)."""
        factors = [self.users, self.items] + ([] if self.bias is None else [self.bias])
        return graph.node("Gemm", factors, "all_scores", transB=1)

    def pair_scores(self, graph: Graph, rows: str) -> str:
        """Scores of the items in `rows`, int64, shape (batch or 1, n): shape (batch, n)."""
        flat = graph.node("Reshape", [rows, graph.axis(-1)], "candidate_flat")
        vectors = read_vectors(graph, "candidate", self.table, self.map, flat)
        shape = [graph.node("Shape", [rows], "candidate_shape"), graph.constant("dim", np.array([self.dim], np.int64))]
        shape = graph.node("Concat", shape, "candidate_vectors_shape", axis=0)
        vectors = graph.node("Reshape", [vectors, shape], "candidate_of_user", allowzero=1)
        users = graph.node("Unsqueeze", [self.users, graph.axis(2)], "user_column")
        column = graph.node("MatMul", [vectors, users], "candidate_column")
        products = graph.node("Squeeze", [column, graph.axis(2)], "candidate_products")
        if self.bias is None:
            return products
        return graph.node("Add", [products, graph.node("Gather", [self.bias, rows], "candidate_bias", axis=0)], "candidate_sum")


def _best_items(graph: Graph, factors: _Factors, items: Vocabulary, excluded: str) -> None:
    """The outputs `item_id` and `score`."""
    some, none = Graph(graph), Graph(graph)
    scores = factors.all_scores(some)
    # Column n_items is the unknown ids' entry: it takes the excluded ids that are no items, and is always
    # excluded itself.
    batch = graph.node("Shape", ["user_id"], "batch")
    column = some.node("Concat", [batch, graph.axis(1)], "column_shape", axis=0)
    padding = some.node("Expand", ["n_items", column], "unknown_column")
    columns = some.node("Concat", [excluded, padding], "excluded_columns", axis=1)
    graph.constant("minus_infinity", np.float32(-np.inf))
    updates = some.node("Expand", ["minus_infinity", some.node("Shape", [columns], "excluded_shape")], "excluded_scores")
    masked = some.node("ScatterElements", [scores, columns, updates], "masked_scores", axis=1)
    k = some.node("Reshape", [some.node("Min", ["k", "n_items"], "k_or_all"), graph.axis(1)], "k_vector")
    some.node("TopK", [masked, k], ["best_scores", "best_items"], axis=1, largest=1, sorted=1)

    empty = none.node("Concat", [batch, graph.axis(0)], "empty_shape", axis=0)
    none.node("Expand", ["minus_infinity", empty], "no_scores")
    none.node("Expand", ["n_items", empty], "no_items")

    def types(score: str, item: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(score, TensorProto.FLOAT, [None, None]),
            helper.make_tensor_value_info(item, TensorProto.INT64, [None, None]),
        ]

    asked = graph.node("Greater", ["k", graph.constant("zero", np.int64(0))], "catalogue_asked")
    graph.node(
        "If",
        [asked],
        ["score", "item_rows_found"],
        then_branch=some.body("catalogue", [], types("best_scores", "best_items")),
        else_branch=none.body("no_catalogue", [], types("no_scores", "no_items")),
    )
    decode_ids(graph, "item_id", items, "item_rows_found")


def _candidates(graph: Graph, factors: _Factors, rows: str) -> None:
    """The outputs `candidate_score` and `candidate_known`."""
    graph.node("Identity", [factors.pair_scores(graph, rows)], "candidate_score")
    graph.node("Less", [rows, "n_items"], "candidate_known")


def _array(tensor: torch.Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
