"""The train stage: bucket maps, then the loop of ``pipeline.fit`` in a Ray Train worker.

The worker has a GPU where the cluster has one, else all CPUs. One that is killed is started again and goes on from the last
evaluation's checkpoint.

Files (``RUN/methods/<method>/``): ``users.npz``, ``items.npz`` (bucket maps), ``checkpoint/model.npz`` (the weights of best
validation recall, float32: ``user_table``, ``item_table`` and, where trained, ``item_bias``) and ``history.json``.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from tqdm import tqdm

from graphhash.buckets import BucketMap
from graphhash.errors import DataError
from graphhash.retrieval import RetrievalModel
from graphhash.samplers import NegativeSampler
from pipeline.budget import asked_lookups
from pipeline.checkpoint import save_model
from pipeline.clusters import load_labels
from pipeline.config import RunConfig, TrainConfig
from pipeline.evaluate import K, rank_users
from pipeline.features import load_features
from pipeline.methods import METHODS, Inputs, Method
from pipeline.models import RECIPES, ModelSpec
from pipeline.ray_maps import StoredGraph
from pipeline.ray_session import cpus_of_machines
from pipeline.retrieval_fit import RetrievalSettings, fit_retrieval
from pipeline.shards import ShardedCsr
from pipeline.stages import write_json_atomic
from pipeline.tracking import Tracker

FitJob = Callable[[dict[str, Any], Tracker], dict[str, Any]]
STATE = "state.pt"
PROGRESS = "progress.json"
FAILURE = "failure.txt"
# Of a training that is not stopped early.
EVALUATIONS = 15


def train_method(
    config: RunConfig,
    method: str,
    ingest_dir: Path,
    cluster_dir: Path,
    out_dir: Path,
    tracker: Tracker,
    fit_job: FitJob | None = None,
) -> dict[str, Any]:
    """Make the maps of a method, train, and write the files above. Ray must be running.

    Args:
        fit_job: trains; None: a Ray Train worker with all that one machine has. :func:`fit_here` is the other way.

    Returns: epochs trained, best epoch, best validation recall, settings that were defaults, and the maps' hashes.

    Raises:
        DataError: training failed; the message says why.
    """
    spec = METHODS[method]
    graph = ShardedCsr.open(ingest_dir / "train").load()
    facts = json.loads((cluster_dir / "cluster.json").read_text())
    labels = load_labels(cluster_dir, facts)
    n_lookups = spec.lookups(asked_lookups(config, method, *graph.shape, graph.nnz))
    # Over Ray where the clustering was; the maps are the same, bit for bit.
    stored = StoredGraph(ingest_dir, out_dir, config.cluster.shards) if config.cluster.shards else None
    features = partial(load_features, config.data, ingest_dir)
    try:
        maps = spec.make(Inputs(graph, labels, n_lookups, config.map.hops, config.map.seed, features, stored))
    except ValueError as error:
        raise DataError(f"method {method!r}: {error}") from error
    for side, bucket_map in zip(("users", "items"), maps, strict=True):
        bucket_map.save(out_dir / f"{side}.npz")
    settings = fit_settings(config.train, spec)
    model_spec = ModelSpec(
        config.train.model,
        config.train.dim,
        spec.with_bias(config.map.item_bias, config.train.loss),
        config.train.n_layers,
        settings.seed,
    )
    tracker.log_params({"lr": settings.lr, "weight_decay": settings.weight_decay})
    hashes = {f"bucket_map_hash.{side}": m.content_hash for side, m in zip(("users", "items"), maps, strict=True)}
    tracker.set_tags({f"graphhash.{key}": value for key, value in hashes.items()})
    job = {
        "fit": _fit_retrieval,
        "folder": str(out_dir.absolute()),
        "ingest": str(ingest_dir.absolute()),
        "model": model_spec,
        "settings": settings,
        "eval_users": config.train.eval_users,
        "sampler": (config.train.sampler, config.train.popularity_power),
    }
    state = run_job(job, method, tracker, fit_job)
    model = model_spec.build(*maps, graph)
    model.load_state_dict(state["best"])
    for side, embedding in (("users", model.user_embedding), ("items", model.item_embedding)):
        degrees = graph.sum(axis=1 if side == "users" else 0)
        embedding.fill_unknown(torch.from_numpy(np.asarray(degrees, np.float32).ravel()))
    save_model(model, model_spec, out_dir)
    write_json_atomic(out_dir / "history.json", {"epochs": state["history"], "best_epoch": state["best_epoch"]})
    best = state["best_score"]
    return {
        "epochs": state["epoch"],
        "best_epoch": state["best_epoch"],
        f"validation_recall@{K}": best if math.isfinite(best) else None,
        "item_bias": model_spec.item_bias,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        **hashes,
    }


def fit_settings(train: TrainConfig, method: Method) -> RetrievalSettings:
    """The settings of a training, every default decided by the method and by the model with its loss."""
    recipe = RECIPES[train.model, train.loss]
    epochs = recipe.epochs if train.epochs is None else train.epochs
    batch_size = recipe.batch_size if train.batch_size is None else train.batch_size
    lr = method.lr if recipe.lr is None else recipe.lr
    weight_decay = method.weight_decay if recipe.weight_decay is None else recipe.weight_decay
    return RetrievalSettings(
        lr=lr if train.lr is None else train.lr,
        weight_decay=weight_decay if train.weight_decay is None else train.weight_decay,
        epochs=epochs,
        eval_every=max(1, epochs // EVALUATIONS) if train.eval_every is None else train.eval_every,
        patience=train.patience,
        batch_size=batch_size or None,
        seed=train.seed,
        loss=train.loss,
        gamma=train.gamma,
        unobserved_weight=train.unobserved_weight,
    )


def run_job(job: dict[str, Any], method: str, tracker: Tracker, fit_job: FitJob | None) -> dict[str, Any]:
    """Train, with a progress bar, and return the last state of ``pipeline.fit``.

    Args:
        job: ``fit``, a function of a module, which loads and fits: it is given the job, the device, and ``state``, ``on_epoch`` and
            ``on_evaluation`` for the loop; ``folder``, absolute, to work in; ``settings``; and what else ``fit`` wants.
        fit_job: see :func:`train_method`.

    Raises:
        DataError: training failed; the message says why.
    """
    progress = Path(job["folder"]) / PROGRESS
    with _progress_bar(method, job["settings"].epochs, progress):
        state = (fit_job or _run_on_ray)(job, tracker)
    progress.unlink(missing_ok=True)
    return state


def _run_on_ray(job: dict[str, Any], tracker: Tracker) -> dict[str, Any]:
    """Run :func:`_worker` in Ray Train and return its last state."""
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer

    resources = ray.cluster_resources()
    n_gpus = int(resources.get("GPU", 0))
    # One worker runs on one machine, however many the cluster has.
    n_cpus = max([1, *cpus_of_machines()])
    storage = Path(job["folder"]) / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(
            num_workers=1, use_gpu=n_gpus > 0, resources_per_worker=None if n_gpus else {"CPU": n_cpus}
        ),
        run_config=train.RunConfig(
            name="fit",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=2),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            callbacks=[_tracking_callback(tracker)] if tracker.run_id else [],
        ),
    )
    try:
        result = trainer.fit()
    except train.TrainingFailedError as error:
        raise DataError(_reason(error)) from error
    finally:
        failure = Path(job["folder"]) / FAILURE
        if failure.exists():
            raise DataError(failure.read_text())
    with result.checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")
    shutil.rmtree(storage, ignore_errors=True)
    return state


def fit_here(
    job: dict[str, Any], tracker: Tracker, on_entry: Callable[[dict[str, Any]], None] = lambda entry: None
) -> dict[str, Any]:
    """Fit in this process, a Ray task or actor that was given what one training needs, and return the last state.

    A Ray Train worker takes ten seconds and more to come up, which counts when there are many trainings.

    Args:
        on_entry: told epoch, loss and metrics of every evaluation.
    """
    import ray

    has_gpu = ray.get_runtime_context().get_assigned_resources().get("GPU", 0) > 0

    def on_evaluation(state: dict[str, Any]) -> None:
        entry = state["history"][-1]
        tracker.log_metrics({key: value for key, value in entry.items() if key != "epoch"}, step=entry["epoch"])
        on_entry(entry)

    return _fit(job, torch.device("cuda" if has_gpu else "cpu"), None, on_evaluation)


def _worker(job: dict[str, Any]) -> None:
    """What one Ray Train worker does: fit, and report a checkpoint at every evaluation."""
    from ray import train
    from ray.train.torch import get_device

    device = get_device()
    checkpoint = train.get_checkpoint()
    state = None
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            state = torch.load(Path(saved) / STATE, weights_only=True, map_location=device)

    def on_evaluation(state: dict[str, Any]) -> None:
        entry = state["history"][-1]
        with tempfile.TemporaryDirectory() as saved:
            torch.save(state, Path(saved) / STATE)
            train.report(entry, checkpoint=train.Checkpoint.from_directory(saved))

    try:
        _fit(job, device, state, on_evaluation)
    except DataError as error:
        # Another try would end the same way, so it is told to the driver and not to Ray Train.
        (Path(job["folder"]) / FAILURE).write_text(str(error))


def _fit(
    job: dict[str, Any], device: torch.device, state: dict[str, Any] | None, on_evaluation: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Load, and fit with the CPUs that Ray has given to this process."""
    import numba
    import ray

    n_cpus = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    torch.set_num_threads(n_cpus)
    numba.set_num_threads(min(n_cpus, numba.config.NUMBA_NUM_THREADS))
    written = 0.0

    def on_epoch(epoch: int, loss: float) -> None:
        nonlocal written
        if time.monotonic() - written > 0.5:
            written = time.monotonic()
            write_json_atomic(Path(job["folder"]) / PROGRESS, {"epoch": epoch, "loss": loss})

    return job["fit"](job, device, state=state, on_epoch=on_epoch, on_evaluation=on_evaluation)


