"""The benchmark of several workers: an epoch in this process, and in Ray Train with as many workers as are asked for.

The difference between this process and one worker is what Ray Train costs per epoch; between one worker and several, what they gain. Next
to it stands the time in which memory moves what an epoch reads and writes, at the speed of a copy on the same device: a lower bound
where vectors do not stay in a cache, as those of a small log do. The first
epoch is not counted, and nothing is evaluated.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.maps.bucket_map import table_rows
from graphhash.models.samplers import NegativeSampler
from pipeline.config.run_config import HOPS, DataConfig, TrainConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS, Inputs
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import RetrievalSettings, fit_retrieval
from pipeline.retrieval.train import fit_settings, fit_task
from pipeline.storage.atomic import write_json_atomic
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.workers import run_on_ray

_log = logging.getLogger(__name__)

TIMES = "times.json"
COPIED_BYTES = 2**28


def bench_workers(
    data: DataConfig,
    *,
    method: str,
    settings: TrainConfig,
    indices_per_id: int | None,
    resolution: float,
    workers: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Time full-batch epochs and epochs of batches, in this process and in Ray Train.

    Args:
        data: a log; there is no validation.
        method, settings, indices_per_id, resolution, rounds: as in ``pipeline.bench.training.measure``.
        workers: numbers of Ray Train's workers.

    Returns: one object per task and place: ``method``, ``model``, ``task``, ``where`` ("this process" or "Ray Train"), ``workers``,
        ``device``, ``threads`` (of each), ``n_interactions``, ``seconds`` (the median of ``rounds_s``), ``per_second``, ``start_s`` (all but
        the epochs counted), ``bound_s`` and ``gpu_percent`` (None off a GPU).
    """
    from pipeline.distributed.session import ray_session
    from pipeline.retrieval.ingest import ingest

    spec, results = METHODS[method], []
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as name, ray_session():
        folder = Path(name)
        _log.info("%s: making the graph", Path(data.path).name)
        ingest(data, folder / "ingest")
        graph = ShardedCsr.open(folder / "ingest" / "train").load()
        labels = cluster(graph, resolution=resolution)
        maps = spec.make(Inputs(graph, labels, spec.lookups(indices_per_id), hops=HOPS[-1], seed=settings.seed))
        n_rows = table_rows(*maps)
        blueprint = ModelSpec(
            settings.model, settings.dim, spec.with_bias(None, settings.loss), settings.n_layers, settings.seed
        )
        n_numbers = sum(parameter.numel() for parameter in blueprint.build(*maps, graph).parameters())
        for task, batch_size in (("full-batch epoch", 0), (f"batches of {settings.batch_size:,}", settings.batch_size)):
            how = fit_settings(
                replace(settings, epochs=rounds + 1, eval_every=rounds + 1, batch_size=batch_size), spec, n_rows, graph
            )
            n_bytes = bytes_to_move(graph.nnz, settings.dim, n_numbers, how.batch_size)

            def figures_of(times: dict[str, Any], n_bytes: int = n_bytes) -> dict[str, Any]:
                seconds, bytes_per_s = statistics.median(times["rounds_s"]), times.pop("bytes_per_s")
                return times | {"seconds": seconds, "per_second": graph.nnz / seconds, "bound_s": n_bytes / bytes_per_s}

            about = {"method": method, "model": settings.model, "task": task, "n_interactions": graph.nnz}
            _log.info("%s: this process", task)
            results.append(
                about | {"where": "this process", "workers": 1} | figures_of(_here(blueprint, maps, graph, how))
            )
            for n in workers:
                _log.info("%s: Ray Train, workers: %d", task, n)
                work = folder / f"{batch_size}-{n}"
                work.mkdir()
                for side, bucket_map in zip(("users", "items"), maps, strict=True):
                    bucket_map.save(work / f"{side}.npz")
                job = {"task": timed_task, "folder": str(work), "ingest": str(folder / "ingest"), "model": blueprint, "settings": how,
                       "eval_users": 0, "sampler": ("uniform", 0.0), "propagation": settings.propagation,
                       "states": CheckpointManager(work / "states"), "workers": n, "checkpoint_seconds": 0.0}  # fmt: skip
                asked_at = time.perf_counter()
                run_on_ray(timed_task, job, Tracker())
                whole = time.perf_counter() - asked_at
                times = json.loads((work / TIMES).read_text())
                start = {"start_s": whole - sum(times["rounds_s"])}
                results.append(about | {"where": "Ray Train", "workers": n} | figures_of(times) | start)
    return results


