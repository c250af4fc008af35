"""CPU seconds that an epoch of training takes in FuxiCTR and in GraphHash: the same model on the same rows, in turns, one thread each.

    graphhash ingest --task ctr --data frappe --format frappe_x1 --out rows
    python docs/experiments/fuxictr_speed.py rows/ingest FUXICTR_PYTHON FuxiCTR/model_zoo dcnv2 400,400,400

FUXICTR_PYTHON is the interpreter of the environment of `fuxictr_rows.py`. Models: `dcnv2`, with three square cross layers beside the hidden
layers, and `dlrm`. Vectors have 10 numbers and batches 4,096 samples; there is neither dropout nor batch normalization, which GraphHash
has not, nor FuxiCTR's penalty on the tables, which would cost it time. Every turn is a process of its own, with an epoch that is not timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS, N_TURNS, N_EPOCHS = ("full", "double_soft"), 2, 2
FUXICTR = {"dcnv2": ("DCNv2", "parallel_dnn_hidden_units"), "dlrm": ("DLRM", "top_mlp_units")}


def of_fuxictr(python: str, ingest: str, zoo: str, model: str, hidden: list[int]) -> list[float]:
    name, layers = FUXICTR[model]
    changes = json.dumps({layers: hidden, "timed_epochs": N_EPOCHS})
    command = [python, str(Path(__file__).with_name("fuxictr_rows.py")), ingest, zoo, name, changes]
    return json.loads(told_by(command).splitlines()[-1])["cpu_seconds"]


def of_graphhash(ingest: str, method: str, model: str, hidden: list[int]) -> float:
    command = [sys.executable, __file__, "train", ingest, method, model, ",".join(map(str, hidden))]
    return json.loads(told_by(command).splitlines()[-1])["cpu_s"]


def told_by(command: list[str]) -> str:
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def train(ingest: str, method: str, model: str, hidden: str) -> dict[str, Any]:
    """Figures of a method's epochs, in this process; as `graphhash bench train`, but on rows that are ingested."""
    from pipeline.bench.training_ctr import measure_ctr
    from pipeline.config.run_config import RunConfig
    from pipeline.ctr.cluster import cluster_ctr

    settings = {
        "run.task": "ctr", "run.methods": (method,), "data.path": "frappe", "cluster.resolution": 5.0, "train.model": model,
        "train.dim": 10, "train.batch_size": 4096, "train.hidden": tuple(hidden.split(",")), "train.n_cross": 3, "train.dropout": 0.0,
    }  # fmt: skip
    config = RunConfig.from_flat(settings)
    with tempfile.TemporaryDirectory() as folder:
        cluster_ctr(config, Path(ingest), Path(folder))
        return measure_ctr(config, Path(ingest), Path(folder), rounds=N_EPOCHS)[0]


def main(ingest: str, python: str, zoo: str, model: str, hidden: str) -> None:
    units = [int(n) for n in hidden.split(",")]
    seconds: dict[str, list[float]] = {name: [] for name in ("FuxiCTR", *METHODS)}
    for turn in range(N_TURNS):
        seconds["FuxiCTR"].append(statistics.median(of_fuxictr(python, ingest, zoo, model, units)))
        for method in METHODS:
            seconds[method].append(of_graphhash(ingest, method, model, units))
        print(f"turn {turn + 1}: " + ", ".join(f"{name} {own[-1]:.2f}" for name, own in seconds.items()), flush=True)
    print(
        json.dumps({"model": model, "hidden": units} | {name: statistics.median(own) for name, own in seconds.items()})
    )


if __name__ == "__main__":
    if sys.argv[1] == "train":
        print(json.dumps(train(*sys.argv[2:])))
    else:
        main(*sys.argv[1:])
