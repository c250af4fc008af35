"""Stored arrays read in chunks by ONNX `Scan` nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeline.export.graph import Graph


class Chunk:
    """Where a chunk of a `Scan` over stored arrays lies; called, it cuts its part out of one of them."""

    def __init__(self, name: str, start: str, stop: str) -> None:
        self.name, self.start, self.stop = name, start, stop

    def __call__(self, graph: Graph, stored: str) -> str:
        return graph.node("Slice", [stored, self.start, self.stop, graph.axis(0)], f"{stored}_{self.name}")


def scan_chunks(graph: Graph, name: str, n: int, chunk: int, scores: Callable[[Graph, Chunk], str]) -> str:
    """Scores of n entries in chunks of as many: what `scores(body, part)` gives, shape (batch, chunk), as shape (batch, n)."""
    assert n % chunk == 0, (n, chunk)
    starts = graph.constant(f"{name}_starts", np.arange(0, n, chunk, dtype=np.int64)[:, None])
    body = Graph(graph)
    stop = body.node(
        "Add", [f"{name}_start", body.constant(f"{name}_chunk", np.array([chunk], np.int64))], f"{name}_stop"
    )
    output = scores(body, Chunk(name, f"{name}_start", stop))
    scan = body.body(
        f"{name}_chunks",
        [helper.make_tensor_value_info(f"{name}_start", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None])],
    )
    # (batch, n_chunks, chunk)
    stack = graph.node("Scan", [starts], f"{name}_stack", body=scan, num_scan_inputs=1, scan_output_axes=[1])
    flat = graph.constant(f"{name}_flat", np.array([0, n], np.int64))
    return graph.node("Reshape", [stack, flat], f"{name}_scores_of_all")


def split_evenly(n: int, n_parts: int) -> NDArray[np.int64]:
    """Bounds of nearly equal parts of n things."""
    return np.arange(n_parts + 1) * n // n_parts


def padded(array: NDArray, n: int) -> NDArray:
    """`array` with zeros behind it, n rows in all."""
    return np.concatenate([array, np.zeros((n - len(array), *array.shape[1:]), array.dtype)])