def _fit_retrieval(job: dict[str, Any], device: torch.device, **how: Any) -> dict[str, Any]:
    folder, settings = Path(job["folder"]), job["settings"]
    graph = ShardedCsr.open(Path(job["ingest"]) / "train").load()
    maps = BucketMap.load(folder / "users.npz"), BucketMap.load(folder / "items.npz")
    model = job["model"].build(*maps, graph).to(device)
    users = torch.from_numpy(np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))).to(device)
    items = torch.from_numpy(graph.indices.astype(np.int64)).to(device)
    validation = ShardedCsr.open(Path(job["ingest"]) / "validation").load()
    validate = _validation(graph, validation, job["eval_users"], settings.seed) if validation.nnz else None
    kind, power = job["sampler"]
    sample = NegativeSampler(graph, kind, power=power, device=device)
    return fit_retrieval(model, users, items, settings, validate, sample=sample, **how)


def _validation(
    seen: csr_array, relevant: csr_array, n_users: int, seed: int
) -> Callable[[RetrievalModel], dict[str, float]]:
    """Mean recall and NDCG over users with held-out items, ``n_users`` of them drawn once where there are more (0: all)."""
    users = np.flatnonzero(np.diff(relevant.indptr))
    if 0 < n_users < len(users):
        users = np.sort(np.random.default_rng(seed).choice(users, n_users, replace=False))

    def validate(model: RetrievalModel) -> dict[str, float]:
        recall, ndcg = rank_users(model, users, seen, relevant, K)
        return {f"recall@{K}": float(recall.mean()), f"ndcg@{K}": float(ndcg.mean())}

    return validate


