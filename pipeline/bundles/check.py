"""Everything that can be verified of a bundle, said in words: what `graphhash check` prints.

    for finding in check(Path("out/bundle")): print(finding.what, finding.text)

`serving.check_bundle` refuses a bundle that is not whole; this goes on to what its graph holds and how it answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.bundles import check_ctr as ctr_bundle_check
from pipeline.export.nodes import stored_ids
from serving.bundle import MODEL, BundleError, check_bundle
from serving.external_data import external_locations
from serving.node_placement import nodes_by_provider
from serving.retriever import Retriever
from serving.scorer import Scorer


@dataclass(frozen=True)
class Finding:
    """One thing that was verified, and what it showed."""

    what: str
    text: str


def check(bundle: Path, provider: str = "auto") -> Iterator[Finding]:
    """Verify a bundle, step by step; what is yielded has passed.

    Args:
        bundle: the folder.
        provider: "auto", "cpu" or "cuda", for the trial request.

    Raises:
        BundleError: at the first thing that is wrong.
    """
    manifest = check_bundle(bundle)
    yield Finding("manifest", f"format {manifest['format_version']}, written {manifest['created_at']}, hash as stated")
    for name, entry in manifest["files"].items():
        yield Finding("file", f"{name}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}... as stated")
    outside = sorted(external_locations(bundle / MODEL))
    yield Finding("external data", f"read from {', '.join(outside)}" if outside else "none, the model is one file")
    is_ctr = manifest["task"] == "ctr"
    yield Finding("model", ctr_bundle_check.what_it_is(manifest) if is_ctr else _what_it_is(manifest))
    model = _load(bundle)
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    yield Finding("graph", f"well-formed, {len(model.graph.node)} nodes, opsets {opsets}")
    for side in ("inputs", "optional_inputs", "outputs"):
        if side == "optional_inputs" and is_ctr:
            continue
        values = (f"{name} {spec['dtype']}{_shape(spec['shape'])}" for name, spec in manifest.get(side, {}).items())
        yield Finding(side.replace("_", " "), ", ".join(values) or "none")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims)}
    yield Finding("tables", _check_tables(tensors))
    loaded: Retriever | Scorer
    if is_ctr:
        columns = [column for column in manifest["columns"] if column["role"] != "dense"]
        yield Finding("maps", ctr_bundle_check.check_maps(columns, tensors))
        known = ctr_bundle_check.check_ids(model, columns)
        yield Finding(
            "ids", ", ".join(f"{column['n_ids']:,} of {column['name']}" for column in columns) + ", each once"
        )
        loaded = Scorer(bundle, provider=provider)
        yield Finding("trial request", ctr_bundle_check.trial_request(loaded, known))
    else:
        yield Finding("maps", _check_maps(tensors))
        users = _check_ids(model, manifest)
        yield Finding("ids", f"{manifest['n_users']:,} users and {manifest['n_items']:,} items, each once")
        loaded = Retriever(bundle, provider=provider)
        yield Finding("trial request", _try(loaded, users[0]))
    counts = nodes_by_provider(bundle, provider)
    total = sum(counts.values())
    shares = (f"{name} {100 * count / total:.0f} % of {total} kernels" for name, count in sorted(counts.items()))
    yield Finding("provider", f"{loaded.provider} in use: {', '.join(shares)}")


def _what_it_is(manifest: dict[str, Any]) -> str:
    runtime, loss = manifest.get("runtime", {}), manifest.get("precision_loss", {}).get("relative")
    text = (
        f"{manifest.get('model', 'mf')}, dim {manifest['dim']}, method {manifest['method']['users']}, "
        f"{manifest['n_buckets']['users']:,} and {manifest['n_buckets']['items']:,} buckets, tables in {manifest['precision']}"
    )
    if loss is not None:
        text += f" ({100 * loss:+.2f} % of recall@20 lost by it)"
    if runtime:
        text += f"; {runtime['mode']}, about {runtime['resident_bytes']:,} bytes in memory: {runtime['cost']}"
    return text


def _load(bundle: Path) -> onnx.ModelProto:
    try:
        onnx.checker.check_model(str(bundle / MODEL), full_check=True)
        return onnx.load(str(bundle / MODEL))
    except Exception as error:  # onnx raises what protobuf, its checker and its shape inference happen to raise.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"{bundle / MODEL}: not a valid ONNX model ({reason[:200]}); export the bundle again"
        ) from error


def _shape(axes: list[str]) -> str:
    return f"[{', '.join(axes)}]" if axes else ""


def _check_tables(tensors: dict[str, np.ndarray]) -> str:
    texts = []
    for name, values in tensors.items():
        if values.dtype.kind == "f" and name != "minus_infinity" and not np.isfinite(values).all():
            raise BundleError(f"tensor {name!r} holds {values[~np.isfinite(values)].flat[0]}; train and export again")
        if name.endswith("_table"):
            texts.append(f"{name} {values.shape[0]:,} x {values.shape[1]} {values.dtype}")
    return f"finite; {', '.join(texts)}"


def _check_maps(tensors: dict[str, np.ndarray]) -> str:
    texts = []
    for side in ("user", "item"):
        if f"{side}_rows" not in tensors:
            texts.append(f"{side}s read their own rows")
            continue
        table = tensors.get(f"{side}_table", tensors.get("shared_table"))
        _check_range(f"{side}_rows", tensors[f"{side}_rows"], len(table))
        if f"{side}_codes" in tensors:
            _check_range(f"{side}_codes", tensors[f"{side}_codes"], len(tensors[f"{side}_codebook"]))
        indices_per_id = 1 if tensors[f"{side}_rows"].ndim == 1 else tensors[f"{side}_rows"].shape[1]
        texts.append(f"{side}s read {indices_per_id} of {len(table):,} rows, {tensors[f'{side}_rows'].dtype}")
    return f"within their tables; {', '.join(texts)}"


def _check_range(name: str, rows: np.ndarray, n: int) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= n:
        raise BundleError(f"{name} spans {low}..{high}, there are {n} rows; export the bundle again")


def _check_ids(model: onnx.ModelProto, manifest: dict[str, Any]) -> np.ndarray:
    users = stored_ids(model, "user")
    # Format 1 had an encoder for excluded items alone.
    items = stored_ids(model, "item" if manifest["format_version"] > 1 else "excluded_items")
    for side, ids in (("users", users), ("items", items)):
        if len(ids) != manifest[f"n_{side}"] or len(set(ids.tolist())) != len(ids):
            raise BundleError(
                f"the graph knows {len(set(ids.tolist()))} {side}, the manifest states {manifest[f'n_{side}']}; export again"
            )
    return users


def _try(retriever: Retriever, user: Any) -> str:
    """Ask for everything for a known user, and see that the answer holds together."""
    user = user.item() if isinstance(user, np.generic) else user
    n_items, tolerance = retriever.n_items, retriever.manifest["tolerance"]
    got = retriever.recommend([user], n_items)
    items, scores = got.item_ids[0], got.scores[0]
    allowed = tolerance["absolute"] + tolerance["relative"] * float(np.abs(scores).max())
    problem = None
    if not got.known[0] or len(set(items.tolist())) != n_items:
        problem = f"{len(set(items.tolist()))} of {n_items} items, known {bool(got.known[0])}"
    elif not np.isfinite(scores).all() or (np.diff(scores) > 0).any():
        problem = "scores that are not finite and descending"
    elif retriever.recommend([user], 3, [items[:1]]).item_ids[0].tolist() != items[1:4].tolist():
        problem = "other items when the best one is excluded"
    elif "candidate_score" in retriever.manifest["outputs"]:
        worst = float(np.abs(retriever.score([user], items[None]).scores[0] - scores).max())
        problem = (
            None if worst <= 2 * allowed else f"candidate scores that are off by {worst:.3g}, allowed are {allowed:.3g}"
        )
    if problem is not None:
        raise BundleError(f"user {user!r} gets {problem}; export the bundle again")
    return f"user {user!r} gets {n_items:,} items, the best {items[0]!s:.40} at {scores[0]:.4f}; excluding and scoring agree with it"