def timed_task(job: dict[str, Any], device: torch.device, how: dict[str, Any]) -> dict[str, Any]:
    """What a worker does: train as ever; the first one writes how long each epoch took."""
    watch = _Watch(device)
    with watch:
        state = fit_task(job, device, how | {"on_epoch": watch.end_epoch})
    if how["workers"].rank == 0:
        write_json_atomic(Path(job["folder"]) / TIMES, watch.times())
    return state


def _here(blueprint: ModelSpec, maps: Any, graph: csr_array, settings: RetrievalSettings) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch = _Watch(device)
    users = torch.from_numpy(np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr)))
    items = torch.from_numpy(graph.indices.astype(np.int64))
    model, sample = blueprint.build(*maps, graph).to(device), NegativeSampler(graph, device=device)
    with watch:
        fit_retrieval(model, users, items, settings, None, sample=sample, on_epoch=watch.end_epoch)
    times = watch.times()
    return times | {"start_s": max(0.0, watch.marks[0] - times["rounds_s"][0] - watch.began)}


def bytes_to_move(n_interactions: int, dim: int, n_numbers: int, batch_size: int | None) -> int:
    """What an epoch of BPR with Adam moves to and from memory at least, in bytes, if nothing stays in a cache.

    Three vectors an interaction are read forwards and again backwards, and their gradients are read, added to and written; in each step
    Adam reads four numbers per number of the model that it touches, and writes three.

    Args:
        n_numbers: of the model. A step touches those alone that its vectors have, where these are fewer.
        batch_size: None: one step.
    """
    batch = n_interactions if batch_size is None else min(batch_size, n_interactions)
    n_steps = -(-n_interactions // batch)
    return 4 * (n_interactions * 3 * dim * 4 + n_steps * min(n_numbers, 3 * batch * dim) * 7)


class _Watch:
    """Marks the end of every epoch on the device, and how busy a GPU is while the block lasts."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ended, self._busy = device, threading.Event(), []
        self.marks: list[float] = []
        self.began = time.perf_counter()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._look, daemon=True)
        if self._device.type == "cuda":
            self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._device.type == "cuda":
            self._thread.join()

    def end_epoch(self, _epoch: int, _loss: float) -> None:
        # The loss has been read, so a GPU has come so far.
        self.marks.append(time.perf_counter())

    def times(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "rounds_s": [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)],
            "gpu_percent": statistics.mean(self._busy) if self._busy else None,
            "bytes_per_s": bytes_per_second(self._device),
        }

    def _look(self) -> None:
        query = [
            "nvidia-smi",
            f"--id={self._device.index or 0}",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
        ]
        while not self._ended.wait(0.5):
            try:
                self._busy.append(
                    float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
                )
            except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
                return  # Without the tool there is no figure.


def bytes_per_second(device: torch.device) -> float:
    """Bytes read plus bytes written by a copy, the fastest of five."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * COPIED_BYTES / min(seconds)


def table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What to print: a header, and a line per result. The speed is over one worker of Ray Train, if there was one."""
    alone = {e["task"]: e["seconds"] for e in results if e["where"] == "Ray Train" and e["workers"] == 1}
    header = (
        "task",
        "where",
        "workers",
        "device",
        "threads",
        "epoch s",
        "interactions/s",
        "speed",
        "memory s",
        "GPU busy",
        "start s",
    )
    lines = [
        (e["task"], e["where"], str(e["workers"]), e["device"], str(e["threads"]), f"{e['seconds']:.3f}", f"{e['per_second']:,.0f}",
         f"{alone[e['task']] / e['seconds']:.2f}" if e["task"] in alone else "-", f"{e['bound_s']:.3f}",
         "-" if e["gpu_percent"] is None else f"{e['gpu_percent']:.0f} %", f"{e['start_s']:.1f}")
        for e in results
    ]  # fmt: skip
    return header, lines
