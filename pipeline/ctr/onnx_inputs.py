"""The inputs of a CTR model's graph: one tensor per column, from raw values to the entries of bucket maps, and to dense numbers.

A missing id is the empty text, or of int64 the least number that is no id (`missing_id`); the same one pads multi-valued columns. Numbers
come in as float64, because the difference of a large one from its mean, such as a Unix time's, is lost in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphhash.graph.vocabulary import Vocabulary
from pipeline.ctr.data import Column
from pipeline.ctr.schema import TIME_PARTS
from pipeline.ctr.weights import TrainedCtr
from pipeline.export.graph import ONNX_TYPES, Graph
from pipeline.export.ids import encode_ids
from pipeline.export.layers import side_by_side
from serving.ctr_manifest import ColumnSpec, TimePart
from serving.values import is_other_numeral

OUTPUTS = ("probability", "logit", "known")
# Names inside the graph begin with these; a column that is called so gets another input.
_INSIDE = ("/", "axis_", "n_/")


@dataclass(frozen=True)
class Inputs:
    """The graph's inputs, and the tensors that are made of them.

    Attributes:
        values: the inputs, in the order of the columns.
        entries: by the number of the column, int64, in the shape of its input: entries of its bucket map.
        table: entries of the categorical columns in order, int64, shape (batch, n_categorical); None without any.
        weights: by the number of a multi-valued column, float32, shape (batch, 1, n): of its values.
        numbers: dense columns as the model takes them, float32, shape (batch, n_dense); None without any.
    """

    values: list[onnx.ValueInfoProto]
    entries: dict[int, str]
    table: str | None
    weights: dict[int, str]
    numbers: str | None

    def of_columns(self, graph: Graph, name: str, columns: list[int]) -> str:
        """Entries of some categorical columns side by side, int64, shape (batch, n): a column of ``table`` each."""
        assert self.table is not None
        if columns == [number for number in self.entries if number not in self.weights]:
            return self.table
        chosen = graph.constant(f"{name}_columns", np.array(columns, np.int64))
        return graph.node("Gather", [self.table, chosen], name, axis=1)


def add_inputs(graph: Graph, trained: TrainedCtr) -> Inputs:
    """The inputs of all columns, and the nodes behind them."""
    features, names = trained.features, input_names(trained)
    values: list[onnx.ValueInfoProto] = []
    entries: dict[int, str] = {}
    weights: dict[int, str] = {}
    for number, (column, vocabulary) in enumerate(zip(features.all_columns, trained.vocabularies, strict=True)):
        raw, missing = names[column.name], repr(missing_id(column, vocabulary))
        axes, meaning = ["batch"], f"raw ids; {missing} is a missing one, out-of-vocabulary ones read the OOV row"
        entries[number] = _entries(graph, number, column, vocabulary, raw)
        if column.width is not None:
            axes, meaning = ["batch", f"n_{number}"], f"raw ids of every row; {missing} is none, and pads rows"
            weights[number] = _value_weights(graph, number, column, vocabulary, raw)
        values.append(helper.make_tensor_value_info(raw, ONNX_TYPES[column.kind], axes, meaning))
    for dense in features.dense:
        meaning = "a number; NaN is a missing one"
        values.append(helper.make_tensor_value_info(names[dense.name], TensorProto.DOUBLE, ["batch"], meaning))
    categorical = [entries[number] for number in range(len(features.columns))]
    table = side_by_side(graph, categorical, "/entries") if categorical else None
    return Inputs(values, entries, table, weights, _dense(graph, trained, names))


def input_names(trained: TrainedCtr) -> dict[str, str]:
    """The graph's input for every column, by the column's name: the name itself, where nothing else in the graph is called so."""
    features = trained.features
    names = [column.name for column in features.all_columns] + [column.name for column in features.dense]
    found: dict[str, str] = {}
    for name in names:
        given = name
        while (
            given in OUTPUTS
            or given.startswith(_INSIDE)
            or not given
            or (given != name and given in (*names, *found.values()))
        ):
            given = f"column_{given}"
        found[name] = given
    return found


def missing_id(column: Column, vocabulary: Vocabulary) -> int | str:
    """The raw id that stands for a missing value: no id of the column is this."""
    if column.kind == "string":
        return ""
    first = -(2**63)
    near = (
        set(vocabulary.ids.to_numpy()[vocabulary.ids.to_numpy() < first + len(vocabulary) + 1].tolist())
        if len(vocabulary)
        else set()
    )
    return next(number for number in range(first, first + len(near) + 1) if number not in near)


def describe_columns(trained: TrainedCtr, precisions: Sequence[str]) -> list[ColumnSpec]:
    """Every column for the manifest, in the order of the graph's inputs."""
    features, names = trained.features, input_names(trained)
    times: dict[str, TimePart] = {
        f"{name}_{part}": {"column": name, "format": form, "part": part}
        for name, form in features.schema.times
        for part in TIME_PARTS
    }
    buckets = {f"{name}_bucket": name for name in features.schema.buckets}
    separators = {column.name: column.separator for column in features.schema.multi_valued}
    others = {features.all_columns[number].name: spec.kind for number, spec in trained.model.spec.embeddings}
    columns: list[ColumnSpec] = []
    for column, vocabulary, bucket_map, precision in zip(
        features.all_columns, trained.vocabularies, trained.maps, precisions, strict=True
    ):
        described: ColumnSpec = {
            "name": column.name,
            "input": names[column.name],
            "role": "categorical" if column.width is None else "multi_valued",
            "dtype": "string" if column.kind == "string" else "int64",
            "n_ids": column.n_ids,
            "missing": missing_id(column, vocabulary),
            "map": bucket_map.method,
            "n_buckets": bucket_map.n_buckets,
            "indices_per_id": bucket_map.indices_per_id,
            "precision": precision,
        }
        if column.name in others:
            described["embedding"] = others[column.name]
        if column.kind == "string" and any(map(is_other_numeral, vocabulary.ids.to_pylist())):
            described["text_only"] = True
        if column.width is not None:
            described["width"], described["separator"] = column.width, separators[column.name]
        if column.name in buckets:
            described["bucket"] = buckets[column.name]
        if column.name in times:
            described["time"] = times[column.name]
        columns.append(described)
    for dense in features.dense:
        columns.append(
            {
                "name": dense.name,
                "input": names[dense.name],
                "role": "dense",
                "dtype": "float64",
                "mean": dense.mean,
                "std": dense.std,
            }
        )
    return columns


