"""What `graphhash check` verifies of a retrieval model's bundle beyond what it verifies of all; see `pipeline.bundles.check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from pipeline.export.ids import stored_ids
from serving.errors import BundleError
from serving.retriever import Retriever


def describe(manifest: Mapping[str, Any]) -> str:
    """One line about the model."""
    from pipeline.maps.methods import METHODS

    runtime, loss = manifest["runtime"], manifest["precision_loss"].get("relative")
    method = manifest["provenance"].get("method") or manifest["method"]["users"]
    text = f"{manifest['model']}, dim {manifest['dim']}, method {method}, "
    if method in METHODS and METHODS[method].stores_codes:
        text += f"codes of the vectors of {manifest['n_users']:,} users and {manifest['n_items']:,} items"
        loss = None  # The codes are what was measured.
    else:
        buckets = manifest["n_buckets"]
        text += f"{buckets['users']:,} and {buckets['items']:,} buckets, tables in {manifest['precision']}"
    if loss is not None:
        measure = next(key for key in manifest["precision_loss"] if key.startswith("recall@"))
        text += f" ({100 * loss:+.2f} % of {measure} lost by it)"
    return f"{text}; {runtime['mode']}, about {runtime['resident_bytes']:,} bytes in memory: {runtime['cost']}"


def check_maps(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """See that both bucket maps stay within their tables."""
    texts = []
    for side in ("user", "item"):
        rows = tensors.get(f"{side}_rows")
        if rows is None:
            texts.append(f"{side}s read their own rows")
            continue
        table = tensors[f"{side}_table" if f"{side}_table" in tensors else "shared_table"]
        _check_range(f"{side}_rows", rows, len(table))
        if f"{side}_codes" in tensors:
            _check_range(f"{side}_codes", tensors[f"{side}_codes"], len(tensors[f"{side}_codebook"]))
        indices_per_id = 1 if rows.ndim == 1 else rows.shape[1]
        texts.append(f"{side}s read {indices_per_id} of {len(table):,} rows, {rows.dtype}")
    return f"within their tables; {', '.join(texts)}"


def check_ids(manifest: Mapping[str, Any], model: onnx.ModelProto) -> tuple[str, Any]:
    """See that the graph has as many users and items as stated, each once. Returns a text, and a known raw user id."""
    users = stored_ids(model, "user")
    for side, ids in (("users", users), ("items", stored_ids(model, "item"))):
        n_different = len(set(ids.tolist()))
        if len(ids) != manifest[f"n_{side}"] or n_different != len(ids):
            raise BundleError(
                f"the graph knows {n_different} {side}, the manifest states {manifest[f'n_{side}']}; export again"
            )
    return f"{manifest['n_users']:,} users and {manifest['n_items']:,} items, each once", users[0]


def trial_request(loaded: Retriever, known: Any) -> str:
    """Ask for all items for a known user, and see that excluding and scoring agree with the answer."""
    user = known.item() if isinstance(known, np.generic) else known
    n_items, tolerance = loaded.n_items, loaded.manifest["tolerance"]
    got = loaded.recommend([user], n_items)
    items, scores = got.item_ids[0], got.scores[0]
    allowed = tolerance["absolute"] + tolerance["relative"] * float(np.abs(scores).max())
    n_different = len(set(items.tolist()))
    problem = None
    if not got.known[0] or n_different != n_items:
        problem = f"{n_different} of {n_items} items, known {bool(got.known[0])}"
    elif not np.isfinite(scores).all() or (np.diff(scores) > 0).any():
        problem = "scores that are not finite and descending"
    elif loaded.recommend([user], 3, [items[:1]]).item_ids[0].tolist() != items[1:4].tolist():
        problem = "other items when the best one is excluded"
    else:
        worst = float(np.abs(loaded.score([user], items[None]).scores[0] - scores).max())
        if not worst <= 2 * allowed:
            problem = f"candidate scores that are off by {worst:.3g}, allowed are {allowed:.3g}"
    if problem is not None:
        raise BundleError(f"user {user!r} gets {problem}; export the bundle again")
    return f"user {user!r} gets {n_items:,} items, the best {items[0]!s:.40} at {scores[0]:.4f}; excluding and scoring agree with it"


def _check_range(name: str, rows: np.ndarray, n: int) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= n:
        raise BundleError(f"{name} spans {low}..{high}, there are {n} rows; export the bundle again")
