"""The k best items as ONNX nodes: a scan of the catalogue, or the best buckets first and their items second.

Where an item reads one bucket without a weight, items of a bucket differ by their bias alone. With e excluded items, the k best
others are then in the k + e buckets that are best by score plus the best bias in them: each of these holds an item that is as
good as that, at most e of which are excluded, and no item elsewhere is better than any of them. Of each bucket, the k + e items of
the largest biases are enough. Equal scores go to the lower item row in both ways: buckets are numbered by the row of their best
item, and TopK takes the first of equals.

Whether this is faster than the scan depends on how many items share a bucket, and on k + e, whose square is the number of items
that are compared; a request is asked which way it goes. ms of CPU, scan and buckets first, of 41,000 items in 8,000 buckets, and of
400,000 in 40,000 (materialized, dim 64, random maps): 1 user, k = 20: 0.96 and 0.28, 8.9 and 0.9; 256 users: 20.7 and 10.7, 183 and 32;
256 users, k = 100: 29 and 40, 196 and 77; 256 users, k = 20, 30 items excluded: 21 and 27, 186 and 58.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeline.export.graph import Graph
from pipeline.retrieval.onnx_parts import Parts
from pipeline.retrieval.onnx_scores import Scores

# Buckets over items, up to which buckets come first.
MOST_BUCKETS = 0.5
# An item that is compared costs as much as this many that are scanned, and this many times its looks at an excluded one.
_SLOT_COST = 32
_LOOKS_PER_SLOT = 48


def has_buckets_first(parts: Parts) -> bool:
    """Whether items of a bucket differ by their bias alone, and buckets are few."""
    item_map = parts.item_map
    plain = not item_map.identity and item_map.codebook is None and not item_map.shared
    return plain and parts.item_residual is None and item_map.n_buckets <= MOST_BUCKETS * item_map.n_ids


def with_ordered_buckets(parts: Parts) -> Parts:
    """The same with the items' buckets numbered by the row of their best item; those without items, and the OOV one, last."""
    best = _members(parts)[0]
    order = np.argsort(best, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    rows = number[parts.item_map.rows].astype(np.int32)
    ordered = dataclasses.replace(parts.item_map, rows=rows)
    assert isinstance(parts.item_table, np.ndarray), "product codes have no buckets"
    return dataclasses.replace(parts, item_table=parts.item_table[order], item_map=ordered)


def _members(parts: Parts) -> tuple[NDArray, NDArray, NDArray]:
    """Of every bucket its best item, n_items for none; all items, by bucket, bias descending and row; where each bucket's begin."""
    n_items, n_buckets = parts.item_map.n_ids, parts.item_map.n_buckets
    buckets = parts.item_map.rows[:n_items, 0]
    bias = np.zeros(n_items, np.float32) if parts.item_bias is None else parts.item_bias
    members = np.lexsort((np.arange(n_items), -bias, buckets))
    starts = np.searchsorted(buckets[members], np.arange(n_buckets + 1))
    best = np.full(n_buckets, n_items)
    has_items = starts[1:] > starts[:-1]
    best[has_items] = members[starts[:-1][has_items]]
    return best, members, starts


def _most_compared(n_items: int, n_buckets: int) -> int:
    """Slots, times looks at excluded items and what a slot costs in them, up to which the best buckets are faster than the scan."""
    return _LOOKS_PER_SLOT * (n_items - n_buckets) // _SLOT_COST


def scan(graph: Graph, scores: Scores, n_items: int, excluded: str, batch: str, k: str) -> tuple[str, str]:
    """Scores and rows of the k best of all items; excluded ones come last, at -inf.

    Args:
        excluded: rows, int64, shape (batch, n_exclude).
        batch, k: int64, shape (1,).
    """
    # Column n_items is the OOV entry: it takes the excluded ids that are no items, and is always
    # excluded itself, as is what fills the last chunk up.
    surplus = graph.constant("surplus_columns", np.arange(n_items, scores.n_columns)[None])
    padding = graph.node(
        "Expand", [surplus, graph.node("Concat", [batch, graph.axis(1)], "column_shape", axis=0)], "surplus"
    )
    columns = graph.node("Concat", [excluded, padding], "excluded_columns", axis=1)
    updates = graph.node(
        "Expand", ["minus_infinity", graph.node("Shape", [columns], "excluded_shape")], "excluded_scores"
    )
    masked = graph.node("ScatterElements", [scores.all_scores(graph), columns, updates], "masked_scores", axis=1)
    graph.node("TopK", [masked, k], ["scan_scores", "scan_items"], axis=1, largest=1, sorted=1)
    return "scan_scores", "scan_items"


class BucketsFirst:
    """The other way.

    Args:
        graph: where what all requests share goes.
        parts: with ordered buckets, its bias rounded as it is stored.
    """

    def __init__(self, graph: Graph, parts: Parts) -> None:
        best, members, starts = _members(parts)
        self.n_items, self.n_buckets = len(members), len(best)
        self.largest = int(np.diff(starts).max())
        bias = np.zeros(self.n_items, np.float32) if parts.item_bias is None else parts.item_bias
        # A bucket without items has no best one.
        graph.constant("best_bias", np.append(bias, -np.inf)[best].astype(np.float32))
        # Behind the last item stands the OOV entry, for slots that a bucket does not fill.
        small = np.uint16 if self.n_items < 2**16 else np.int32
        graph.constant("bucket_members", np.append(members, self.n_items).astype(small))
        graph.constant("bucket_starts", starts.astype(np.int32))

    def is_faster(self, graph: Graph, excluded: str, k: str) -> str:
        """Whether few enough items are compared: bool, scalar."""
        self.n_excluded = graph.node("Shape", [excluded], "n_excluded", start=1)
        self.wanted = graph.node("Add", [k, self.n_excluded], "wanted")
        limits = (
            graph.constant(f"most_{name}", np.array([n], np.int64))
            for name, n in (("buckets", self.n_buckets), ("members", self.largest))
        )
        self.n_best, self.n_each = (graph.node("Min", [self.wanted, limit], f"{limit}_taken") for limit in limits)
        compared = graph.node("Mul", [self.n_best, self.n_each], "n_slots")
        # Every slot is compared with every excluded item.
        looks = graph.node(
            "Add", [self.n_excluded, graph.constant("looks_per_slot", np.array([_LOOKS_PER_SLOT], np.int64))], "n_looks"
        )
        compared = graph.node("Mul", [compared, looks], "n_compared")
        most = graph.constant("most_compared", np.array([_most_compared(self.n_items, self.n_buckets)], np.int64))
        return graph.node("Squeeze", [graph.node("LessOrEqual", [compared, most], "few_compared")], "buckets_first")

    def best_items(self, graph: Graph, scores: Scores, excluded: str, batch: str, k: str) -> tuple[str, str]:
        """As `scan`; left-over slots at -inf hold any item."""
        of_bucket = scores.bucket_scores(graph, self.n_buckets)
        bounds = graph.node("Add", [of_bucket, "best_bias"], "bounds")
        graph.node("TopK", [bounds, self.n_best], ["best_bounds", "best_buckets"], axis=1, largest=1, sorted=1)
        one = graph.constant("one_int", np.int64(1))
        following = graph.node("Add", ["best_buckets", one], "next_buckets")

        def column(name: str, number: str) -> str:
            return graph.node("Unsqueeze", [number, graph.axis(2)], f"{name}_column")

        ends = []
        for name, number in (("first_slot", "best_buckets"), ("last_slot", following)):
            end = graph.node("Gather", ["bucket_starts", number], f"{name}_stored", axis=0)
            ends.append(column(name, graph.cast(end, name, TensorProto.INT64)))
        each = graph.node("Squeeze", [self.n_each], "n_each")
        steps = graph.node("Range", [graph.constant("zero", np.int64(0)), each, one], "steps")
        slots = graph.node("Add", [ends[0], steps], "slots")
        is_filled = graph.node("Less", [slots, ends[1]], "slot_is_filled")
        slots = graph.node("Where", [is_filled, slots, "n_items"], "slots_or_none")
        rows = graph.cast(
            graph.node("Gather", ["bucket_members", slots], "slot_stored", axis=0), "slot_rows", TensorProto.INT64
        )
        chosen = graph.node("GatherElements", [of_bucket, "best_buckets"], "chosen_scores", axis=1)
        found = column("chosen", chosen)
        # Slots of shape (batch, buckets, items of each) from here on side by side.
        flat = graph.node("Concat", [batch, graph.axis(-1)], "flat_shape", axis=0)
        if scores.bias is not None:
            found = graph.node(
                "Add", [found, graph.node("Gather", [scores.bias, rows], "slot_bias", axis=0)], "slot_scores"
            )
        found = graph.node("Where", [is_filled, found, "minus_infinity"], "filled_scores")
        found, rows = (graph.node("Reshape", [part, flat], f"{part}_flat") for part in (found, rows))
        # The first of equals is to be the lower row.
        n_slots = graph.node("Shape", [rows], "n_all_slots", start=1)
        graph.node("TopK", [rows, n_slots], ["sorted_rows", "row_order"], axis=1, largest=0, sorted=1)
        found = graph.node("GatherElements", [found, "row_order"], "sorted_scores", axis=1)
        looks = [column("row", "sorted_rows"), graph.node("Unsqueeze", [excluded, graph.axis(1)], "excluded_row")]
        hits = graph.cast(graph.node("Equal", looks, "is_hit"), "hits", TensorProto.FLOAT)
        n_hits = graph.node("ReduceSum", [hits, graph.axis(2)], "n_hits", keepdims=0)
        is_out = graph.node("Greater", [n_hits, graph.constant("half", np.float32(0.5))], "slot_is_excluded")
        found = graph.node("Where", [is_out, "minus_infinity", found], "open_scores")
        graph.node("TopK", [found, k], ["bucket_best_scores", "bucket_places"], axis=1, largest=1, sorted=1)
        items = graph.node("GatherElements", ["sorted_rows", "bucket_places"], "bucket_rows_found", axis=1)
        return "bucket_best_scores", graph.node(
            "Min", [items, graph.constant("last_item", np.int64(self.n_items - 1))], "bucket_best_items"
        )


def best_of(
    graph: Graph, scores: Scores, first: BucketsFirst | None, n_items: int, excluded: str, batch: str, k: str
) -> tuple[str, str]:
    """Scores, float32, and rows, int64, of the k best items, best first: shape (batch, k) each; arguments as in `scan`."""
    if first is None:
        return scan(graph, scores, n_items, excluded, batch, k)
    few, all_of_them = Graph(graph), Graph(graph)
    asked = first.is_faster(graph, excluded, k)
    bodies = (
        few.body("buckets_first_body", [], top_types(*first.best_items(few, scores, excluded, batch, k))),
        all_of_them.body("scan_body", [], top_types(*scan(all_of_them, scores, n_items, excluded, batch, k))),
    )
    graph.node("If", [asked], ["best_scores", "best_items"], then_branch=bodies[0], else_branch=bodies[1])
    return "best_scores", "best_items"


def top_types(score: str, item: str) -> list[onnx.ValueInfoProto]:
    """Types of a branch's outputs."""
    return [
        helper.make_tensor_value_info(score, TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info(item, TensorProto.INT64, [None, None]),
    ]
