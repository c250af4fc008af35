"""``graphhash update``: fold the new users and items of a later log into a run, and write the bundle anew, without training.

Folded-in ids (``pipeline.updates.fold_in``) are kept in ``RUN/update/<method>`` (``pipeline.retrieval.folded_in``) until the method is
trained anew. The next update, ``graphhash recommend --exclude-seen`` and the export of every later ``graphhash run`` read them there.
An id that stays unassigned is looked at again by the next update. MLflow keeps the bundle of the training.

Interactions between known ids change no map. They are counted, and ``--exclude-seen`` leaves them out from then on. A pair that was seen
before counts once: the same log twice changes nothing.

The folded-in ids are written first, whole or not at all, and then the bundle: after a crash between the two, the same command writes the
bundle.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from graphhash.graph.bipartite import SIDES
from graphhash.models.mf import MatrixFactorization
from pipeline.config.run_config import RunConfig
from pipeline.config.toml_file import CONFIG_FILE
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError, RunFolderError
from pipeline.maps.communities import load_communities
from pipeline.maps.methods import Inputs
from pipeline.retrieval.budget import GraphSize, resolve_method
from pipeline.retrieval.folded_in import FoldedIn, belongs_to, folded_in_dir
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.weights import load_method
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import check_methods
from pipeline.task import model_dir, model_parts, model_stage
from pipeline.updates.fold_in import FoldInCounts, Trained, fold_in
from pipeline.updates.log import read_new_log
from pipeline.updates.rules import RULES
from pipeline.updates.stages import checked_stages, write_bundle

if TYPE_CHECKING:
    from pipeline.updates.refit import Comparison
    from pipeline.updates.update_ctr import CtrUpdateResult


class UpdateEntry(FoldInCounts):
    """What an update did, as it is kept with the run and in the bundle's manifest. ``rule``: how new ids were assigned."""

    method: str
    rule: str
    log_sha256: str


class UpdateResult(UpdateEntry):
    """The figures of the command. ``refit``: where asked for; None where no new user has an interaction to spare."""

    bundle: Literal["written", "unchanged"]
    seconds: float
    refit: NotRequired[Comparison | None]


def update(
    run: Path,
    log: str,
    *,
    method: str | None = None,
    data: dict[str, Any] | None = None,
    refit: tuple[float, int] | None = None,
) -> UpdateResult | CtrUpdateResult:
    """Fold the new ids of a log into a run.

    Args:
        run: a run folder with an evaluated method.
        log: a file, a folder or a glob.
        method: whose bundle is written; None: the run's first.
        data: settings of ``pipeline.config.run_config.DataConfig`` that differ for this log.
        refit: share of the new users' interactions to hold out, and seed, for ``pipeline.updates.refit``; None: no comparison.

    Raises:
        DataError, ConfigError, RunFolderError, BundleError: each with one line for the user; the bundle is as it was.
    """
    started = time.perf_counter()
    if not (run / CONFIG_FILE).is_file():
        raise RunFolderError(
            f"{run}: no run is there ({CONFIG_FILE} is missing); make it with 'graphhash run --out {run}'"
        )
    place: dict[str, Any] = {"run.out": str(run)}
    config = RunConfig.load(run / CONFIG_FILE, **place)
    if config.run.task == "ctr":
        from pipeline.updates.update_ctr import update_ctr

        return update_ctr(config, log, method=method, data=data, refit=refit is not None)
    comparison: dict[Literal["refit"], Comparison | None] = {}
    with RunFolder(run) as folder:
        trained = open_trained(config, method or config.run.methods[0], folder)
        known = open_folded_in(trained)
        new = read_new_log(log, dataclasses.replace(config.data, **(data or {})), known.vocabularies)
        if refit is not None:
            from pipeline.updates.refit import compare_with_refit

            comparison["refit"] = compare_with_refit(trained, known, new, share=refit[0], seed=refit[1])
        now, counts = fold_in(trained, known, new)
        entry: UpdateEntry = {"method": trained.method, "rule": trained.rule, **counts, "log_sha256": new.sha256}
        if now.seen.nnz > known.seen.nnz:
            now = dataclasses.replace(now, updates=(*known.updates, dict(entry)))
            _save(trained, now)
        bundle: Literal["written", "unchanged"] = "unchanged"
        if now.id is not None and write_bundle(config, trained.method, folder, trained.stages):
            bundle = "written"
    result: UpdateResult = {**entry, "bundle": bundle, "seconds": round(time.perf_counter() - started, 2)}
    if "refit" in comparison:
        result["refit"] = comparison["refit"]
    return result


def open_trained(config: RunConfig, method: str, folder: RunFolder) -> Trained:
    """The method as trained, if all stages that it came from are intact and of the folder's settings.

    Raises:
        ConfigError: no such method, or a model without fold-in.
        RunFolderError: a stage is missing, or was made with other settings than the folder's.
    """
    check_methods([method])
    if config.train.model != "mf":
        raise ConfigError(
            f"train.model={config.train.model} cannot fold in new ids without training; run 'graphhash run' on all data, or train with "
            "train.model=mf"
        )
    if method not in RULES:
        raise ConfigError(
            f"method {method!r} has no rows that a new id could read; run 'graphhash run' on all data, or name one of {', '.join(RULES)}"
        )
    stages = checked_stages(config, method, folder)
    labels = load_communities(
        folder.path / "cluster", json.loads((folder.path / "cluster" / "cluster.json").read_text(encoding="utf-8"))
    )
    graph = load_interactions(folder.path / "ingest", model_parts(config))
    size = GraphSize.of_shards(ShardedCsr.open(folder.path / "ingest" / "train"))
    model, *maps = load_method(model_dir(config, folder.path, method), folder.path / "ingest")
    assert isinstance(model, MatrixFactorization), "train.model is mf"
    resolved = resolve_method(config, method, size, labels.rows)
    inputs = Inputs(graph, labels, maps[0].indices_per_id, resolved.hops, config.map.seed, n_rows=resolved.n_rows)
    return Trained(config, method, folder, stages, inputs, model, dict(zip(SIDES, maps, strict=True)))


def open_folded_in(trained: Trained) -> FoldedIn:
    """The ids folded in so far; none where the updates there belong to another training."""
    run, method = trained.folder.path, trained.method
    if belongs_to(run, method, trained.train_key):
        return FoldedIn.load(folded_in_dir(run, method))
    n_levels, dim = RULES[method].n_levels, trained.model.user_embedding.dim
    return FoldedIn.none(run / "ingest", trained.maps, trained.inputs.graph, n_levels, dim)


def _save(trained: Trained, now: FoldedIn) -> None:
    """Replace RUN/update/METHOD, as a stage that is never skipped: it depends on what was folded in before."""

    def compute(out: Path) -> dict[str, Any]:
        now.save(out, trained.train_key, trained.config.data.shards)
        return now.updates[-1]

    logs = [entry["log_sha256"] for entry in now.updates]
    folder = folded_in_dir(trained.folder.path, trained.method).relative_to(trained.folder.path)
    inputs = {model_stage(trained.config, trained.method): trained.train_key, "the logs": json.dumps(logs)}
    trained.folder.stage(f"update {trained.method}", {}, inputs, str(folder), compute)
