"""The ONNX graph of a retrieval model: raw user ids in, the best raw item ids out, and scores of candidates.

    user_id -> rows -> Gather rows and weights -> Gather table -> weighted sum
    if k > 0: scores (`pipeline.retrieval.onnx_scores`) -> the k best items that are not excluded (`pipeline.retrieval.onnx_topk`)
        -> raw ids
    candidate_item_id -> rows -> vectors -> scores with the user

All inputs are required, because runtimes differ in what they do with defaults: who only recommends passes candidates of shape
(1, 0), and k = 0 leaves the catalogue out, so that who only scores does not pay for it: ONNX Runtime computes all outputs, asked
for or not. A second file would hold the ids' encoders again, which are most of a small bundle with string ids.

Tables, rows and numbers of weight codebook are stored in their small types. A user left with fewer than k items that are not
excluded gets excluded ones at score -inf behind them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphhash.errors import ArgumentError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.quantization import STEPS, rounded_bias
from graphhash.models.mf import RetrievalModel
from graphhash.models.neumf import NeuMF
from pipeline.export.graph import ONNX_TYPES, Graph
from pipeline.export.ids import decode_ids, encode_ids
from pipeline.export.tables import as_stored
from pipeline.retrieval.onnx_neumf import NeuMFScores
from pipeline.retrieval.onnx_parts import Parts, stored_parts
from pipeline.retrieval.onnx_scores import Scores
from pipeline.retrieval.onnx_topk import BucketsFirst, best_of, has_buckets_first, top_types, with_ordered_buckets
from serving.errors import BundleError


def retrieval_graph(
    model: RetrievalModel,
    user_map: BucketMap,
    item_map: BucketMap,
    users: Vocabulary,
    items: Vocabulary,
    precision: str,
    runtime: str = "materialized",
) -> onnx.ModelProto:
    """The graph as described above.

    Args:
        model, user_map, item_map, users, items: of one run; the caller has checked that they fit.
        precision: type of the stored tables, "float32", "float16", or "int8" or "int4" (with a float16 scale per row).
        runtime: "materialized" or "compressed", see `pipeline.retrieval.onnx_scores`.

    Raises:
        BundleError: a value of a table or of the bias is not finite in `precision`.
    """
    graph = Graph()
    graph.constant("n_users", np.int64(len(users)))
    graph.constant("n_items", np.int64(len(items)))
    user = encode_ids(graph, "user", users, "user_id")
    graph.node("Less", [user, "n_users"], "known")
    excluded, candidates = _item_rows(graph, items)
    kind = NeuMFScores if isinstance(model, NeuMF) else Scores
    parts = stored_parts(model, user_map, item_map)
    parts = _rounded_bias(parts, precision)
    ordered = kind is Scores and has_buckets_first(parts)
    parts = with_ordered_buckets(parts) if ordered else parts
    scores = kind(graph, model, parts, precision, user, compressed=runtime == "compressed")
    _best_items(graph, scores, BucketsFirst(graph, parts) if ordered else None, items, excluded)
    _candidates(graph, scores, candidates)
    return graph.model("retrieval", _inputs(users, items), _outputs(items))


def _inputs(users: Vocabulary, items: Vocabulary) -> list[onnx.ValueInfoProto]:
    value, item_type = helper.make_tensor_value_info, ONNX_TYPES[items.kind]
    return [
        value("user_id", ONNX_TYPES[users.kind], ["batch"], "raw user ids; out-of-vocabulary ones read the OOV row"),
        value(
            "k",
            TensorProto.INT64,
            [],
            "items per user; more than n_items gives n_items, and 0 leaves the catalogue out",
        ),
        value(
            "exclude_item_id",
            item_type,
            ["batch", "n_exclude"],
            "raw item ids not to recommend, shape (batch, 0) for none; out-of-vocabulary ids are ignored",
        ),
        value(
            "candidate_item_id",
            item_type,
            ["batch_or_1", "n_candidates"],
            "raw item ids to score, a row per user or one row for all, shape (1, 0) for none; out-of-vocabulary ones read the OOV row",
        ),
    ]


def _outputs(items: Vocabulary) -> list[onnx.ValueInfoProto]:
    value, item_type = helper.make_tensor_value_info, ONNX_TYPES[items.kind]
    return [
        value("item_id", item_type, ["batch", "k_or_all"], "raw item ids, best first"),
        value(
            "score",
            TensorProto.FLOAT,
            ["batch", "k_or_all"],
            "score of each item; -inf marks an excluded item in a slot left over",
        ),
        value("known", TensorProto.BOOL, ["batch"], "whether the user is in the model"),
        value("candidate_score", TensorProto.FLOAT, ["batch", "n_candidates"], "score of each candidate"),
        value(
            "candidate_known", TensorProto.BOOL, ["batch_or_1", "n_candidates"], "whether the candidate is in the model"
        ),
    ]


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
        graph.node("Reshape", [part, shape], f"{part}_shaped", allowzero=1)
        for part, shape in zip(parts, shapes, strict=True)
    )
    return excluded, candidates


def _best_items(graph: Graph, scores: Scores, first: BucketsFirst | None, items: Vocabulary, excluded: str) -> None:
    """The outputs `item_id` and `score`."""
    some, none = Graph(graph), Graph(graph)
    graph.constant("minus_infinity", np.float32(-np.inf))
    batch = graph.node("Shape", ["user_id"], "batch")
    k = some.node("Reshape", [some.node("Min", ["k", "n_items"], "k_or_all"), graph.axis(1)], "k_vector")
    best = best_of(some, scores, first, len(items), excluded, batch, k)
    empty = none.node("Concat", [batch, graph.axis(0)], "empty_shape", axis=0)
    nothing = (
        none.node("Expand", ["minus_infinity", empty], "no_scores"),
        none.node("Expand", ["n_items", empty], "no_items"),
    )
    asked = graph.node("Greater", ["k", graph.constant("zero", np.int64(0))], "catalogue_asked")
    graph.node(
        "If",
        [asked],
        ["score", "item_rows_found"],
        then_branch=some.body("catalogue", [], top_types(*best)),
        else_branch=none.body("no_catalogue", [], top_types(*nothing)),
    )
    decode_ids(graph, "item_id", items, "item_rows_found")


def _candidates(graph: Graph, scores: Scores, rows: str) -> None:
    """The outputs `candidate_score` and `candidate_known`."""
    # Without candidates, the nodes that read them would take a twentieth of a request for one user.
    some, none = Graph(graph), Graph(graph)
    found = scores.pair_scores(some, rows)
    columns = none.node("Shape", [rows], "n_candidates", start=1)
    shape = none.node("Concat", ["batch", columns], "no_candidates_shape", axis=0)
    nothing = none.node("Expand", ["minus_infinity", shape], "no_candidates")
    asked = graph.node(
        "Greater", [graph.node("Shape", [rows], "n_candidate_columns", start=1), "zero"], "candidates_given"
    )
    asked = graph.node("Squeeze", [asked], "candidates_asked")
    graph.node(
        "If",
        [asked],
        "candidate_score",
        then_branch=some.body(
            "candidates", [], [helper.make_tensor_value_info(found, TensorProto.FLOAT, [None, None])]
        ),
        else_branch=none.body(
            "without_candidates", [], [helper.make_tensor_value_info(nothing, TensorProto.FLOAT, [None, None])]
        ),
    )
    graph.node("Less", [rows, "n_items"], "candidate_known")


def _rounded_bias(parts: Parts, precision: str) -> Parts:
    """With the item bias as it reads once stored: an order by bias must be that of the stored ones."""
    if parts.item_bias is None:
        return parts
    if precision not in STEPS:
        as_stored(parts.item_bias, "item bias", precision)
    try:
        return dataclasses.replace(parts, item_bias=rounded_bias(parts.item_bias, precision))
    except ArgumentError as error:
        raise BundleError(f"item bias holds {error}; train with a lower learning rate, or use float32") from error
