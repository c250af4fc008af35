"""What `graphhash check` verifies of a CTR model's bundle beyond what it verifies of all; see `pipeline.bundles.check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from pipeline.export.ids import stored_ids
from serving.ctr_manifest import ColumnSpec
from serving.errors import BundleError
from serving.scorer import Scorer


def describe(manifest: Mapping[str, Any]) -> str:
    """One line about the model."""
    compressed = [
        column["name"] for column in manifest["columns"] if column.get("map", "full") != "full" or "embedding" in column
    ]
    loss = manifest["precision_loss"].get("relative")
    text = f"{manifest['model']}, dim {manifest['dim']}, method {manifest['method']}, "
    text += f"compressed {', '.join(compressed) or 'nothing'}, in {manifest['precision']}"
    if loss is not None:
        text += f" (log loss {100 * loss:+.2f} % by it)"
    return f"{text}; about {manifest['runtime']['stored_bytes']:,} bytes in memory"


def check_maps(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """See that every column's bucket map stays within its table."""
    texts = []
    for number, column in enumerate(_columns_of_ids(manifest)):
        rows, table = tensors.get(f"/{number}_rows"), tensors.get(f"/{number}_table")
        if table is not None and len(table) != column["n_buckets"]:
            raise BundleError(
                f"column {column['name']!r} has a table of {len(table)} rows, stated are {column['n_buckets']}; export the bundle again"
            )
        if rows is None:
            continue
        low, high = int(rows.min()), int(rows.max())
        n_codes = len(tensors.get(f"/{number}_codebook", ()))
        if low < 0 or high >= column["n_buckets"] or len(rows) != column["n_ids"] + 1:
            raise BundleError(
                f"the map of {column['name']!r} has {len(rows)} entries that span {low}..{high}, of {column['n_ids'] + 1} and "
                f"{column['n_buckets']} rows; export the bundle again"
            )
        if n_codes and int(tensors[f"/{number}_codes"].max()) >= n_codes:
            raise BundleError(
                f"the map of {column['name']!r} has a code that is not in its codebook; export the bundle again"
            )
        indices_per_id = 1 if rows.ndim == 1 else rows.shape[1]
        texts.append(f"{column['name']} reads {indices_per_id} of {column['n_buckets']:,} rows")
    return f"within their tables; {', '.join(texts) or 'every id has its own row'}"


def check_ids(manifest: Mapping[str, Any], model: onnx.ModelProto) -> tuple[str, dict[str, Any]]:
    """See that the graph has as many ids of every column as stated, each once. Returns a text, and a known raw id by column."""
    known: dict[str, Any] = {}
    columns = _columns_of_ids(manifest)
    for number, column in enumerate(columns):
        try:
            ids = stored_ids(model, f"/{number}")
        except BundleError:
            if column["n_ids"] > 1:
                raise
            continue  # A missing value is the only one that is known.
        # A missing one may be known as well.
        n_different = len(set(ids.tolist()))
        if n_different != len(ids) or column["n_ids"] - len(ids) not in (0, 1):
            raise BundleError(
                f"the graph knows {n_different} values of {column['name']!r}, stated are {column['n_ids']}; export the bundle again"
            )
        known[column["name"]] = ids[0].item() if isinstance(ids[0], np.generic) else ids[0]
    text = ", ".join(f"{column['n_ids']:,} of {column['name']}" for column in columns)
    return f"{text}, each once", known


def trial_request(loaded: Scorer, known: Mapping[str, Any]) -> str:
    """Ask for a row of known values and one of missing ones, together and alone, and see that the answers agree."""
    log: dict[str, list[Any]] = {}
    for column in loaded.manifest["columns"]:
        name = column["name"]
        value = column["mean"] if column["role"] == "dense" else known.get(name)
        log[name] = [[value] if column["role"] == "multi_valued" and value is not None else value, None]
    got = loaded.details(log)
    allowed = loaded.manifest["tolerance"]["absolute"]
    alone = np.concatenate(
        [loaded.details({name: [values[i]] for name, values in log.items()}).logits for i in range(2)]
    )
    expected = 1 / (1 + np.exp(-got.logits.astype(np.float64)))
    problem = None
    if not np.abs(alone - got.logits).max() <= allowed:
        problem = f"logits {alone.tolist()} alone and {got.logits.tolist()} together"
    elif not np.abs(expected - got.probabilities).max() <= allowed:
        problem = f"probabilities {got.probabilities.tolist()} of logits {got.logits.tolist()}"
    elif oov := [name for name, flags in got.known.items() if name in known and not flags[0]]:
        problem = f"known ids of {', '.join(oov)} that count as out-of-vocabulary"
    if problem is not None:
        raise BundleError(f"a row of known values and one of missing ones get {problem}; export the bundle again")
    return f"a row of known values gets {got.probabilities[0]:.4f}, one of missing ones {got.probabilities[1]:.4f}; alone they get the same"


def _columns_of_ids(manifest: Mapping[str, Any]) -> list[ColumnSpec]:
    """Categorical and multi-valued columns, whose number in this list names their tensors in the graph."""
    return [column for column in manifest["columns"] if column["role"] != "dense"]
