"""The train stage: bucket maps, then the loop of ``pipeline.training.loop``.

Files (``RUN/methods/<method>/``): ``users.npz``, ``items.npz`` (bucket maps), ``checkpoint/model.npz`` (the weights of best
validation recall, float32: ``user_table``, ``item_table`` and, where trained, ``item_bias``) and ``history.json``. A refit
(``pipeline.retrieval.refit``) has the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from graphhash.maps.bucket_map import BucketMap, full_map, table_rows
from graphhash.metrics.ranking import capped_recall_at_k, ndcg_at_k
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import RetrievalModel
from graphhash.models.samplers import NegativeSampler
from graphhash.nn.workers import Workers
from pipeline.config.run_config import RunConfig, TrainConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.communities import load_communities
from pipeline.maps.methods import METHODS, Maps, Method, ResolvedMethod
from pipeline.retrieval.budget import GraphSize, resolve_method
from pipeline.retrieval.derived import derive_method
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.full_soft import mixture_labels, summed
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.maps import SIDES, make_maps
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import SCORE, K, LossSettings, RetrievalSettings, TrainingPairs, fit_retrieval
from pipeline.retrieval.presets import default_gamma, default_settings, preset_of
from pipeline.retrieval.schedule import (
    evaluation_interval,
    fits_the_log,
    fitted_decay,
    fitted_epochs,
    interaction_cost,
)
from pipeline.retrieval.weights import save_model
from pipeline.storage.atomic import write_json_atomic
from pipeline.task import TRAIN_PARTS, StageContext
from pipeline.training.job import TrainingSession, run_job
from pipeline.training.memory import training_bytes
from pipeline.training.resolved import patience, resolved_settings

# LightGCN's workers propagate each for itself below, and share the rows of the graph above: 24 bytes an edge are 400 MB then.
SHARDED_EDGES = 2**24
# Settings that a loss has a default of, for MLflow.
USED_OF_LOSS = {
    "softmax": ("temperature", "negatives", "dropout"),
    "bsl": ("temperature", "negatives", "negative_weight", "dropout"),
    "ccl": ("negatives", "negative_weight", "dropout"),
    "directau": ("gamma",),
}


def train_method(context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
    """Make the maps of a method, train, and write the files above into ``out``. ``session`` says where it trains.

    Returns: as :func:`fit_method`.

    Raises:
        DataError: training failed; the message says why.
    """
    if (trained_as := METHODS[method].trained_as) is not None:
        return derive_method(context, method, context.method_dir(trained_as), out)
    return fit_method(context, method, TRAIN_PARTS, out, session)


def fit_method(
    context: StageContext,
    method: str,
    parts: tuple[str, ...],
    out: Path,
    session: TrainingSession,
    last_epoch: int | None = None,
) -> dict[str, Any]:
    """Train a method on some parts of the log. Sizes and settings are those of the train graph, whatever the parts are.

    Args:
        parts: of the log. The maps are made of the communities of the train graph and of the interactions of these parts.
        last_epoch: train so many epochs without validation; None: with the validation interactions deciding.

    Returns: epochs trained, best epoch, best validation recall (capped), settings that were defaults, the bytes that training held, and
        the maps' hashes. ``history.json`` holds them as ``facts``.
    """
    config, spec = context.config, METHODS[method]
    size = GraphSize.of_shards(ShardedCsr.open(context.ingest_dir / "train"))
    graph = load_interactions(context.ingest_dir, parts)
    labels = load_communities(context.cluster_dir, json.loads((context.cluster_dir / "cluster.json").read_text()))
    resolved = resolve_method(config, method, size, labels.rows)
    if spec.trains_full_soft:
        assert resolved.n_rows is not None
        labels = mixture_labels(load_interactions(context.ingest_dir, TRAIN_PARTS), resolved.n_rows)
    maps = make_maps(context, resolved, graph, labels, out, parts)
    settings = fit_settings(config.train, spec, table_rows(*maps), size)
    model_spec = replace(trained_spec(config, resolved), parts=parts)
    further = _settings_used(settings, model_spec, resolved)
    settings = resolved_settings(config, settings, further, session.tracker, last_epoch)
    hashes = {f"bucket_map_hash.{side}": m.content_hash for side, m in zip(SIDES, maps, strict=True)}
    session.tracker.set_tags({f"graphhash.{key}": value for key, value in hashes.items()})
    job = {
        "task": fit_task,
        "folder": str(out.absolute()),
        "ingest": str(context.ingest_dir.absolute()),
        "model": model_spec,
        "settings": settings,
        "eval_users": config.train.eval_users,
        "sampler": (config.train.sampler, config.train.popularity_power),
        "propagation": config.train.propagation,
    }
    state = run_job(job, config.train, method, session)
    model = _trained_model(model_spec, maps, graph, state)
    facts = _facts(state, settings, model, model_spec) | {
        "compressed": "in training" if spec.reads_communities or spec.sized else None,
        **hashes,
    }
    if spec.trains_full_soft:
        model, model_spec = summed(model, model_spec)
        for side, bucket_map in zip(SIDES, map(full_map, graph.shape), strict=True):
            bucket_map.save(out / f"{side}.npz")
    save_model(model, model_spec, out)
    history = {"epochs": state["history"], "best_epoch": state["best_epoch"], "resumed": state["resumed"]}
    write_json_atomic(out / "history.json", {**history, "facts": facts})
    return facts


def _trained_model(spec: ModelSpec, maps: Maps, graph: csr_array, state: Mapping[str, Any]) -> RetrievalModel:
    """The model with its best weights, the OOV rows filled."""
    model = spec.build(*maps, graph).eval()
    model.load_state_dict(state["best"])
    for axis, embedding in ((1, model.user_embedding), (0, model.item_embedding)):
        embedding.fill_oov(torch.from_numpy(np.asarray(graph.sum(axis=axis), np.float32).ravel()))
    return model


def _facts(
    state: Mapping[str, Any], settings: RetrievalSettings, model: RetrievalModel, spec: ModelSpec
) -> dict[str, Any]:
    """What a training was, and what came of it."""
    best = state["best_score"]
    return {
        "epochs": state["epoch"],
        "best_epoch": state["best_epoch"],
        f"validation_{SCORE}": best if math.isfinite(best) else None,
        "item_bias": spec.item_bias,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "training_bytes": training_bytes(model),
        "training_bytes_measured": state["training_bytes"],
    }


def _settings_used(settings: RetrievalSettings, model: ModelSpec, method: ResolvedMethod) -> dict[str, Any]:
    """What a training used for further settings that have defaults of the method, the model or the log, by dotted key."""
    loss = settings.loss
    return {
        **{f"train.{name}": getattr(loss, name) for name in USED_OF_LOSS.get(loss.name, ())},
        "train.batch_size": settings.batch_size or 0,
        "train.cosine": model.cosine,
        "map.item_bias": model.item_bias,
        "map.indices_per_id": method.indices_per_id,
    }


def fit_settings(train: TrainConfig, method: Method, n_rows: int, size: GraphSize) -> RetrievalSettings:
    """The settings of a training, every default decided by the method, by the model with its loss, and by the log.

    Args:
        n_rows: of the tables.
        size: of the train graph.
    """
    preset = preset_of(train).fitted(size.n_edges, is_dense=size.is_dense)
    fits, own = fits_the_log(train), default_settings(train, method)
    default_epochs = fitted_epochs(preset.epochs, size.n_edges) if fits else preset.epochs
    epochs = default_epochs if train.epochs is None else train.epochs
    batch_size = (preset.batch_size if train.batch_size is None else train.batch_size) or None
    default_decay = fitted_decay(own["train.l2_total"], size.n_edges) if fits else own["train.l2_total"]
    l2_total = default_decay if train.l2_total is None else train.l2_total
    loss = loss_settings(train, size)
    n_steps = math.ceil(size.n_edges / batch_size) if batch_size else 1
    cost = interaction_cost(train, loss.negatives, batch_size, n_steps)
    interval = evaluation_interval(train, size, cost, epochs, preset.evaluations)
    eval_every = interval if train.eval_every is None else train.eval_every
    return RetrievalSettings(
        lr=own["train.lr"] if train.lr is None else train.lr,
        weight_decay=l2_total / n_rows if train.weight_decay is None else train.weight_decay,
        epochs=epochs,
        eval_every=eval_every,
        patience=patience(epochs, eval_every) if train.patience is None else train.patience,
        batch_size=batch_size,
        seed=train.seed,
        schedule=train.schedule,
        loss=loss,
        amp=train.amp,
        compile=train.compile,
        sparse_gradients=train.sparse_gradients,
    )


def loss_settings(train: TrainConfig, size: GraphSize) -> LossSettings:
    """The settings of the loss, every default decided by the model with its loss, and by the size of the train graph."""
    preset = preset_of(train).fitted(size.n_edges, is_dense=size.is_dense)
    return LossSettings(
        name=train.loss,
        gamma=default_gamma(2 * size.n_edges / size.n_ids) if train.gamma is None else train.gamma,
        unobserved_weight=train.unobserved_weight,
        temperature=preset.temperature if train.temperature is None else train.temperature,
        negatives=preset.negatives if train.negatives is None else train.negatives,
        negative_weight=preset.negative_weight if train.negative_weight is None else train.negative_weight,
        margin=train.margin,
        dropout=preset.dropout if train.dropout is None else train.dropout,
        mask_same_row=train.mask_same_row,
    )


def model_spec_of(train: TrainConfig, item_bias: bool) -> ModelSpec:
    """The model of a training, before it is made."""
    return ModelSpec(
        train.model,
        train.dim,
        item_bias,
        train.n_layers,
        train.seed,
        cosine=train.scores_cosines,
        std=preset_of(train).std if train.initial_std is None else train.initial_std,
    )


def trained_spec(config: RunConfig, resolved: ResolvedMethod) -> ModelSpec:
    """The model that a method of a run trains; what it stores may be another one."""
    spec = model_spec_of(config.train, resolved.item_bias)
    return replace(spec, dim=resolved.dim or spec.dim, embedding=resolved.embedding)


def fit_task(job: dict[str, Any], device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """What each worker does: load, and fit (see ``pipeline.training``)."""
    folder, settings, workers = Path(job["folder"]), job["settings"], options["workers"]
    graph = load_interactions(Path(job["ingest"]), job["model"].parts)
    maps = BucketMap.load(folder / "users.npz"), BucketMap.load(folder / "items.npz")
    model = job["model"].build(*maps, graph)
    if isinstance(model, LightGCN) and shards_graph(job["propagation"], graph.nnz, workers.size):
        model.shard(workers)
    model = model.to(device)
    validate = None
    if settings.last_epoch is None:
        validation = ShardedCsr.open(Path(job["ingest"]) / "validation").load()
        if validation.nnz:
            validate = _validation(graph, validation, job["eval_users"], settings.seed, workers)
    kind, power = job["sampler"]
    pairs = TrainingPairs.of(graph, NegativeSampler(graph, kind, power=power, device=device))
    return fit_retrieval(model, pairs, settings, validate, **options)


def shards_graph(propagation: str, n_edges: int, n_workers: int) -> bool:
    """Whether workers share LightGCN's graph: as told, and by itself from SHARDED_EDGES on, where there are several."""
    return n_workers > 1 and (propagation == "sharded" or (propagation == "auto" and n_edges >= SHARDED_EDGES))


def _validation(
    seen: csr_array, relevant: csr_array, n_users: int, seed: int, workers: Workers = Workers()
) -> Callable[[RetrievalModel], dict[str, float]]:
    """Mean capped recall and NDCG over users with held-out items, ``n_users`` of them drawn once where there are more (0: all).

    Every worker ranks a share of the users; the means are over all of them, in their order, so that they are those of one worker.
    """
    users = np.flatnonzero(np.diff(relevant.indptr))
    if 0 < n_users < len(users):
        users = np.sort(np.random.default_rng(seed).choice(users, n_users, replace=False))

    def validate(model: RetrievalModel) -> dict[str, float]:
        own = users[workers.share(len(users))]
        ranked, wanted = rank_users(model, own, seen, K), relevant[own]
        parts = workers.gather_objects((capped_recall_at_k(ranked, wanted), ndcg_at_k(ranked, wanted)))
        figures = np.empty((2, len(users)))
        for rank, part in enumerate(parts):
            figures[:, rank :: workers.size] = part
        return {SCORE: float(figures[0].mean()), f"ndcg@{K}": float(figures[1].mean())}

    return validate
