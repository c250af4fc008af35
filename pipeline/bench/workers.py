"""Benchmark of several workers: an epoch in this process, and in Ray Train with given numbers of workers.

The difference between this process and one worker is what Ray Train costs per epoch; between one worker and several, what they gain.
Next to it stands a lower bound: the time in which the device copies as many bytes as an epoch reads and writes. An epoch is faster only
where the vectors stay in a cache, as those of a small log do. The first epoch is not timed, and nothing is evaluated.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.models.samplers import NegativeSampler
from pipeline.bench.training import BenchSettings, Subject
from pipeline.config.run_config import DataConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.objective import RetrievalSettings, TrainingPairs, fit_retrieval
from pipeline.retrieval.train import fit_settings, fit_task
from pipeline.storage.atomic import write_json_atomic
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.loop import Callbacks
from pipeline.training.workers import run_on_ray

_log = logging.getLogger(__name__)

TIMES = "times.json"
COPIED_BYTES = 2**28


def bench_workers(data: DataConfig, settings: BenchSettings, workers: Sequence[int]) -> list[dict[str, Any]]:
    """Time full-batch epochs and epochs of batches, in this process and in Ray Train.

    Args:
        data: a log; there is no validation.
        settings: its first method is timed.
        workers: numbers of Ray Train's workers.

    Returns: one object per task and place: ``method``, ``model``, ``task``, ``where`` ("this process" or "Ray Train"), ``workers``,
        ``device``, ``threads`` (of each), ``n_interactions``, ``seconds`` (the median of ``rounds_s``), ``per_second``, ``start_s``
        (everything but the timed epochs), ``bound_s`` and ``gpu_percent`` (None without a GPU).
    """
    from pipeline.distributed.session import ray_session
    from pipeline.retrieval.ingest import ingest

    results = []
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as name, ray_session():
        folder = Path(name)
        _log.info("%s: making the graph", Path(data.path).name)
        ingest(data, folder / "ingest")
        graph = ShardedCsr.open(folder / "ingest" / "train").load()
        labels = cluster(graph, resolution=settings.resolution)
        subject = Subject.make(settings.methods[0], graph, labels, settings)
        n_numbers = sum(parameter.numel() for parameter in subject.model.build(*subject.maps, graph).parameters())
        for task, config in settings.trainings():
            fit = fit_settings(config, subject.method, subject.n_rows, GraphSize.of(graph))
            n_bytes = bytes_to_move(graph.nnz, config.dim, n_numbers, fit.batch_size)
            common = {"method": settings.methods[0], "model": config.model, "task": task, "n_interactions": graph.nnz}
            _log.info("%s: this process", task)
            times = _time_here(subject, graph, fit)
            results.append(common | {"where": "this process", "workers": 1} | _figures(times, graph.nnz, n_bytes))
            for n in workers:
                _log.info("%s: Ray Train, workers: %d", task, n)
                work = folder / f"{config.batch_size}-{n}"
                times = _time_on_ray(subject, folder / "ingest", work, fit, n, config.propagation)
                results.append(common | {"where": "Ray Train", "workers": n} | _figures(times, graph.nnz, n_bytes))
    return results


def _figures(times: Mapping[str, Any], n_interactions: int, n_bytes: int) -> dict[str, Any]:
    """Times of a training, with their median, interactions per second, and the lower bound from the bytes of an epoch."""
    kept = {key: value for key, value in times.items() if key != "bytes_per_s"}
    seconds = statistics.median(times["rounds_s"])
    bound_s = n_bytes / times["bytes_per_s"]
    return kept | {"seconds": seconds, "per_second": n_interactions / seconds, "bound_s": bound_s}


def timed_task(job: dict[str, Any], device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """The task of a worker: train as in a run; the first worker writes the seconds of each epoch."""
    watch = _Watch(device)
    with watch:
        state = fit_task(job, device, options | {"callbacks": replace(options["callbacks"], on_epoch=watch.end_epoch)})
    if options["workers"].rank == 0:
        write_json_atomic(Path(job["folder"]) / TIMES, watch.times())
    return state


def _time_on_ray(
    subject: Subject, ingest_dir: Path, work: Path, settings: RetrievalSettings, n_workers: int, propagation: str
) -> dict[str, Any]:
    """Train in Ray Train's workers, in the new folder ``work``."""
    work.mkdir()
    for side, bucket_map in zip(("users", "items"), subject.maps, strict=True):
        bucket_map.save(work / f"{side}.npz")
    job = {
        "task": timed_task,
        "folder": str(work),
        "ingest": str(ingest_dir),
        "model": subject.model,
        "settings": settings,
        "eval_users": 0,
        "sampler": ("uniform", 0.0),
        "propagation": propagation,
        "checkpoints": CheckpointManager(work / "checkpoints"),
        "workers": n_workers,
        "checkpoint_seconds": 0.0,
    }
    started = time.perf_counter()
    run_on_ray(job, Tracker())
    whole = time.perf_counter() - started
    times = json.loads((work / TIMES).read_text())
    return times | {"start_s": whole - sum(times["rounds_s"])}


