"""Which execution provider runs the nodes of a bundle's graph, read from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from serving.bundle_model import Provider
from serving.tasks import open_bundle


def nodes_by_provider(bundle: Path | str, provider: Provider = "auto") -> dict[str, int]:
    """Kernels that one smallest request ran, by execution provider, as {"CPUExecutionProvider": 60}; bodies of loops count once a round.

    Raises:
        BundleError: as `open_bundle`.
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded = open_bundle(bundle, provider, profile=Path(folder) / "profile")
        loaded.warm_up()
        events = json.loads(Path(loaded.end_profiling()).read_text(encoding="utf-8"))
    kernels = [
        event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    return dict(Counter(kernel["provider"] for kernel in kernels))
