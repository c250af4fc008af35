"""Publish a trained CTR model as a bundle: write the graph, compare it with the model on rows of the test, then put it in place.

A failure of any kind leaves the previous bundle as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.models.ctr_bytes import store_rounded
from pipeline.ctr.counts import PARTS
from pipeline.ctr.data import Column, Features, Part
from pipeline.ctr.evaluate import predict
from pipeline.ctr.onnx_graph import ctr_graph
from pipeline.ctr.onnx_inputs import describe_columns
from pipeline.ctr.weights import TrainedCtr
from pipeline.export.graph import describe
from pipeline.export.ids import inside_bytes
from pipeline.export.publish import oov_id, save_graph, staged_bundle
from pipeline.export.requests import answered, onnx_facts
from serving.bundle import write_manifest
from serving.errors import BundleError
from serving.manifest import MANIFEST, METADATA, identity
from serving.scorer import Scorer

# Of logits, beside the model with its tables rounded as they are stored; a probability moves by a quarter of it at most.
ABSOLUTE, RELATIVE = 1e-4, 1e-5
N_CHECK = 4096


@dataclass(frozen=True)
class ExportOptions:
    """How a CTR bundle is made.

    Attributes:
        method, precision: of the run, for the manifest.
        external_data_mib: tensors of more than this together go to a second file.
        n_check: rows compared at most; rows of OOV and missing values are added to them.
        seed: draws the rows to compare on.
    """

    method: str
    precision: str
    external_data_mib: float = 1024
    n_check: int = N_CHECK
    seed: int = 0


def export_ctr(
    trained: TrainedCtr,
    precisions: Sequence[str],
    out: Path,
    options: ExportOptions,
    *,
    part: Part,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write the bundle `out`, whole or not at all; a bundle that was there is replaced at the end.

    Args:
        trained: the model, as it was trained, on the CPU, with the maps, vocabularies and statistics of its run.
        precisions: of every column's table.
        part: rows to compare on: of the test, or of another part.
        metrics, provenance: for the manifest; JSON values.

    Returns: the manifest.

    Raises:
        BundleError: ONNX Runtime and the model disagree, a value does not fit its precision, or `out` is something else than a bundle.
            Nothing is published then.
    """
    with staged_bundle(Path(out).absolute()) as folder:
        graph = ctr_graph(trained, precisions)
        content = _content(trained, precisions, graph, options, metrics) | {"provenance": provenance}
        rows = _rows(trained, part, options.n_check, options.seed)
        expected = _as_stored(trained, precisions, rows)
        # The graph's own metadata do not hold the comparison, which is not made yet.
        onnx.helper.set_model_props(graph, {METADATA: identity(content)})
        inside = sum(inside_bytes(vocabulary, decoded=False) for vocabulary in trained.vocabularies if len(vocabulary))
        tolerance = {"absolute": ABSOLUTE, "relative": RELATIVE, "n_rows": len(rows)}
        save_graph(graph, folder, inside, options.external_data_mib)
        del graph
        write_manifest(folder, content | {"tolerance": tolerance | {"largest": 0.0}, "example": {}})
        scorer = Scorer(folder, provider="cpu")
        largest = _compare(scorer, trained, rows, expected)
        (folder / MANIFEST).unlink()
        found = {"tolerance": tolerance | {"largest": largest}, "example": _example(scorer, trained, rows)}
        return write_manifest(folder, content | found)


def _example(scorer: Scorer, trained: TrainedCtr, rows: Part) -> dict[str, Any]:
    """A request of the first two rows, and its answer."""
    first = Part(rows.labels[:2], rows.categorical[:2], rows.dense[:2], tuple(v[:2] for v in rows.multi_valued), None)
    inputs = scorer.tensors(raw_columns(trained, first))
    outputs = list(scorer.manifest["outputs"])
    return answered(outputs, scorer.run(outputs, inputs), inputs)


