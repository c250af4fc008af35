"""Trains a model of FuxiCTR on the rows that `graphhash ingest --task ctr` encoded: the same train, validation and test.

    python docs/experiments/fuxictr_rows.py out/ingest FuxiCTR/model_zoo DCNv2 '{"batch_norm": true, "embedding_regularizer": 0.001}'

Run it in an environment of its own, with `fuxictr`, and a clone of FuxiCTR for the models, which its package does not contain. Batches come
from memory, which is faster than FuxiCTR's readers. FuxiCTR trains: Adam, a tenth of the learning rate after each epoch without a better
validation AUC, and an end after two of them. The best epoch is tested, and once more with slope and offset of its logits fitted to the
validation rows, as GraphHash's models are calibrated. With `"timed_epochs": n` it trains n epochs after a first one,
without validation, and prints the CPU seconds of each instead.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.torch_utils import seed_everything
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

SETTINGS = {
    "optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["logloss", "AUC"], "monitor": "AUC", "monitor_mode": "max",
    "task": "binary_classification", "early_stop_patience": 2, "verbose": 0, "seed": 0, "epochs": 100, "batch_size": 4096,
    "learning_rate": 1e-3, "embedding_dim": 10, "parallel_dnn_hidden_units": [400, 400, 400], "num_cross_layers": 3,
    "top_mlp_units": [400, 400, 400],
}  # fmt: skip


class Batches:
    """The rows of one part in memory, in batches of tensors by column.

    Args:
        folder: with `labels.npy` and `categorical.npy`.
        names: of the columns.
        shuffled: whether each pass has another order.
    """

    def __init__(self, folder: Path, names: list[str], batch_size: int, *, shuffled: bool):
        self.labels = torch.from_numpy(np.load(folder / "labels.npy").astype(np.float32))
        self.entries = torch.from_numpy(np.load(folder / "categorical.npy").astype(np.int64)) + 1
        self.names, self.batch_size, self.shuffled = names, batch_size, shuffled

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.labels)) if self.shuffled else torch.arange(len(self.labels))
        for rows in order.split(self.batch_size):
            entries = self.entries[rows]
            yield {name: entries[:, number] for number, name in enumerate(self.names)} | {"label": self.labels[rows]}


def epoch_seconds(model: Any, train: Batches, n_epochs: int) -> list[float]:
    """CPU seconds of epochs of training alone, after one that is not counted."""
    marks = [time.process_time()]
    # Called at the end of an epoch; the best weights are those of no validation.
    model.eval_step = lambda: marks.append(time.process_time())
    model.load_weights = lambda checkpoint: None
    model.fit(train, epochs=n_epochs + 1)
    return [end - start for start, end in itertools.pairwise(marks)][1:]


def calibrated_log_loss(model: Any, parts: dict[str, Batches]) -> float:
    """Log loss of the test, after a logistic regression of the validation labels on the logits."""
    logits = {}
    for part in ("validation", "test"):
        predicted = np.clip(model.predict(parts[part]).astype(np.float64), 1e-12, 1 - 1e-12)
        logits[part] = np.log(predicted / (1 - predicted))[:, None]
    line = LogisticRegression(C=np.inf).fit(logits["validation"], parts["validation"].labels.numpy())
    return float(log_loss(parts["test"].labels.numpy(), line.predict_proba(logits["test"])))


def main(ingest: str, zoo: str, model_name: str, changes: str = "{}") -> None:
    torch.set_num_threads(1)
    settings = SETTINGS | json.loads(changes)
    columns = json.loads((Path(ingest) / "schema.json").read_text(encoding="utf-8"))["columns"]
    names, folder = [column["name"] for column in columns], tempfile.mkdtemp()
    # Entry 0 is FuxiCTR's padding; the last one is that of values that train has not.
    described = [
        {c["name"]: {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": c["n_ids"] + 2}}
        for c in columns
    ]
    facts = {"dataset_id": "rows", "num_fields": len(names), "total_features": 0, "input_length": len(names)}
    (Path(folder) / "rows").mkdir()
    path = Path(folder) / "feature_map.json"
    path.write_text(json.dumps(facts | {"labels": ["label"], "features": described}), encoding="utf-8")
    feature_map = FeatureMap("rows", folder)
    feature_map.load(str(path), settings)
    parts = {
        part: Batches(Path(ingest) / part, names, settings["batch_size"], shuffled=part == "train")
        for part in ("train", "validation", "test")
    }
    seed_everything(settings["seed"])
    sys.path.insert(0, str(Path(zoo) / model_name))
    model = getattr(importlib.import_module("src"), model_name)(feature_map, model_root=folder, **settings)
    n_parameters = sum(weight.numel() for weight in model.parameters())
    if n_timed := settings.get("timed_epochs"):
        seconds = epoch_seconds(model, parts["train"], n_timed)
        print(json.dumps({"model": model_name, "parameters": n_parameters, "cpu_seconds": seconds}))
        return
    epochs: list[float] = []
    one_epoch = model.eval_step

    def told() -> None:
        one_epoch()
        epochs.append(time.perf_counter() - started)
        print(f"epoch {len(epochs)}: validation AUC up to {model._best_metric:.5f}, {epochs[-1]:.0f} s", flush=True)

    model.eval_step = told
    started, started_cpu = time.perf_counter(), time.process_time()
    model.fit(parts["train"], validation_data=parts["validation"], epochs=settings["epochs"])
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - started_cpu
    found = {part: model.evaluate(parts[part]) for part in ("validation", "test")}
    found["test"]["calibrated_logloss"] = calibrated_log_loss(model, parts)
    print(json.dumps({"model": model_name, "changes": json.loads(changes), "parameters": n_parameters, "seconds": round(seconds, 1),
                      "cpu_seconds": round(cpu_seconds, 1),
                      "epochs": len(epochs), **{k: {n: float(v) for n, v in f.items()} for k, f in found.items()}}))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
