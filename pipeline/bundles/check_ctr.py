"""What `graphhash check` verifies of a click-through model's bundle beyond what it verifies of all; see `pipeline.bundles.check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from pipeline.export.nodes import stored_ids
from serving.bundle import BundleError
from serving.scorer import Scorer


def what_it_is(manifest: Mapping[str, Any]) -> str:
    """One line about the model."""
    compressed = [column["name"] for column in manifest["columns"] if column.get("map", "full") != "full"]
    loss = manifest["precision_loss"].get("relative")
    text = f"{manifest['model']}, dim {manifest['dim']}, method {manifest['method']}, "
    text += f"compressed {', '.join(compressed) or 'nothing'}, in {manifest['precision']}"
    if loss is not None:
        text += f" (log loss {100 * loss:+.2f} % by it)"
    return f"{text}; about {manifest['runtime']['stored_bytes']:,} bytes in memory"


def check_maps(columns: list[dict[str, Any]], tensors: Mapping[str, np.ndarray]) -> str:
    """Every map within its table. `columns` are those of ids, in order."""
    texts = []
    for number, column in enumerate(columns):
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
            raise BundleError(f"the map of {column['name']!r} has a profile that is not there; export the bundle again")
        indices_per_id = 1 if rows.ndim == 1 else rows.shape[1]
        texts.append(f"{column['name']} reads {indices_per_id} of {column['n_buckets']:,} rows")
    return f"within their tables; {', '.join(texts) or 'every id has its own row'}"


def check_ids(model: onnx.ModelProto, columns: list[dict[str, Any]]) -> dict[str, Any]:
    """A known id of every column that has one, by name; BundleError where the graph knows others than stated."""
    known: dict[str, Any] = {}
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
    return known


def trial_request(scorer: Scorer, known: Mapping[str, Any]) -> str:
    """Ask for a row of known values and one of missing ones, together and alone, and see that the answers hold together."""
    log: dict[str, list[Any]] = {}
    for column in scorer.manifest["columns"]:
        name = column["name"]
        value = column["mean"] if column["role"] == "dense" else known.get(name)
        log[name] = [[value] if column["role"] == "bag" and value is not None else value, None]
    got = scorer.details(log)
    allowed = scorer.manifest["tolerance"]["absolute"]
    alone = np.concatenate(
        [scorer.details({name: [values[i]] for name, values in log.items()}).logits for i in range(2)]
    )
    expected = 1 / (1 + np.exp(-got.logits.astype(np.float64)))
    problem = None
    if not np.abs(alone - got.logits).max() <= allowed:
        problem = f"logits {alone.tolist()} alone and {got.logits.tolist()} together"
    elif not np.abs(expected - got.probabilities).max() <= allowed:
        problem = f"probabilities {got.probabilities.tolist()} of logits {got.logits.tolist()}"
    elif unknown := [name for name, flags in got.known.items() if name in known and not flags[0]]:
        problem = f"known ids of {', '.join(unknown)} that count as unknown"
    if problem is not None:
        raise BundleError(f"a row of known values and one of missing ones get {problem}; export the bundle again")
    return f"a row of known values gets {got.probabilities[0]:.4f}, one of missing ones {got.probabilities[1]:.4f}; alone they get the same"