def _content(
    trained: TrainedCtr,
    precisions: Sequence[str],
    graph: onnx.ModelProto,
    options: ExportOptions,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """The manifest but for `provenance` and `tolerance`."""
    model = trained.model
    named = list(zip(trained.features.all_columns, trained.maps, trained.vocabularies, strict=True))
    columns = describe_columns(trained, precisions)
    layers = {
        name: getattr(model.spec, name) for name in ("hidden", "dense_hidden", "n_cross", "cross_rank", "structure")
    }
    return {
        "task": "ctr",
        "inputs": describe(graph.graph.input),
        "outputs": describe(graph.graph.output),
        "columns": columns,
        "ids_as_text": {column["name"]: str(column["missing"]) for column in columns if "missing" in column},
        "onnx": onnx_facts(),
        "model": model.spec.kind,
        "layers": {name: list(value) if isinstance(value, tuple) else value for name, value in layers.items()},
        "dim": model.spec.dim,
        "id_bias": model.bias is not None,
        "method": options.method,
        "precision": options.precision,
        "precision_loss": precision_loss(metrics),
        "calibration": {name: metrics.get(name) for name in ("calibration", "ece")},
        "runtime": {"stored_bytes": sum(len(tensor.raw_data) for tensor in graph.graph.initializer)},
        "bucket_map_hashes": {column.name: bucket_map.content_hash for column, bucket_map, _ in named},
        "vocabulary_hashes": {column.name: vocabulary.content_hash for column, _, vocabulary in named},
        "metrics": metrics,
    }


def data_facts(ingest_dir: Path) -> dict[str, Any]:
    """Rows of every part of the log, ``n_train`` and so on, ``label`` and ``label_from`` as in its schema, and ``schema_hash``, of its
    schema, vocabularies and statistics."""
    features = Features.open(ingest_dir)
    label = {"label": features.schema.label, "label_from": features.schema.label_from}
    return {f"n_{name}": len(features.part(name)) for name in PARTS} | label | {"schema_hash": features.content_hash}


def precision_loss(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Log loss as stored and in float32, as the evaluation measured them, and what is lost by the former; None where it did not."""
    stored, exact = metrics.get("log_loss"), metrics.get("log_loss_float32")
    lost = stored / exact - 1 if stored is not None and exact else None
    return {"log_loss": stored, "log_loss_float32": exact, "relative": lost}


def drawn_rows(part: Part, n: int = N_CHECK, seed: int = 0) -> Part:
    """At most ``n`` rows of a part in memory, in order; of that many rows all."""
    chosen: NDArray[np.int64] = np.sort(np.random.default_rng(seed).choice(len(part), min(n, len(part)), replace=False))
    labels, categorical, dense, *multi_valued = (np.array(array[chosen]) for array in part.arrays)
    return Part(labels, categorical, dense, tuple(multi_valued), None)


def _rows(trained: TrainedCtr, part: Part, n_check: int, seed: int) -> Part:
    """Rows of a part, and two more per categorical column: the first of them with an OOV value, and with the last known entry."""
    n_ids = [column.n_ids for column in trained.features.columns]
    arrays = drawn_rows(part, n_check, seed).arrays
    extra = [np.repeat(array[:1], 2 * len(n_ids), axis=0) for array in arrays]
    for number, n in enumerate(n_ids):
        extra[1][2 * number, number], extra[1][2 * number + 1, number] = n, n - 1
    labels, categorical, dense, *multi_valued = (np.concatenate(pair) for pair in zip(arrays, extra, strict=True))
    return Part(labels, categorical, dense, tuple(multi_valued), None)


def _as_stored(trained: TrainedCtr, precisions: Sequence[str], rows: Part) -> NDArray[np.float32]:
    """Logits of the model with its tables rounded as they are stored, shape (n,)."""
    # The maps, which may be larger than all weights, are not copied.
    weights = [(weight, weight.detach().clone()) for weight in trained.model.parameters()]
    try:
        store_rounded(trained.model, precisions)
        return predict(trained.model, rows)
    except ValueError as error:
        raise BundleError(f"a table holds {error}; train with a lower learning rate, or use float32") from error
    finally:
        for weight, exact in weights:
            weight.detach().copy_(exact)


def raw_columns(trained: TrainedCtr, rows: Part) -> dict[str, Any]:
    """Raw values that ingestion would make these rows of, by column; OOV entries as a value that no column has.

    Raises:
        DataError: an entry is out of its column's range.
    """
    features, columns = trained.features, dict[str, Any]()
    for number, column in enumerate(features.columns):
        columns[column.name] = _raw_values(trained, number, column, rows.categorical[:, number])
    for number, column in enumerate(features.multi_valued):
        entries = rows.multi_valued[number]
        values = _raw_values(trained, len(features.columns) + number, column, entries[entries >= 0])
        lists = np.split(values, np.cumsum((entries >= 0).sum(1))[:-1])
        columns[column.name] = [each.tolist() for each in lists]
    for number, dense in enumerate(features.dense):
        # A missing number is 0 here, and so is the mean.
        columns[dense.name] = rows.dense[:, number].astype(np.float64) * dense.std + dense.mean
    return columns


def _raw_values(trained: TrainedCtr, number: int, column: Column, entries: NDArray) -> NDArray:
    """Raw values of entries, None for missing, objects of the shape of ``entries``, (n,).

    Raises:
        DataError: an entry is out of range.
    """
    if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) <= column.n_ids:
        raise DataError(
            f"column {column.name!r} has entries {entries.min()}..{entries.max()}, of 0..{column.n_ids}; run 'graphhash ingest' again"
        )
    vocabulary, raw = trained.vocabularies[number], np.empty(entries.shape, object)
    known = entries < len(vocabulary)
    raw[known] = vocabulary.take(entries[known])
    raw[entries == column.n_ids] = _oov_value(column, vocabulary)
    return raw


def _oov_value(column: Column, vocabulary: Any) -> int | str:
    if len(vocabulary):
        return oov_id(vocabulary)
    return "unknown" if column.kind == "string" else -1


def _compare(scorer: Scorer, trained: TrainedCtr, rows: Part, expected: NDArray[np.float32]) -> float:
    """The largest difference of logits; BundleError if it is more than is allowed, or another value is known than should be."""
    if not np.isfinite(expected).all():
        raise BundleError(
            f"the trained model gives a logit of {expected[~np.isfinite(expected)][0]}; train it again, with a lower learning rate"
        )
    raw = raw_columns(trained, rows)
    got = scorer.details(raw)
    largest = float(np.abs(got.logits - expected).max(initial=0))
    allowed = ABSOLUTE + RELATIVE * float(np.abs(expected).max(initial=0))
    if not largest <= allowed:
        raise BundleError(
            f"logits of ONNX Runtime and the model differ by {largest:.3g}, allowed are {allowed:.3g}; nothing was published, "
            "store it in float32 (export.precision=float32), or report this"
        )
    probabilities = 1 / (1 + np.exp(-expected.astype(np.float64)))
    if not np.abs(got.probabilities - probabilities).max(initial=0) <= allowed:
        raise BundleError(
            "probabilities of ONNX Runtime are not those of the model's logits; nothing was published, report this"
        )
    for number, column in enumerate(trained.features.columns):
        if not np.array_equal(got.known[column.name], rows.categorical[:, number] < column.n_ids):
            raise BundleError(
                f"the exported graph does not tell known values of {column.name!r} from OOV ones; report this with the vocabulary"
            )
    if trained.features.dense:
        name = trained.features.dense[0].name
        first = {key: values[:1] for key, values in raw.items()}
        gone, mean = (
            scorer.details(first | {name: [value]}).logits[0] for value in (None, trained.features.dense[0].mean)
        )
        if gone != mean:
            raise BundleError(
                f"a missing number of {name!r} does not read as its mean; nothing was published, report this"
            )
    return largest