def _reason(error: Exception) -> str:
    """One line of why a worker failed, from Ray Train's collection of tracebacks."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    cause = getattr(causes[0], "cause", None) or causes[0]
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"training failed: {lines[-1] if lines else type(cause).__name__}"


def _tracking_callback(tracker: Tracker) -> Any:
    """Sends the metrics to MLflow from Ray Train's controller process, so that workers need no tracking."""
    from ray.train import UserCallback

    class TrackingCallback(UserCallback):
        def after_report(self, run_context, metrics, checkpoint):
            # Every worker reports the same metrics.
            entry = metrics[0]
            tracker.log_metrics({key: value for key, value in entry.items() if key != "epoch"}, step=entry["epoch"])

    return TrackingCallback()


@contextmanager
def _progress_bar(method: str, epochs: int, file: Path) -> Iterator[None]:
    """A bar over the epochs that the worker notes in ``file``; only on a terminal."""
    with tqdm(total=epochs, desc=f"train {method}", unit=" epochs", disable=None, leave=False) as bar:
        if bar.disable:
            yield
            return
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(0.5):
                try:
                    seen = json.loads(file.read_text())
                except (OSError, ValueError):
                    continue  # The worker has not begun, or has just ended.
                bar.update(seen["epoch"] - bar.n)
                bar.set_postfix_str(f"loss {seen['loss']:.4f}")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
