"""``graphhash update``: place the users and items that a later log brings, and write the bundle anew, without training.

What is trained stays as it is: tables, the rows of known ids and their biases. A new id that met ids with a place gets one, by the rule of
the run's method (``pipeline.updates.placers``); any other stays unknown, reads the fallback, and is looked at again by the next update. What is
placed is kept in ``RUN/update/<method>`` (``pipeline.retrieval.placed``), where the next update, ``graphhash recommend --exclude-seen`` and the export of
every later ``graphhash run`` find it, until the method is trained anew. MLflow keeps the bundle of the training.

Interactions between known ids change no map. They are counted, and ``--exclude-seen`` leaves them out from then on. A pair that was seen
before counts once: the same log twice changes nothing.

The state is written first, whole or not at all, and then the bundle: after a crash between the two, the same command writes the bundle.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.community_maps import SIDES
from graphhash.maps.placement import mean_scores, solved_vectors, typical_bias, with_own_rows, without_places
from graphhash.models.mf import MatrixFactorization
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError, RunFolderError
from pipeline.maps.methods import Inputs
from pipeline.retrieval.budget import hops_of
from pipeline.retrieval.cluster import load_labels
from pipeline.retrieval.placed import Placed, belongs_to, placed_dir
from pipeline.retrieval.weights import load_method, with_more_ids
from pipeline.runs.folder import RunFolder, StageResult
from pipeline.runs.plan import check_methods, export_step, plan
from pipeline.runs.run import export_bundle
from pipeline.updates.log import NewLog, read_new_log
from pipeline.updates.placers import PLACERS, Places, Placing

CONFIG_FILE = "config.toml"
# Rows per trained user from which on new users get rows of their own.
OWN_ROWS = 0.8


@dataclass(frozen=True, eq=False)
class Trained:
    """A run's method as it was trained, and the stages that made it.

    Args:
        config: of the run.
        folder: the run's, locked.
        stages: by name: ingest, cluster, and the method's training and evaluation, each whole and of these settings.
        inputs: what the method's maps were made from.
        model, maps: as trained; maps by side.
    """

    config: RunConfig
    method: str
    folder: RunFolder
    stages: dict[str, StageResult]
    inputs: Inputs
    model: MatrixFactorization
    maps: dict[str, BucketMap]

    @property
    def train_key(self) -> str:
        return self.stages[f"train {self.method}"].key


def update(
    run: Path,
    log: str,
    *,
    method: str | None = None,
    data: dict[str, Any] | None = None,
    refit: tuple[float, int] | None = None,
) -> dict[str, Any]:
    """Place the new ids of a log.

    Args:
        run: a run folder with an evaluated method.
        log: a file, a folder or a glob.
        method: whose bundle is written; None: the run's first.
        data: settings of ``pipeline.config.run_config.DataConfig`` that differ for this log.
        refit: share of the new users' interactions, and seed, for ``pipeline.updates.refit``; None: no comparison.

    Returns: ``method``, ``how``, ``users`` and ``items`` (each ``new``, ``placed``, ``fallback``), ``n_interactions`` (distinct pairs),
    ``n_used`` (with a new end, and a place at both), ``n_unused`` (with a new end, and without), ``n_known`` (between known ids),
    ``n_rejected`` (rows), ``log_sha256``, ``bundle`` ("written" or "unchanged"), ``seconds`` and, where asked for, ``refit`` (None where
    no new user has an interaction to spare).

    Raises:
        DataError, ConfigError, RunFolderError, BundleError: each with one line for the user; the bundle is as it was.
    """
    started = time.perf_counter()
    if not (run / CONFIG_FILE).is_file():
        raise RunFolderError(
            f"{run}: no run is there ({CONFIG_FILE} is missing); make it with 'graphhash run --out {run}'"
        )
    config = RunConfig.load(run / CONFIG_FILE, **{"run.out": str(run)})
    with RunFolder(run) as folder:
        trained = open_trained(config, method or config.run.methods[0], folder)
        known = open_placed(trained)
        new = read_new_log(log, dataclasses.replace(config.data, **(data or {})), known.vocabularies)
        compared = {}
        if refit is not None:
            from pipeline.updates.refit import compare_with_refit

            compared["refit"] = compare_with_refit(trained, known, new, share=refit[0], seed=refit[1])
        now, facts = place(trained, known, new)
        how = PLACERS[trained.method].how
        if has_own_rows(trained):
            how += "; users in rows of their own, solved from what they used"
        result = {"method": trained.method, "how": how, **facts, "log_sha256": new.sha256}
        if now.seen.nnz > known.seen.nnz:
            now = dataclasses.replace(now, updates=(*known.updates, result))
            _save(trained, now)
        bundle = "written" if _export(trained, now) else "unchanged"
    return result | {"bundle": bundle} | compared | {"seconds": round(time.perf_counter() - started, 2)}


def open_trained(config: RunConfig, method: str, folder: RunFolder) -> Trained:
    """The method as trained, if everything it came from is still as it was.

    Raises:
        ConfigError: no such method, or a model that cannot place ids.
        RunFolderError: a stage is missing, or was made with other settings than the folder's.
    """
    check_methods([method])
    if config.train.model != "mf":
        raise ConfigError(
            f"train.model={config.train.model} cannot place new ids without training; run 'graphhash run' on all data, or train with train.model=mf"
        )
    if method not in config.run.methods:
        raise RunFolderError(
            f"{folder.path}: method {method!r} is none of the run's ({', '.join(config.run.methods)}); name one of these, "
            f"or run 'graphhash run --out {folder.path} --method {method}' first"
        )
    names, stages = ("ingest", "cluster", f"train {method}", f"evaluate {method}"), {}
    ingest = folder.current("ingest")
    steps = plan(config, "evaluate", ingest.inputs[0] if ingest and ingest.inputs else "")
    for name in names:
        stage = folder.current(name)
        if stage is None or stage.key != steps[name].key:
            why = "is missing or damaged" if stage is None else "was made with other settings than the folder's"
            raise RunFolderError(
                f"{folder.path}: the stage {name!r} {why}; run 'graphhash run --out {folder.path}' first"
            )
        stages[name] = stage
    labels = load_labels(
        folder.path / "cluster", json.loads((folder.path / "cluster" / "cluster.json").read_text(encoding="utf-8"))
    )
    graph = ShardedCsr.open(folder.path / "ingest" / "train").load()
    model, *maps = load_method(folder.path / "methods" / method, folder.path / "ingest")
    inputs = Inputs(
        graph, labels, maps[0].indices_per_id, hops_of(config, labels.rows, *graph.shape, graph.nnz), config.map.seed
    )
    return Trained(config, method, folder, stages, inputs, model, dict(zip(SIDES, maps, strict=True)))


def open_placed(trained: Trained) -> Placed:
    """The ids placed so far; none where the updates there belong to another training."""
    run, method = trained.folder.path, trained.method
    if belongs_to(run, method, trained.train_key):
        return Placed.load(placed_dir(run, method))
    return Placed.none(run / "ingest", trained.maps, PLACERS[trained.method].n_levels, trained.model.user_embedding.dim)


def place(trained: Trained, known: Placed, new: NewLog) -> tuple[Placed, dict[str, Any]]:
    """The run with those new ids that have a place, and the figures of the report."""
    interactions = with_unseen(known.seen, new.graph)
    places = find_places(trained, known, interactions)
    has_place = places.has_place
    kept = {side: np.concatenate([np.ones(new.n_known[side], np.bool_), has_place[side]]) for side in SIDES}
    n_trained = known.n_trained
    now = Placed(
        {side: ids.only(kept[side]) if not kept[side].all() else ids for side, ids in new.vocabularies.items()},
        {side: without_places(places.maps[side], new.n_known[side], has_place[side]) for side in SIDES},
        {side: places.labels[side][:, kept[side][n_trained[side] :]] for side in SIDES},
        np.concatenate([known.item_bias, new_biases(trained, interactions, new.n_known["items"])[has_place["items"]]]),
        user_rows(known, places),
        csr_array(interactions[kept["users"]][:, kept["items"]]),
        known.updates,
    )
    users, items = new.graph.tocoo().coords
    is_known = (users < new.n_known["users"]) & (items < new.n_known["items"])
    is_used = ~is_known & kept["users"][users] & kept["items"][items]
    facts: dict[str, Any] = {
        side: {"new": new.n_new[side], "placed": int(has_place[side].sum()), "fallback": int((~has_place[side]).sum())}
        for side in SIDES
    }
    return now, facts | {
        "n_interactions": len(users),
        "n_used": int(is_used.sum()),
        "n_unused": int((~is_known & ~is_used).sum()),
        "n_known": int(is_known.sum()),
        "n_rejected": new.n_rejected,
    }


def find_places(trained: Trained, known: Placed, interactions: csr_array) -> Places:
    """Where the ids are that ``interactions``, of all ids, have beyond the known ones."""
    places = PLACERS[trained.method].place(
        Placing(trained.inputs, untrained(interactions, known), known.maps, known.labels)
    )
    return _with_solved_users(trained, known, interactions, places) if has_own_rows(trained) else places


def has_own_rows(trained: Trained) -> bool:
    """Whether nearly every trained user reads a row of its own before those of others."""
    users = trained.maps["users"]
    return trained.method == "soft" and trained.inputs.hops == "2" and users.n_buckets > OWN_ROWS * users.n_ids


def user_rows(known: Placed, places: Places) -> NDArray[np.float32]:
    """Rows of all placed users who have their own: those of earlier updates, then the new ones."""
    rows = [part for part in (known.user_rows, places.user_rows) if part is not None and len(part)]
    return np.concatenate(rows) if rows else known.user_rows


def _with_solved_users(trained: Trained, known: Placed, interactions: csr_array, places: Places) -> Places:
    """With a row for every new user that has a place, solved from what it used of items that have one."""
    n_known, has_place = {side: known.maps[side].n_ids for side in SIDES}, places.has_place["users"]
    if not has_place.any():
        return places
    bias = np.concatenate([known.item_bias, new_biases(trained, interactions, n_known["items"])])
    model = with_more_ids(trained.model, places.maps, bias, known.user_rows)
    with torch.no_grad():
        items = model.item_embedding.all().numpy()
        means = mean_scores(
            trained.inputs.graph, lambda *pair: model(*(torch.from_numpy(ids.astype(np.int64)) for ids in pair)).numpy()
        )
    is_there = np.concatenate([np.ones(n_known["items"], np.bool_), places.has_place["items"]])
    used = csr_array(interactions[n_known["users"] + np.flatnonzero(has_place)][:, is_there])
    biases = None if model.item_bias is None else model.item_bias.detach().numpy()[is_there]
    rows = solved_vectors(used, items[is_there], biases, *means)
    maps = places.maps | {"users": with_own_rows(places.maps["users"], n_known["users"], has_place)}
    return dataclasses.replace(places, maps=maps, user_rows=rows)


def new_biases(trained: Trained, interactions: csr_array, n_known: int) -> NDArray[np.float32]:
    """Biases of the items after the first ``n_known``; zeros where the model has none."""
    degrees = np.asarray(interactions.sum(axis=0), np.float64).ravel()[n_known:]
    if trained.model.item_bias is None:
        return np.zeros(len(degrees), np.float32)
    of_trained = np.asarray(trained.inputs.degrees[1], np.float64)
    return typical_bias(of_trained, trained.model.item_bias.detach().cpu().numpy(), degrees)


def with_unseen(seen: csr_array, graph: csr_array) -> csr_array:
    """Interactions seen before, and those of ``graph`` that are new, in the shape of the latter, which has more ids."""
    users, items = seen.tocoo().coords
    known = csr_array((np.ones(len(users), np.float32), (users, items)), shape=graph.shape)
    fresh = csr_array(graph - graph * known)
    fresh.eliminate_zeros()
    both = csr_array((seen.data, (users, items)), shape=graph.shape) + fresh
    both.sort_indices()
    return csr_array(both, dtype=np.float32)


def untrained(interactions: csr_array, known: Placed) -> csr_array:
    """Those with at least one end that was placed, or is to be, and not trained."""
    edges = interactions.tocoo()
    users, items = edges.coords
    kept = (users >= known.n_trained["users"]) | (items >= known.n_trained["items"])
    return csr_array((edges.data[kept], (users[kept], items[kept])), shape=edges.shape)


def _save(trained: Trained, now: Placed) -> None:
    """Replace RUN/update/METHOD, as a stage that is never skipped: what is placed depends on what was placed before."""

    def compute(out: Path) -> dict[str, Any]:
        now.save(out, trained.train_key, trained.config.data.shards)
        return now.updates[-1]

    logs = [entry["log_sha256"] for entry in now.updates]
    folder = placed_dir(trained.folder.path, trained.method).relative_to(trained.folder.path)
    trained.folder.stage(f"update {trained.method}", {}, (trained.train_key, *logs), str(folder), compute)


def _export(trained: Trained, now: Placed) -> bool:
    """Write the bundle, unless it is the one of these ids; whether it was written."""
    if now.id is None:
        return False
    method, run = trained.method, trained.folder.path
    evaluated = trained.stages[f"evaluate {method}"]
    step = export_step(trained.config, method, trained.train_key, evaluated.key)
    run_id = trained.stages[f"train {method}"].result.get("mlflow_run_id")
    metrics = {"method": method, **evaluated.result, "mlflow_run_id": run_id}

    def compute(out: Path) -> dict[str, Any]:
        return export_bundle(trained.config, run, run / "methods" / method, out, metrics, trained.train_key)

    return not trained.folder.stage(step.name, step.settings, step.inputs, "bundle", compute).skipped
