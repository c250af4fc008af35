"""NeuMF's scores as ONNX nodes: what differs from inner products (`pipeline.retrieval.onnx_scores`)."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, helper

from graphhash.models.mf import RetrievalModel
from graphhash.models.neumf import NeuMF
from pipeline.export.graph import Graph
from pipeline.export.layers import as_array
from pipeline.export.tables import as_stored
from pipeline.retrieval.onnx_scores import Scores


class NeuMFScores(Scores):
    """`h^T [p_u * q_i ; network(p'_u, q'_i)] + b_i` (He et al., WWW 2017, eq. 12): see `graphhash.models.neumf`."""

    @torch.no_grad()
    def _prepare(self, graph: Graph, model: RetrievalModel) -> None:
        assert isinstance(model, NeuMF)
        self.half_dim = model.half_dim
        of_product, of_network = model.out.weight.squeeze(0).split([model.half_dim, model.half_dim // 2])
        layers = {
            "of_item": model.of_item.weight.T, "of_item_bias": model.of_item.bias,
            "hidden": model.hidden.weight.T, "hidden_bias": model.hidden.bias,
            "of_network": of_network[:, None],
        }  # fmt: skip
        for name, weight in layers.items():
            graph.constant(name, np.ascontiguousarray(as_stored(as_array(weight), f"layer {name}", "float32")))
        halves = graph.constant("halves", np.array([self.half_dim, self.half_dim], np.int64))
        products, network = f"{self.users}_products", f"{self.users}_network"
        graph.node("Split", [self.users, halves], [products, network], axis=1)
        self.products = graph.node(
            "Mul", [products, graph.constant("of_product", as_array(of_product))], "user_products"
        )
        self.part = graph.node(
            "MatMul", [network, graph.constant("of_user", as_array(model.of_user.weight.T).copy())], "user_part"
        )

    def _item_halves(self, graph: Graph, name: str, vectors: str, axis: int) -> tuple[str, str]:
        """The half for the product, and the item's part of the first layer."""
        products, network = f"{name}_products", f"{name}_network"
        graph.node("Split", [vectors, "halves"], [products, network], axis=axis)
        part = graph.node("MatMul", [network, "of_item"], f"{name}_first")
        return products, graph.node("Add", [part, "of_item_bias"], f"{name}_part")

    def _network(self, graph: Graph, name: str, first: str) -> str:
        """The network's share of the score from the sum of both parts of its first layer, shape (..., half): shape (...)."""
        hidden = graph.node("MatMul", [graph.node("Relu", [first], f"{name}_relu"), "hidden"], f"{name}_hidden")
        hidden = graph.node("Relu", [graph.node("Add", [hidden, "hidden_bias"], f"{name}_sum")], f"{name}_relu_2")
        column = graph.node("MatMul", [hidden, "of_network"], f"{name}_column")
        return graph.node("Squeeze", [column, graph.axis(-1)], f"{name}_share")

    def _of_vectors(self, graph: Graph, name: str, vectors: str, bias: str | None) -> str:
        products, part = self._item_halves(graph, name, vectors, 1)
        linear = graph.node(
            "Gemm", [self.products, products] + ([] if bias is None else [bias]), f"{name}_linear", transB=1
        )
        # One user at a time: hidden units of (batch, n_items) pairs would be `half` times as large as the scores.
        body = Graph(graph)
        share = self._network(body, f"{name}_deep", body.node("Add", [part, f"{name}_one_user"], f"{name}_both"))
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in (f"{name}_one_user", share)]
        scan = body.body(f"{name}_user", values[:1], values[1:])
        deep = graph.node("Scan", [self.part], f"{name}_network_scores", body=scan, num_scan_inputs=1)
        return graph.node("Add", [linear, deep], f"{name}_scores")

    def _of_pairs(self, graph: Graph, vectors: str) -> str:
        products, part = self._item_halves(graph, "candidate", vectors, 2)
        column = graph.node("Unsqueeze", [self.products, graph.axis(2)], "user_products_column")
        linear = graph.node("MatMul", [products, column], "candidate_linear_column")
        linear = graph.node("Squeeze", [linear, graph.axis(2)], "candidate_linear")
        first = graph.node(
            "Add", [part, graph.node("Unsqueeze", [self.part, graph.axis(1)], "user_part_row")], "candidate_both"
        )
        return graph.node("Add", [linear, self._network(graph, "candidate_deep", first)], "candidate_pair_scores")

    def _of_materialized(self, graph: Graph) -> str:
        biases = len(self.blocks) * [None] if self.bias is None else self._bias_of_blocks(graph)
        of_blocks = enumerate(zip(self.blocks, biases, strict=True))
        return self._joined(
            graph, [self._of_vectors(graph, f"catalogue_{i}", block, bias) for i, (block, bias) in of_blocks]
        )

    def _of_chunks(self, graph: Graph) -> str:
        # The network is no sum over buckets, so there is no short way for few users.
        return self._scan_vectors(graph)