def _missing(graph: Graph, number: int, column: Column, vocabulary: Vocabulary) -> str:
    value, name = missing_id(column, vocabulary), f"/{number}_missing"
    if isinstance(value, int):
        return graph.constant(name, np.int64(value))
    # ONNX's signature leaves out bytes, of which strings are made.
    graph.initializers.append(helper.make_tensor(name, TensorProto.STRING, [], [value.encode()]))  # type: ignore[list-item]  # Stub.
    return name


def _entries(graph: Graph, number: int, column: Column, vocabulary: Vocabulary, raw: str) -> str:
    """Entries of raw ids, int64, of their shape: known ids, then missing where the column has it, and OOV ones last."""
    name, n_known = f"/{number}", len(vocabulary)
    if n_known and not column.has_missing:
        return encode_ids(graph, name, vocabulary, raw)
    is_missing = graph.node("Equal", [raw, _missing(graph, number, column, vocabulary)], f"{name}_is_missing")
    if not n_known:
        first, second = graph.constant("/zero", np.int64(0)), graph.constant("/one", np.int64(1))
        return graph.node("Where", [is_missing, first, second], name)
    # An id that is not known is missing, or else OOV, the entry behind it.
    rows = encode_ids(graph, name, vocabulary, raw)
    is_new = graph.node(
        "GreaterOrEqual", [rows, graph.constant(f"{name}_n_known", np.int64(n_known))], f"{name}_is_new"
    )
    is_oov = graph.node("And", [is_new, graph.node("Not", [is_missing], f"{name}_is_there")], f"{name}_is_oov")
    return graph.node("Add", [rows, graph.cast(is_oov, f"{name}_step", TensorProto.INT64)], f"{name}_entry")


def _value_weights(graph: Graph, number: int, column: Column, vocabulary: Vocabulary, raw: str) -> str:
    """Weights of the values of a multi-valued column, float32, shape (batch, 1, n): their mean, over the first `width` that are there."""
    assert column.width is not None, column
    name, missing = f"/{number}", _missing(graph, number, column, vocabulary)
    there = graph.node("Not", [graph.node("Equal", [raw, missing], f"{name}_is_padding")], f"{name}_there")
    place = graph.node(
        "CumSum", [graph.cast(there, f"{name}_counted", TensorProto.INT64), graph.axis(1)], f"{name}_place"
    )
    early = graph.node("LessOrEqual", [place, graph.constant(f"{name}_width", np.int64(column.width))], f"{name}_early")
    kept = graph.cast(graph.node("And", [there, early], f"{name}_kept"), f"{name}_share", TensorProto.FLOAT)
    total = graph.node("ReduceSum", [kept, graph.axis(1)], f"{name}_total", keepdims=1)
    least = graph.node("Max", [total, graph.constant("/one_number", np.float32(1))], f"{name}_divisor")
    return graph.node("Unsqueeze", [graph.node("Div", [kept, least], f"{name}_shares"), graph.axis(1)], f"{name}_mean")


def _dense(graph: Graph, trained: TrainedCtr, names: dict[str, str]) -> str | None:
    """Dense columns as the model takes them, float32, shape (batch, n_dense)."""
    columns = trained.features.dense
    if not columns:
        return None
    numbers = side_by_side(graph, [names[column.name] for column in columns], "/numbers")
    means, stds = (np.array([getattr(column, key) for column in columns], np.float64) for key in ("mean", "std"))
    centred = graph.node("Sub", [numbers, graph.constant("/means", means)], "/centred")
    scaled = graph.cast(
        graph.node("Div", [centred, graph.constant("/stds", stds)], "/standardised"), "/dense_given", TensorProto.FLOAT
    )
    gone = graph.node("IsNaN", [scaled], "/dense_missing")
    return graph.node("Where", [gone, graph.constant("/zero_number", np.float32(0)), scaled], "/dense")
