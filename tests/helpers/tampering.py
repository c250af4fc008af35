"""Manifests changed and signed again, as somebody with bad intent would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a bundle in place, and give it a valid hash again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest.pop("manifest_sha256")
    manifest["manifest_sha256"] = hashlib.sha256(_spelled(manifest).encode()).hexdigest()
    (folder / "manifest.json").write_text(_spelled(manifest))


def _spelled(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"
