"""Which execution provider runs the nodes of a bundle's graph: what ONNX Runtime really did, read from its own profile."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal

from serving.bundle import task_of
from serving.retriever import Retriever
from serving.scorer import Scorer


def nodes_by_provider(bundle: Path | str, provider: Literal["auto", "cpu", "cuda"] = "auto") -> dict[str, int]:
    """Kernels that one request ran, by execution provider, as {"CPUExecutionProvider": 60}.

    The request asks for one unknown user's best item, or for the click of a row without any value: every node of the graph takes part,
    bodies of loops once a round.

    Raises:
        BundleError: as `Retriever` and `Scorer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        loaded: Retriever | Scorer
        if task_of(bundle) == "ctr":
            loaded = Scorer(bundle, provider=provider, profile=profile)
            loaded.predict({name: [None] for name in loaded.columns})
        else:
            loaded = Retriever(bundle, provider=provider, profile=profile)
            user = 0 if loaded.manifest["id_types"]["user_id"] == "int64" else ""
            loaded.recommend([user], 1)
        events = json.loads(Path(loaded.end_profiling()).read_text(encoding="utf-8"))
    kernels = [
        event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    return dict(Counter(kernel["provider"] for kernel in kernels))
