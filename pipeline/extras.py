"""Which extra of the package brings a module that is not installed."""

from __future__ import annotations

import os
import platform

EXTRAS = {
    "annotated_types": "train",
    "click": "train",
    "fastapi": "serve",
    "httptools": "serve",
    "jinja2": "train",
    "matplotlib": "train",
    "mlflow": "mlflow",
    "onnx": "train",
    "onnxruntime": "serve",
    "onnxscript": "train",
    "optuna": "train",
    "pandas": "train",
    "polars": "bench",
    "prometheus_client": "serve",
    "psutil": "train",
    "pyarrow": "storage",
    "pydantic": "train",
    "ray": "ray",
    "starlette": "serve",
    "torch": "train",
    "tqdm": "train",
    "uvicorn": "serve",
}


def remedy(error: ModuleNotFoundError) -> str | None:
    """One line with the extra to install, for a module of another package; None for a module of ours or one that no extra brings."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return (
            f"{module} is not installed on {platform.node()}, a machine of the cluster; install graphhash[all] on the cluster's machines: "
            "pip install 'graphhash[all]'"
        )
    return f"{module} is not installed; pip install 'graphhash[{EXTRAS[module]}]', or graphhash[all] for everything"
