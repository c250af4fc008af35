"""The evaluate stage of CTR: AUC, log loss and calibration on the test rows, and every byte of the model counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.metrics.ctr import CtrTotals, auc, group_auc
from graphhash.models.ctr import CtrModel
from graphhash.models.ctr_bytes import layer_bytes, store_rounded, stored_bytes
from graphhash.nn.compressed import CompressedEmbedding
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import full_bytes, precisions_of
from pipeline.ctr.data import Features, Part, batch_of
from pipeline.ctr.defaults import MEASURES, precision_of
from pipeline.ctr.settings import spec_of
from pipeline.ctr.weights import load_ctr
from pipeline.maps.derived import trained_facts

# Rows whose logits are computed at a time.
BLOCK = 1 << 14
# Deviation of the logits below which predictions count as constant; that of models which rank better than chance is above 0.1.
CONSTANT_STD = 0.01


def evaluate_ctr(config: RunConfig, method: str, ingest_dir: Path, method_dir: Path) -> dict[str, Any]:
    """Test a trained method.

    Tables are rounded to the precision of the export first, so that the figures belong to what is shipped.

    Returns: the measures of :func:`measure` (None where there is no test), ``log_loss_float32`` (of the tables
        as they were trained), ``unmeasured`` (why a measure is None), ``warnings``, ``n_test_rows``, ``curve``, ``rows`` of all tables,
        ``bytes``, ``bytes_full``, ``bytes_ratio``, ``bytes_of`` (``columns``, by name what each part of it takes, and ``layers``),
        ``compressed_columns`` (names), ``precision``, ``item_bias``, and what :func:`pipeline.maps.derived.trained_facts` tells of the
        training.
    """
    trained = load_ctr(method_dir, ingest_dir)
    model, maps, features = trained.model, trained.maps, trained.features
    precisions = precisions_of(config, method, maps, model.spec.embeddings)
    test = features.part("test")
    exact = predict(model, test) if len(test) and set(precisions) != {"float32"} else None
    try:
        store_rounded(model, precisions)
    except ValueError as error:
        raise DataError(
            f"method {method!r}: a table holds {error}; train with a lower learning rate, or use float32"
        ) from error
    metrics: dict[str, Any] = dict.fromkeys(("auc", "log_loss", "calibration", "ece", "group_auc"))
    metrics |= {"n_test_rows": len(test), "warnings": []}
    watched = test if len(test) else features.part("validation")
    if len(watched):
        logits = predict(model, watched)
        metrics["warnings"] = constant_warnings(logits)
    if len(test):
        metrics |= measure(test, logits) | {"curve": curve(test, logits)}
        metrics["log_loss_float32"] = metrics["log_loss"] if exact is None else measure(test, exact)["log_loss"]
    metrics["unmeasured"] = _unmeasured(metrics, features)
    columns = stored_bytes(model, maps, precisions)
    names = [column.name for column in features.all_columns]
    layers = layer_bytes(model)
    total = sum(column.total for column in columns) + layers
    full = full_bytes(spec_of(config, "full"), features)
    others = dict(model.spec.embeddings)
    compressed = [
        name for number, (name, m) in enumerate(zip(names, maps, strict=True)) if not m.identity or number in others
    ]
    return metrics | {
        "rows": table_rows(model),
        "bytes": total,
        "bytes_full": full,
        "bytes_ratio": total / full,
        "bytes_of": {
            "columns": {name: dataclasses.asdict(column) for name, column in zip(names, columns, strict=True)},
            "layers": layers,
        },
        "compressed_columns": compressed,
        "precision": precision_of(config, method),
        "item_bias": model.bias is not None,
        **trained_facts(method_dir),
    }


def table_rows(model: CtrModel) -> int:
    """Rows of all tables of vectors, each table once; of what is no table, ids."""
    layers = [layer for layer in (*model.fields.own, model.fields.joint) if isinstance(layer, CompressedEmbedding)]
    tables = [part for layer in layers for part in layer.bucket_parts()]
    others = sum(layer.n_ids + 1 for layer in layers if not layer.bucket_parts())
    return sum({id(layer.table): layer.table.shape[0] for layer in tables}.values()) + others


@torch.no_grad()
def predict(model: CtrModel, part: Part) -> NDArray[np.float32]:
    """Logits of all rows of a part, shape (n,), in blocks; the model is on any device and in evaluation mode."""
    device = next(model.parameters()).device
    logits = np.empty(len(part), np.float32)
    for start in range(0, len(part), BLOCK):
        tensors = [tensor.to(device) for tensor in part.tensors(start, start + BLOCK)]
        logits[start : start + BLOCK] = model(batch_of(tensors, len(part.multi_valued))).cpu().numpy()
    return logits


def measure(part: Part, logits: NDArray[np.float32]) -> dict[str, float | None]:
    """``auc``, ``log_loss`` (nats), ``calibration`` (mean prediction over mean label), ``ece`` (expected calibration error) and
    ``group_auc``, None where there are no groups, or none of both classes."""
    labels = np.asarray(part.labels)
    totals = _totals(labels, logits)
    of_groups = None
    if part.groups is not None and _has_both(labels, part.groups):
        of_groups = group_auc(labels, logits, np.asarray(part.groups))
    return {
        "auc": auc(labels, logits),
        "log_loss": totals.log_loss,
        "calibration": totals.calibration,
        "ece": totals.calibration_error,
        "group_auc": of_groups,
    }


def constant_warnings(logits: NDArray[np.float32]) -> list[str]:
    """A warning where the predictions of a method hardly differ, else none.

    Args:
        logits: shape (n,).
    """
    if logits.std() >= CONSTANT_STD:
        return []
    low, high = (1.0 / (1.0 + np.exp(-float(bound))) for bound in (logits.min(), logits.max()))
    return [
        f"predicts nearly a constant, {low:.4f} to {high:.4f} for all samples: the features tell it nothing, or it is held down; "
        "try a lower --weight-decay, or more epochs"
    ]


def _unmeasured(metrics: dict[str, Any], features: Features) -> dict[str, str]:
    """Why a measure is None, by key."""
    keys = [measure.key for measure in MEASURES if metrics[measure.key] is None]
    if not metrics["n_test_rows"]:
        return dict.fromkeys(keys, "there are no test samples")
    grouped = "no group of the test has both labels" if features.schema.group else "the schema names no group"
    return dict.fromkeys(keys, grouped)


def curve(part: Part, logits: NDArray[np.float32]) -> dict[str, list[float]]:
    """The reliability curve: ``predicted``, ``positive`` (means) and ``counts`` of every bin of predictions that has rows."""
    predicted, positive, counts = _totals(np.asarray(part.labels), logits).curve()
    return {"predicted": predicted.tolist(), "positive": positive.tolist(), "counts": counts.tolist()}


def _totals(labels: NDArray[np.uint8], logits: NDArray[np.float32]) -> CtrTotals:
    totals = CtrTotals()
    totals.add(labels, logits)
    return totals


def _has_both(labels: NDArray[np.uint8], groups: NDArray[np.int64]) -> bool:
    """Whether a group has both a positive and a negative sample."""
    n_groups = int(groups.max()) + 1
    positives = np.bincount(groups, labels, n_groups)
    return bool(((positives > 0) & (positives < np.bincount(groups, minlength=n_groups))).any())
