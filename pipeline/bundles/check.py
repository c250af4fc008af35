"""Everything that can be verified of a bundle, said in words: what `graphhash check` prints.

    for finding in check(Path("out/bundle")): print(finding.what, finding.text)

`serving.check_bundle` refuses a bundle that is not whole; this goes on to what its graph holds and how it answers. What differs by task
is in `pipeline.bundles.check_retrieval` and `pipeline.bundles.check_ctr`, which have the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.bundles import check_ctr, check_retrieval
from serving.bundle import check_bundle
from serving.bundle_model import Provider
from serving.errors import BundleError, first_line
from serving.external_data import external_locations
from serving.manifest import MODEL
from serving.node_placement import nodes_by_provider
from serving.private_copy import fingerprint, private_copy
from serving.tasks import open_bundle


@dataclass(frozen=True)
class Finding:
    """One thing that was verified, and what was found."""

    what: str
    text: str


class TaskChecks(Protocol):
    """What is verified differently for each task. Everything but `describe` raises BundleError for what is wrong."""

    def describe(self, manifest: Mapping[str, Any]) -> str:
        """One line about the model."""

    def check_maps(self, manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
        """See that every bucket map stays within its table."""

    def check_ids(self, manifest: Mapping[str, Any], model: onnx.ModelProto) -> tuple[str, Any]:
        """See that the graph has the ids that the manifest states. Returns a text, and known ids for the trial request."""

    def trial_request(self, loaded: Any, known: Any) -> str:
        """Ask the loaded model for known ids, and see that the answers agree with each other."""


CHECKS: dict[str, TaskChecks] = {"retrieval": check_retrieval, "ctr": check_ctr}


def check(bundle: Path, provider: Provider = "auto") -> Iterator[Finding]:
    """Verify a bundle, step by step; each finding that is yielded has passed.

    Args:
        bundle: the folder.
        provider: "auto", "cpu" or "cuda", for the trial request.

    Raises:
        BundleError: at the first thing that is wrong, or at the end, where the files have changed meanwhile. They are checked in a
            private copy (`serving.private_copy`).
    """
    before = fingerprint(bundle)
    with private_copy(bundle) as copy:
        yield from _findings(copy, provider)
    if fingerprint(bundle) != before:
        raise BundleError(f"{bundle}: changed while it was checked; check it again once nothing writes to it")


def _findings(bundle: Path, provider: Provider) -> Iterator[Finding]:
    manifest = check_bundle(bundle)
    yield Finding("manifest", f"format {manifest['format_version']}, written {manifest['created_at']}, hash as stated")
    for name, entry in manifest["files"].items():
        yield Finding("file", f"{name}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}... as stated")
    outside = sorted(external_locations(bundle / MODEL))
    yield Finding("external data", f"read from {', '.join(outside)}" if outside else "none, the model is one file")
    checks = CHECKS[manifest["task"]]
    yield Finding("model", checks.describe(manifest))
    model = _load(bundle)
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    yield Finding("graph", f"well-formed, {len(model.graph.node)} nodes, opsets {opsets}")
    for side in ("inputs", "optional_inputs", "outputs"):
        if side in manifest:
            values = (f"{name} {spec['dtype']}{_shape(spec['shape'])}" for name, spec in manifest[side].items())
            yield Finding(side.replace("_", " "), ", ".join(values) or "none")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims)}
    yield Finding("tables", _check_tables(tensors))
    yield Finding("maps", checks.check_maps(manifest, tensors))
    text, known = checks.check_ids(manifest, model)
    yield Finding("ids", text)
    loaded = open_bundle(bundle, provider)
    yield Finding("trial request", checks.trial_request(loaded, known))
    counts = nodes_by_provider(bundle, provider)
    total = sum(counts.values())
    shares = (f"{name} {100 * count / total:.0f} % of {total} kernels" for name, count in sorted(counts.items()))
    yield Finding("provider", f"{loaded.provider} in use: {', '.join(shares)}")


def _load(bundle: Path) -> onnx.ModelProto:
    try:
        onnx.checker.check_model(str(bundle / MODEL), full_check=True)
        return onnx.load(str(bundle / MODEL))
    except Exception as error:  # onnx raises what protobuf, its checker and its shape inference happen to raise.
        raise BundleError(
            f"{bundle / MODEL}: not a valid ONNX model ({first_line(error)[:200]}); export the bundle again"
        ) from error


def _shape(axes: list[str]) -> str:
    return f"[{', '.join(axes)}]" if axes else ""


def _check_tables(tensors: Mapping[str, np.ndarray]) -> str:
    texts = []
    for name, values in tensors.items():
        if values.dtype.kind == "f" and name != "minus_infinity" and not np.isfinite(values).all():
            raise BundleError(f"tensor {name!r} holds {values[~np.isfinite(values)].flat[0]}; train and export again")
        if name.endswith("_table"):
            texts.append(f"{name} {values.shape[0]:,} x {values.shape[1]} {values.dtype}")
    return f"finite; {', '.join(texts)}"