def _time_here(subject: Subject, graph: csr_array, settings: RetrievalSettings) -> dict[str, Any]:
    """Train in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch = _Watch(device)
    model = subject.model.build(*subject.maps, graph).to(device)
    pairs = TrainingPairs.of(graph, NegativeSampler(graph, device=device))
    with watch:
        fit_retrieval(model, pairs, settings, None, callbacks=Callbacks(on_epoch=watch.end_epoch))
    times = watch.times()
    return times | {"start_s": max(0.0, watch.marks[0] - times["rounds_s"][0] - watch.began)}


def bytes_to_move(n_interactions: int, dim: int, n_numbers: int, batch_size: int | None) -> int:
    """Least bytes that an epoch of BPR with Adam moves to and from memory, if nothing stays in a cache.

    Three vectors per interaction are read in the forward pass and again in the backward pass, and their gradients are read, added to and
    written; in each step Adam reads four numbers and writes three per parameter that it touches.

    Args:
        n_numbers: parameters of the model. A step touches at most those of the vectors in its batch.
        batch_size: None: one step per epoch.
    """
    batch = n_interactions if batch_size is None else min(batch_size, n_interactions)
    n_steps = -(-n_interactions // batch)
    return 4 * (n_interactions * 3 * dim * 4 + n_steps * min(n_numbers, 3 * batch * dim) * 7)


class _Watch:
    """Times the ends of epochs, and samples the utilization of a GPU while the block lasts."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ended = device, threading.Event()
        self._busy: list[float] = []
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
        # The loss has been read, so a GPU has finished the epoch.
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
                return  # Without the tool the share is unknown.


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
    """What to print: a header, and a line per result. Speed is relative to one worker of Ray Train, if there was one."""
    one_worker = {e["task"]: e["seconds"] for e in results if e["where"] == "Ray Train" and e["workers"] == 1}
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
    return header, [_columns(entry, one_worker.get(entry["task"])) for entry in results]


def _columns(entry: Mapping[str, Any], one_worker_s: float | None) -> tuple[str, ...]:
    """The texts of a line; ``one_worker_s`` are the seconds of one worker of Ray Train."""
    return (
        entry["task"],
        entry["where"],
        str(entry["workers"]),
        entry["device"],
        str(entry["threads"]),
        f"{entry['seconds']:.3f}",
        f"{entry['per_second']:,.0f}",
        "-" if one_worker_s is None else f"{one_worker_s / entry['seconds']:.2f}",
        f"{entry['bound_s']:.3f}",
        "-" if entry["gpu_percent"] is None else f"{entry['gpu_percent']:.0f} %",
        f"{entry['start_s']:.1f}",
    )
