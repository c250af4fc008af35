"""Layers of PyTorch models as ONNX nodes, and their weights as arrays."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.export.graph import Graph


def as_array(weights: torch.Tensor | nn.Module) -> NDArray:
    """A parameter or buffer as an array on the CPU; attributes of modules are typed as a tensor or a module."""
    assert isinstance(weights, torch.Tensor), type(weights)
    return weights.detach().cpu().numpy()


def linear(graph: Graph, name: str, layer: nn.Module, units: str) -> str:
    """A linear layer: float32, shape (batch, n_in) -> (batch, n_out)."""
    assert isinstance(layer, nn.Linear), type(layer)
    inputs = [units, graph.constant(f"{name}_weight", as_array(layer.weight))]
    if layer.bias is not None:
        inputs.append(graph.constant(f"{name}_offset", as_array(layer.bias)))
    return graph.node("Gemm", inputs, f"{name}_units", transB=1)


def perceptron(graph: Graph, name: str, network: nn.Module, units: str) -> str:
    """The linear layers and ReLUs of a `nn.Sequential`; dropout does nothing once trained."""
    assert isinstance(network, nn.Sequential), type(network)
    for number, layer in enumerate(network):
        if isinstance(layer, nn.Linear):
            units = linear(graph, f"{name}_{number}", layer, units)
        elif isinstance(layer, nn.ReLU):
            units = graph.node("Relu", [units], f"{name}_{number}")
    return units


def squeezed(graph: Graph, column: str, name: str) -> str:
    """A tensor of shape (batch, 1) as (batch,)."""
    return graph.node("Squeeze", [column, graph.axis(1)], name)


def side_by_side(graph: Graph, columns: list[str], name: str) -> str:
    """Tensors of shape (batch,) as the columns of one, shape (batch, n): three nodes, however many columns there are."""
    if len(columns) == 1:
        return graph.node("Unsqueeze", [columns[0], graph.axis(1)], name)
    chained = graph.node("Concat", columns, f"{name}_chained", axis=0)
    shape = graph.constant(f"{name}_shape", np.array([len(columns), -1], np.int64))
    rows = graph.node("Reshape", [chained, shape], f"{name}_as_rows")
    return graph.node("Transpose", [rows], name, perm=[1, 0])


def axes_1_2(graph: Graph) -> str:
    """The axes 1 and 2, for reductions."""
    return graph.constant("/axes_1_2", np.array([1, 2], np.int64))
