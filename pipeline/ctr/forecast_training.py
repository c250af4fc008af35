"""What a CTR training holds and how fast it steps, by the training of a part of the log that is stopped after some steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from graphhash.models.ctr import CtrModel, compressed_columns
from graphhash.models.ctr_fields import TableSlice
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.embedding import BucketEmbedding
from pipeline.ctr.cluster import clustering_labels
from pipeline.ctr.data import Features, Part
from pipeline.ctr.evaluate import BLOCK, predict
from pipeline.ctr.method_maps import FOLDS, write_method_maps
from pipeline.ctr.method_spec import method_spec
from pipeline.ctr.settings import ctr_settings
from pipeline.ctr.train import SCORES, fit_ctr_task
from pipeline.ctr.weights import load_folds, load_maps
from pipeline.task import TRAIN_PARTS, StageContext
from pipeline.training.examples import BLOCK_ROWS, BUFFER_BLOCKS, IN_MEMORY_BYTES
from pipeline.training.loop import FitSettings
from pipeline.training.memory import peak_mib, training_parts
from pipeline.training.seldom import SELDOM
from pipeline.training.step_clock import StepClock

MIB = 2**20
# Buffers of maps that do not grow with the ids.
OF_ANY_SIZE = ("codebook", "ranks")


@dataclass(frozen=True)
class MeasuredTraining:
    """A training of the whole log, by that of a part.

    Args:
        settings: of the whole.
        parts: bytes that it holds, by part, as :func:`pipeline.training.memory.training_parts`.
        maps: seconds to make the maps.
        step: seconds of a step.
        score: seconds to predict a row.
        peak_bytes: that the process holds at its most beyond what it held before.
    """

    settings: FitSettings
    parts: dict[str, int]
    maps: float
    step: float
    score: float
    peak_bytes: int


@dataclass(frozen=True)
class Growth:
    """How many times as much there is of each column in the whole log as in the part.

    Args:
        ids: and with them rows of full tables and of maps.
        rows: of tables of compressed columns.
    """

    ids: Sequence[float]
    rows: Sequence[float]


def measure_training(context: StageContext, method: str, out: Path, growth: Growth, n_train: int) -> MeasuredTraining:
    """Train for a moment on a part of the log.

    Args:
        context: of the part, ingested and clustered.
        out: an empty folder.
        n_train: training rows of the whole log.

    Raises:
        DataError: the part has no maps, or the budget is too small.
    """
    config, features = context.config, Features.open(context.ingest_dir)
    rows = features.part("train")
    times = n_train / len(rows)
    before, started = peak_mib(reset=True), time.perf_counter()
    write_method_maps(context, method, TRAIN_PARTS, out)
    maps = load_maps(out, features)
    made = time.perf_counter() - started
    n_multi_valued = len(features.multi_valued)
    spec = method_spec(config, features, method, clustering_labels(context.cluster_dir))
    id_scalars = spec.id_bias and bool(compressed_columns(spec, maps, n_multi_valued))
    settings = ctr_settings(config, n_train, id_scalars=id_scalars)
    model = spec.build(maps, len(features.dense), n_multi_valued)
    if (out / FOLDS).is_dir():
        model.use_folds(load_folds(out / FOLDS)[0])
    parts = grown_parts(model, growth)
    clock = StepClock()
    # A low rate keeps the loss finite, however long the steps go on.
    endless = replace(settings, epochs=10**9, eval_every=10**9, lr=1e-4, schedule="constant")
    job = {"folder": str(out), "ingest": str(context.ingest_dir), "parts": TRAIN_PARTS, "spec": spec}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fit_ctr_task(
        job | {"settings": endless, "score": SCORES[config.train.score]}, device, {"callbacks": clock.callbacks()}
    )
    held = (peak_mib() - before) * MIB
    of_part = sum(training_parts(model).values())
    batch = settings.batch_size
    step = clock.step * (times if batch is None else batch / min(batch, len(rows)))
    same = [1.0] * len(maps)
    step += clock.optimizer * (_updated(model, growth, batch) / _updated(model, Growth(same, same), batch) - 1)
    examples = _example_bytes(rows, len(rows))
    peak = max(held, of_part + examples) + sum(parts.values()) - of_part + _example_bytes(rows, n_train) - examples
    return MeasuredTraining(settings, parts, made * times, step, _seconds_of_row(model, rows), round(peak))


def grown_parts(model: CtrModel, growth: Growth) -> dict[str, int]:
    """Bytes that a training holds of a model whose columns have more ids."""
    parts = training_parts(model)
    more = {"parameters": 0.0, "buffers": 0.0}
    for column, held in _by_column(model):
        numbers, n_bytes = _sizes(held)
        more["parameters"] += numbers * (_rows_growth(growth, column, held) - 1)
        more["buffers"] += n_bytes * (growth.ids[column] - 1)
    for column, embedding in _embeddings(model):
        if isinstance(embedding, BucketEmbedding):
            more["buffers"] += _wider_rows(embedding, growth.rows[column]) * growth.ids[column]
    for name, each in (("tables", 4), ("gradients", 4), ("optimizer", 8)):
        parts[name] += round(each * more["parameters"])
    parts["maps"] += round(more["buffers"])
    return parts


# Parameters and buffers, the share of them that is a column's, and whether the rows are those of ids.
Held = tuple[Sequence[Tensor], Sequence[Tensor], float, bool]


def _embeddings(model: CtrModel) -> Iterator[tuple[int, CompressedEmbedding | TableSlice]]:
    """All embeddings, with the columns that they are of."""
    for part, numbers in (
        (model.fields, None),
        (model.wide, None),
        (model.bias, model.bias_columns.tolist()),
    ):
        if part is not None:
            for place, embedding in enumerate(part.columns):
                yield place if numbers is None else numbers[place], embedding


def _by_column(model: CtrModel) -> Iterator[tuple[int, Held]]:
    """What each column holds, every tensor once."""
    seen: set[int] = set()
    for column, embedding in _embeddings(model):
        if isinstance(embedding, TableSlice):
            joint = embedding.joint
            share = (embedding.n_ids + 1) / len(joint.table)
            yield column, (list(joint.parameters()), list(joint.buffers()), share, True)
            continue
        parameters = [p for p in embedding.parameters() if id(p) not in seen]
        buffers = [b for name, b in embedding.named_buffers() if id(b) not in seen and not name.endswith(OF_ANY_SIZE)]
        seen |= {id(tensor) for tensor in (*parameters, *buffers)}
        # An embedding of another kind has sizes by the budget.
        is_full = isinstance(embedding, BucketEmbedding) and len(embedding.table) == embedding.n_ids + 1
        yield column, (parameters, buffers, 1.0, is_full)


def _wider_rows(embedding: BucketEmbedding, growth: float) -> int:
    """Bytes that the rows of a map take more when its table has ``growth`` times as many: beyond 65,536 they are of 32 bits."""
    if embedding.held_rows is None or not embedding.n_buckets <= 2**16 < embedding.n_buckets * growth:
        return 0
    return embedding.held_rows.nbytes + (0 if embedding.folds is None else embedding.folds.rows.nbytes)


def _sizes(held: Held) -> tuple[float, float]:
    """Numbers of the parameters, and bytes of the buffers."""
    parameters, buffers, share, _ = held
    return share * sum(p.numel() for p in parameters), share * sum(b.numel() * b.element_size() for b in buffers)


def _rows_growth(growth: Growth, column: int, held: Held) -> float:
    return growth.ids[column] if held[3] else growth.rows[column]


def _updated(model: CtrModel, growth: Growth, batch_size: int | None) -> float:
    """About how many numbers a step of the optimizer updates: all of a table, or where it is read seldom, the rows that are read."""
    total = 0.0
    for column, held in _by_column(model):
        numbers = _sizes(held)[0]
        n_rows = max([held[2] * len(p) for p in held[0]], default=0.0)
        n_read = n_rows if batch_size is None else batch_size * _indices(model, column)
        all_rows = numbers * _rows_growth(growth, column, held)
        seldom = n_read * SELDOM <= n_rows * _rows_growth(growth, column, held)
        total += min(all_rows, numbers * n_read / max(1.0, n_rows)) if seldom else all_rows
    return total + sum(p.numel() for p in model.head.parameters())


def _indices(model: CtrModel, column: int) -> int:
    """Table rows that an id of a column reads."""
    embedding = model.fields.columns[column]
    return embedding.indices_per_id if isinstance(embedding, BucketEmbedding) else 1


def _example_bytes(rows: Part, n: int) -> int:
    """Bytes of n rows in a training: all of them, or of a large log the buffers that are read ahead."""
    each = sum(array.nbytes for array in rows.arrays) // len(rows)
    return each * (n if each * n <= IN_MEMORY_BYTES else min(n, 3 * BUFFER_BLOCKS * BLOCK_ROWS))


def _seconds_of_row(model: CtrModel, rows: Part) -> float:
    """Seconds to predict a row."""
    some = Part(
        rows.labels[:BLOCK],
        rows.categorical[:BLOCK],
        rows.dense[:BLOCK],
        tuple(m[:BLOCK] for m in rows.multi_valued),
        None,
    )
    model.eval()
    predict(model, some)
    started = time.perf_counter()
    predict(model, some)
    return (time.perf_counter() - started) / len(some)
