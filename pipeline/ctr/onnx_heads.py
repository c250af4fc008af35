"""The heads of CTR models as ONNX nodes, as the `forward` of the heads in `graphhash.models.ctr`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from graphhash.models.ctr import DcnV2Head, DeepFmHead, DlrmHead, FinalNetHead
from graphhash.models.ctr_layers import BatchNorm, FactorizedLayer
from pipeline.export.graph import Graph
from pipeline.export.layers import as_array, axes_1_2, linear, perceptron, squeezed


def head_logit(graph: Graph, head: nn.Module, vectors: str, numbers: str | None, places: Sequence[int]) -> str:
    """The head's logit, float32, shape (batch,).

    Args:
        vectors: of the fields, float32, shape (batch, n_fields, dim).
        numbers: the dense columns, float32, shape (batch, n_dense); None without any.
        places: where every field of the model is in `vectors`. Other heads than DLRM's take them in order.
    """
    if isinstance(head, FinalNetHead):
        return _final_net(graph, head, vectors, numbers)
    if isinstance(head, DlrmHead):
        units = _dlrm(graph, head, vectors, numbers, places)
    else:
        first = _joined(graph, vectors, numbers, "")
        if isinstance(head, DcnV2Head):
            units = _dcn(graph, head, first)
        else:
            assert isinstance(head.network, nn.Module)
            units = perceptron(graph, "/deep", head.network, first)
    assert isinstance(head.out, nn.Module)
    logit = squeezed(graph, linear(graph, "/out", head.out, units), "/head")
    if not isinstance(head, DeepFmHead):
        return logit
    return graph.node("Add", [logit, _factorization(graph, vectors)], "/head_and_fm")


def _joined(graph: Graph, vectors: str, numbers: str | None, name: str) -> str:
    """Vectors of all fields and dense columns side by side."""
    flat = graph.node("Flatten", [vectors], f"{name}/vectors_flat", axis=1)
    return flat if numbers is None else graph.node("Concat", [flat, numbers], f"{name}/joined", axis=1)


def _dcn(graph: Graph, head: DcnV2Head, first: str) -> str:
    """Units of the cross network, and of the deep network behind it or beside it."""
    crossed = first
    for n, layer in enumerate(head.cross.layers):
        product = graph.node("Mul", [first, _cross_layer(graph, f"/cross_{n}", layer, crossed)], f"/cross_{n}_product")
        crossed = graph.node("Add", [product, crossed], f"/cross_{n}_out")
    if head.stacked:
        return perceptron(graph, "/deep", head.network, crossed)
    return graph.node("Concat", [crossed, perceptron(graph, "/deep", head.network, first)], "/parallel", axis=1)


def _cross_layer(graph: Graph, name: str, layer: nn.Module, crossed: str) -> str:
    """The linear part of a cross layer, of a square matrix or of two narrow ones."""
    if isinstance(layer, nn.Sequential):
        narrow, wide = layer
        return linear(graph, name, wide, linear(graph, f"{name}_narrow", narrow, crossed))
    return linear(graph, name, layer, crossed)


def _dlrm(graph: Graph, head: DlrmHead, vectors: str, numbers: str | None, places: Sequence[int]) -> str:
    """Units of the network over the inner products of all pairs of vectors."""
    of_dense, place = None, np.array(places)
    if head.dense is not None:
        assert numbers is not None
        of_dense = perceptron(graph, "/dense_network", head.dense, numbers)
        field = graph.node("Unsqueeze", [of_dense, graph.axis(1)], "/dense_field")
        vectors = graph.node("Concat", [field, vectors], "/all_fields", axis=1)
        place = np.append(0, place + 1)
    turned = graph.node("Transpose", [vectors], "/fields_turned", perm=[0, 2, 1])
    products = graph.node("Flatten", [graph.node("MatMul", [vectors, turned], "/products")], "/products_flat", axis=1)
    first, second = np.divmod(as_array(head.dots.pairs), len(place))
    pairs = graph.constant("/pairs", place[first] * len(place) + place[second])
    units = graph.node("Gather", [products, pairs], "/dots", axis=1)
    units = units if of_dense is None else graph.node("Concat", [of_dense, units], "/dense_and_dots", axis=1)
    return perceptron(graph, "/deep", head.network, units)


def _final_net(graph: Graph, head: FinalNetHead, vectors: str, numbers: str | None) -> str:
    """The mean of the logits of both streams, shape (batch,)."""
    layer = head.gate.gates
    gates = graph.node("MatMul", [graph.constant("/gate_weight", as_array(layer.weight)), vectors], "/gate_units")
    offset = graph.constant("/gate_offset", as_array(layer.bias)[:, None])
    gated = graph.node("Mul", [vectors, graph.node("Add", [gates, offset], "/gates")], "/gated")
    both = graph.node("Concat", [vectors, gated], "/fields_and_gated", axis=1)
    logits = []
    for name, network, out, fields in (
        ("/first", head.network, head.out, both),
        ("/second", head.second, head.out_second, vectors),
    ):
        units = _factorized(graph, name, network, _joined(graph, fields, numbers, name))
        logits.append(squeezed(graph, linear(graph, f"{name}_out", out, units), f"{name}_logit"))
    total = graph.node("Add", logits, "/both_streams")
    return graph.node("Mul", [total, graph.constant("/half", np.float32(0.5))], "/head")


def _factorized(graph: Graph, name: str, network: nn.Sequential, units: str) -> str:
    """Factorized layers, batch normalization as a factor and an offset, and ReLUs; each half of a layer's linear units is a node."""
    for number, layer in enumerate(network):
        if isinstance(layer, FactorizedLayer):
            weight, offset = as_array(layer.linear.weight), as_array(layer.linear.bias)
            halves = []
            for half, rows in (("linear", slice(0, len(weight) // 2)), ("factor", slice(len(weight) // 2, None))):
                of_half = f"{name}_{number}_{half}"
                inputs = [
                    graph.constant(f"{of_half}_{part}", values[rows])
                    for part, values in (("weight", weight), ("offset", offset))
                ]
                halves.append(graph.node("Gemm", [units, *inputs], f"{of_half}_units", transB=1))
            product = graph.node("Mul", halves, f"{name}_{number}_product")
            units = graph.node("Concat", [halves[0], product], f"{name}_{number}_units", axis=1)
        elif isinstance(layer, BatchNorm):
            factor, offset = map(as_array, layer.factor_and_offset())
            units = graph.node(
                "Mul", [units, graph.constant(f"{name}_{number}_factor", factor)], f"{name}_{number}_scaled"
            )
            units = graph.node(
                "Add", [units, graph.constant(f"{name}_{number}_offset", offset)], f"{name}_{number}_normal"
            )
        elif isinstance(layer, nn.ReLU):
            units = graph.node("Relu", [units], f"{name}_{number}")
    return units


def _factorization(graph: Graph, vectors: str) -> str:
    """Half of the square of the sum less the sum of the squares, shape (batch,)."""
    total = graph.node("ReduceSum", [vectors, graph.axis(1)], "/fm_sum", keepdims=0)
    squared = graph.node("Mul", [total, total], "/fm_squared_sum")
    square = graph.node("ReduceSum", [squared, graph.axis(1)], "/fm_square", keepdims=0)
    squares = graph.node("Mul", [vectors, vectors], "/fm_squared")
    squares = graph.node("ReduceSum", [squares, axes_1_2(graph)], "/fm_squares", keepdims=0)
    twice = graph.node("Sub", [square, squares], "/fm_twice")
    return graph.node("Mul", [twice, graph.constant("/half", np.float32(0.5))], "/fm")
