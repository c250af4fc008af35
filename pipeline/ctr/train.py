"""The train stage of CTR: bucket maps of all columns, then the loop of ``pipeline.training.loop``.

The epoch that is kept has the best AUC, or the least log loss, of the validation rows. Files: see ``pipeline.ctr.weights``, and
``history.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.models.ctr import CtrModel, compressed_columns
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.residual import ResidualEmbedding
from pipeline.ctr.calibration import calibrate
from pipeline.ctr.cluster import clustering_labels
from pipeline.ctr.data import Features, JoinedParts, Part, batch_of
from pipeline.ctr.defaults import keeps_every_row
from pipeline.ctr.derived import derive_ctr
from pipeline.ctr.evaluate import measure, predict
from pipeline.ctr.method_maps import FOLDS, write_method_maps
from pipeline.ctr.method_spec import method_spec
from pipeline.ctr.models import seldom_read
from pipeline.ctr.settings import ctr_settings
from pipeline.ctr.stored_otherwise import with_embeddings
from pipeline.ctr.weights import Mixture, load_folds, load_maps, save_ctr, save_maps, save_mixtures
from pipeline.maps.methods import METHODS
from pipeline.storage.atomic import write_json_atomic
from pipeline.task import TRAIN_PARTS, StageContext
from pipeline.training.examples import IN_MEMORY_BYTES, StreamedExamples
from pipeline.training.job import TrainingSession, run_job
from pipeline.training.loop import FitSettings, LossOf, Objective, fit
from pipeline.training.memory import training_bytes
from pipeline.training.resolved import resolved_settings

# The metric that the loop maximises, by ``train.score``.
SCORES = {"auc": "auc", "log_loss": "negative_log_loss"}


def train_ctr(context: StageContext, method: str, out: Path, session: TrainingSession) -> dict[str, Any]:
    """Make the maps of a method, train, and write the files into ``out``. ``session`` says where it trains.

    Returns: as :func:`fit_ctr`.

    Raises:
        DataError: training failed; the message says why.
    """
    if (trained_as := METHODS[method].trained_as) is not None:
        return derive_ctr(context, method, context.method_dir(trained_as), out)
    return fit_ctr(context, method, TRAIN_PARTS, out, session)


def fit_ctr(
    context: StageContext,
    method: str,
    parts: tuple[str, ...],
    out: Path,
    session: TrainingSession,
    chosen: Path | None = None,
) -> dict[str, Any]:
    """Train a method on some parts of the log. Sizes and settings are those of the train part, whatever the parts are.

    Args:
        parts: of the log. The maps are made of the communities of the train part and of the positive samples of these parts.
        chosen: folder of the training whose epochs were chosen: train as many without validation; None: with the validation rows deciding.

    Returns: epochs trained, best epoch, its ``validation_auc`` and ``validation_log_loss`` before calibration (None without validation
        rows), the calibration, settings that were defaults, and the maps' hashes.
    """
    config, features = context.config, Features.open(context.ingest_dir)
    write_method_maps(context, method, parts, out)
    maps = load_maps(out, features)
    spec = method_spec(config, features, method, clustering_labels(context.cluster_dir))
    id_scalars = spec.id_bias and bool(compressed_columns(spec, maps, len(features.multi_valued)))
    settings = ctr_settings(config, len(features.part("train")), id_scalars=id_scalars)
    further = {"train.batch_size": settings.batch_size, "train.dropout": spec.dropout, "map.item_bias": spec.id_bias}
    last_epoch = (
        None if chosen is None else json.loads((chosen / "history.json").read_text(encoding="utf-8"))["best_epoch"]
    )
    settings = resolved_settings(config, settings, further, session.tracker, last_epoch)
    hashes = {
        f"bucket_map_hash.{column.name}": bucket_map.content_hash
        for column, bucket_map in zip(features.all_columns, maps, strict=True)
        if not bucket_map.identity
    }
    session.tracker.set_tags({f"graphhash.{key}": value for key, value in hashes.items()})
    job = {
        "task": fit_ctr_task,
        "folder": str(out.absolute()),
        "ingest": str(context.ingest_dir.absolute()),
        "parts": parts,
        "spec": spec,
        "settings": settings,
        "score": SCORES[config.train.score],
    }
    # The job reads them from their files: a large log's maps are not held twice.
    del maps
    state = run_job(job, config.train, method, session)
    for name in ("model", "optimizer"):
        state.pop(name, None)
    maps = load_maps(out, features)
    model = spec.build(maps, len(features.dense), len(features.multi_valued))
    model.load_state_dict(state.pop("best"))
    is_whole = keeps_every_row(method) and not METHODS[method].sized
    facts = _facts(state, settings, model, out) | {"compressed": None if is_whole else "in training"} | hashes
    model.fill_oov([torch.from_numpy(features.counts(column).copy()) for column in features.all_columns])
    if METHODS[method].embedding == "residual":
        # The mixtures and the rows beside them are trained apart, and stored as their sums. Updates mix rows for new values.
        save_mixtures(_mixtures(model, maps), out)
        model, maps = with_embeddings(model), [full_map(column.n_ids) for column in features.all_columns]
        save_maps(maps, out)
    facts |= calibrate(model, config, features, chosen)
    save_ctr(model, out)
    write_json_atomic(
        out / "history.json", {"epochs": state["history"], "best_epoch": state["best_epoch"], "facts": facts}
    )
    return facts


def _facts(state: Mapping[str, Any], settings: FitSettings, model: CtrModel, out: Path) -> dict[str, Any]:
    """What a training was, what came of it, and the bytes that it held; the maps by folds in ``out`` are removed."""
    if (out / FOLDS).is_dir():
        model.use_folds(load_folds(out / FOLDS)[0])
    held = training_bytes(model)
    for embedding in model.bucket_embeddings():
        # Their files are mapped.
        embedding.folds = None
    shutil.rmtree(out / FOLDS, ignore_errors=True)
    kept: dict[str, Any] = next((entry for entry in state["history"] if entry["epoch"] == state["best_epoch"]), {})
    return {
        "epochs": state["epoch"],
        "best_epoch": state["best_epoch"],
        "validation_auc": kept.get("auc"),
        "validation_log_loss": kept.get("log_loss"),
        "item_bias": model.bias is not None,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "training_bytes": held,
        "training_bytes_measured": state["training_bytes"],
    }


def _mixtures(model: CtrModel, maps: Sequence[BucketMap]) -> dict[int, Mixture]:
    """What the vectors of columns are mixed from, by column."""
    return {
        number: Mixture(embedding.mixture.table.detach().numpy(), maps[number].content_hash)
        for number, embedding in enumerate(model.embeddings)
        if isinstance(embedding, ResidualEmbedding)
    }


def ctr_loss(n_multi_valued: int) -> LossOf:
    """Binary cross-entropy of a batch of `pipeline.ctr.data.Part.tensors`, with or without folds; dropout draws from the generator."""

    def loss_of(model: nn.Module, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        assert isinstance(model, CtrModel)
        if model.spec.dropout:
            model.use_generator(generator)
        return model.loss(batch_of(batch, n_multi_valued), batch[0])

    return loss_of


def seldom_tables(model: CtrModel, batch_size: int | None, features: Features) -> list[BucketEmbedding]:
    """Embeddings that ``pipeline.training.loop.fit`` may update lazily; none where a step reads all rows."""
    return (
        []
        if batch_size is None
        else seldom_read(model, batch_size, tuple(feature.width or 0 for feature in features.multi_valued))
    )


def validated(model: CtrModel, part: Part) -> dict[str, float]:
    """The measures of SCORES on the rows of a part, which holds both labels."""
    measured = measure(part, predict(model, part))
    auc, log_loss = measured["auc"], measured["log_loss"]
    assert auc is not None
    assert log_loss is not None
    return {"auc": auc, "log_loss": log_loss, "negative_log_loss": -log_loss}


def training_examples(
    rows: JoinedParts, fold: NDArray[np.uint8] | None, *, is_whole: bool = False
) -> list[Tensor] | StreamedExamples:
    """What :func:`fit` takes batches of: tensors of a log that fits into IN_MEMORY_BYTES, else the arrays on disk.

    Args:
        fold: of every row, shape (n,), the last array of a batch; None: there are no cross-fitted maps.
        is_whole: a step takes all rows, which are then in memory.
    """
    if is_whole or rows.nbytes <= IN_MEMORY_BYTES:
        return rows.tensors() + ([] if fold is None else [torch.from_numpy(fold)])
    pieces = rows.pieces
    if fold is not None:
        ends = np.cumsum([len(part) for part in rows.parts])
        pieces.append(np.split(fold, ends[:-1]))
    return StreamedExamples(pieces)


def fit_ctr_task(job: dict[str, Any], device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """What each worker does: load, and fit (see ``pipeline.training``)."""
    features, settings = Features.open(Path(job["ingest"])), job["settings"]
    model = (
        job["spec"]
        .build(load_maps(Path(job["folder"]), features), len(features.dense), len(features.multi_valued))
        .to(device)
    )
    fold = None
    if (folder := Path(job["folder"]) / FOLDS).is_dir():
        folded, fold = load_folds(folder)
        model.use_folds(folded)
    examples = training_examples(features.rows_of(job["parts"]), fold, is_whole=settings.batch_size is None)
    validate = None
    if settings.last_epoch is None and len(validation := features.part("validation")):
        validate = partial(validated, part=validation)
    seldom = seldom_tables(model, settings.batch_size, features)
    loss_of = ctr_loss(len(features.multi_valued))
    tables = list(model.fields.parameters())
    objective = Objective(loss_of, job["score"], validate, seldom, model.before_epoch, tables)
    return fit(model, examples, settings, objective, **options)
