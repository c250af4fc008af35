"""Methods beside bucket maps in a CTR run: what is stored of one training, sizes at a number of bytes, and bundles."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from graphhash.errors import DataError
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import rounded
from graphhash.models.ctr_bytes import layer_bytes, store_rounded, stored_bytes
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.ctr.budget import full_bytes, precisions_of
from pipeline.ctr.cluster import cluster_ctr, clustering_labels
from pipeline.ctr.data import Features
from pipeline.ctr.defaults import kept_precision_of, precision_of
from pipeline.ctr.evaluate import evaluate_ctr, measure, predict
from pipeline.ctr.export import ExportOptions, export_ctr
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.method_spec import method_spec
from pipeline.ctr.stored_otherwise import all_vectors, with_embeddings
from pipeline.ctr.train import train_ctr
from pipeline.ctr.weights import load_ctr
from pipeline.errors import ConfigError
from pipeline.maps.methods import METHODS
from pipeline.runs.plan import check_methods, plan
from pipeline.task import StageContext
from pipeline.training.job import TrainingSession
from tests.helpers.ctr_log import columns, write_csv, write_schema
from tests.helpers.small_ctr import MODELS, export_small, small_ctr
from tests.helpers.trained import trained_once

STORED = [
    name
    for name, method in METHODS.items()
    if method.trained_as is not None and name != "full_float16" and method.task in (None, "ctr")
]
SIZED = ["cce", "cafe", "robe", "dhe", "full_pq", "full_opq", "full_small_dim", "full_soft_small_dim"]
RATIO, DIM = 0.4, 32


def settings_of(method, **settings) -> RunConfig:
    common = {
        "run.task": "ctr",
        "run.methods": (method,),
        "cluster.ratio": RATIO,
        "train.dim": DIM,
        "train.hidden": ("4",),
        "train.epochs": 4,
        "train.batch_size": 128,
        "map.indices_per_id": 4,
    }
    return RunConfig.from_flat(common | {key.replace("__", "."): value for key, value in settings.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of a small log, ingested and clustered, with `full` trained."""
    run = tmp_path_factory.mktemp("run")
    log = write_csv(run / "log.csv", columns(4000, n_users=300, n_items=200))
    for stage in ("ingest", "cluster"):
        (run / stage).mkdir()
    ingest_ctr(DataConfig(str(log), schema=write_schema(run)), run / "ingest")
    cluster_ctr(settings_of("soft", cluster__ratio=None, cluster__resolution=3.0), run / "ingest", run / "cluster")
    trained_in(run, "full")
    return run


def trained_in(run, method, **settings):
    """Train a method into the run folder, what it is made of before it; its facts."""

    def train(name, out):
        return train_ctr(StageContext(settings_of(name, **settings), run), name, out, TrainingSession())

    return trained_once(run, method, train)


def loaded(run, method):
    return load_ctr(run / "methods" / method, run / "ingest")


def needs_faiss(method):
    if METHODS[method].embedding in ("product", "cce"):
        pytest.importorskip("faiss")


@pytest.mark.parametrize("method", STORED)
def test_stored_full_tables_are_the_trained_ones(method, folder):
    needs_faiss(method)
    facts = trained_in(folder, method)
    assert facts["compressed"] == "after training"
    full, made = loaded(folder, METHODS[method].trained_as), loaded(folder, method)
    for number, (ours, theirs) in enumerate(zip(made.model.embeddings, full.model.embeddings, strict=True)):
        mine, trained = all_vectors(ours).detach(), all_vectors(theirs).detach()
        if number in dict(made.model.spec.embeddings):
            assert torch.square(mine - trained).sum() < 0.6 * torch.square(trained).sum()
        else:
            assert torch.equal(mine, trained)
    config = settings_of(method)
    measured = evaluate_ctr(config, method, folder / "ingest", folder / "methods" / method)
    whole = evaluate_ctr(
        config, METHODS[method].trained_as, folder / "ingest", folder / "methods" / METHODS[method].trained_as
    )
    assert measured["compressed"] == "after training"
    assert measured["training_bytes"] == whole["training_bytes"]
    assert measured["bytes"] < whole["bytes"] == whole["bytes_full"]


def test_every_column_of_full_int8_is_rounded_and_counted(folder):
    trained_in(folder, "full_int8")
    full, made = loaded(folder, "full").model, loaded(folder, "full_int8")
    precisions = precisions_of(settings_of("full_int8", export__precision="float32"), "full_int8", made.maps)
    assert set(precisions) == {"int8"}
    store_rounded(made.model, precisions)
    for ours, theirs in zip(made.model.embeddings, full.embeddings, strict=True):
        np.testing.assert_array_equal(ours.table.detach().numpy(), rounded(theirs.table.detach().numpy(), "int8"))
    measured = evaluate_ctr(settings_of("full_int8"), "full_int8", folder / "ingest", folder / "methods" / "full_int8")
    n_rows = sum(column.n_ids + 1 for column in made.features.all_columns)
    assert measured["bytes"] - measured["bytes_of"]["layers"] == n_rows * (DIM + 2)


@pytest.mark.parametrize(
    "method", ["full", "soft", "cce", "cafe", "robe", "dhe", "full_small_dim", "full_soft", "full_soft_small_dim"]
)
def test_training_holds_the_bytes_that_are_computed(method, folder):
    needs_faiss(method)
    facts = trained_in(folder, method)
    assert facts["training_bytes_measured"] == facts["training_bytes"]
    assert facts["compressed"] == (None if method in ("full", "full_soft") else "in training")


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("ratio", [0.6, 0.3])
def test_sizes_fill_the_budget_and_stay_within_it(method, ratio, folder):
    features = Features.open(folder / "ingest")
    config = settings_of(method, cluster__ratio=ratio)
    spec = method_spec(config, features, method, [])
    maps = loaded(folder, "full").maps
    model = spec.build(maps, len(features.dense), len(features.multi_valued))
    # Mixtures are not stored.
    model = with_embeddings(model) if method == "full_soft_small_dim" else model
    precisions = precisions_of(config, method, maps, model.spec.embeddings)
    stored = sum(column.total for column in stored_bytes(model, maps, precisions)) + layer_bytes(model)
    allowed = ratio * full_bytes(replace(spec, dim=DIM, embeddings=()), features)
    # Codes per id are divisors of the dim, and dims whole numbers.
    least = 0.5 if "pq" in method else 0.85
    assert stored <= allowed
    assert least * allowed <= stored or (spec.dim == DIM and "small_dim" in method)


@pytest.mark.parametrize("method", ["full_small_dim", "full_soft_small_dim"])
def test_vectors_of_a_small_budget_have_more_numbers_of_fewer_bits(method, folder):
    features, sizes = Features.open(folder / "ingest"), {}
    for ratio in (0.25, 0.24):
        for precision in ("auto", "int8"):
            config = settings_of(method, cluster__ratio=ratio, export__precision=precision)
            sizes[ratio, precision] = precision_of(config, method), method_spec(config, features, method, []).dim
    assert sizes[0.25, "auto"] == sizes[0.25, "int8"]
    assert sizes[0.24, "auto"][0] == "int4"
    assert sizes[0.24, "auto"][1] > sizes[0.24, "int8"][1]
    # Columns that a method leaves full are stored in the same type; a type that is set counts.
    assert (
        kept_precision_of(settings_of("soft", cluster__ratio=0.24))
        == precision_of(settings_of("soft", cluster__ratio=0.24), "soft")
        == "int4"
    )
    assert precision_of(settings_of("full", cluster__ratio=0.1), "full") == "float32"
    # Rows, or a resolution, allow the bytes of rows in int8.
    assert precision_of(settings_of(method, cluster__ratio=None, cluster__rows=60), method) == "int8"


def test_rows_allow_a_method_without_rows_as_many_bytes(folder):
    features, labels = Features.open(folder / "ingest"), clustering_labels(folder / "cluster")
    config = settings_of("robe", cluster__ratio=None, cluster__rows=60)
    ((_, spec), _) = method_spec(config, features, "robe", labels).embeddings
    n_rows = labels[0].user_rows + labels[0].item_rows + 2
    # Two OOV vectors in float32 are part of them.
    assert spec.sizes["rows"] == (n_rows * (DIM + 2) - 2 * 4 * DIM) // (DIM + 2)


def test_a_budget_that_is_too_small_says_what_is_needed(folder):
    features = Features.open(folder / "ingest")
    for method in ("full_pq", "cce", "full_small_dim"):
        with pytest.raises(DataError, match=rf"method '{method}' needs .* raise the ratio"):
            method_spec(settings_of(method, cluster__ratio=0.03), features, method, [])


def test_full_tables_made_of_mixtures_answer_as_they_were_trained(folder):
    trained_in(folder, "full_soft")
    made = loaded(folder, "full_soft")
    assert all(bucket_map.identity for bucket_map in made.maps)
    assert made.model.spec.embeddings == ()
    history = json.loads((folder / "methods" / "full_soft" / "history.json").read_text())
    best = next(entry for entry in history["epochs"] if entry["epoch"] == history["best_epoch"])
    # Known ids read the sums of what was trained, and only OOV rows that training did not read are filled after it.
    part = made.features.part("validation")
    made.model.calibrate(1.0, 0.0)
    assert measure(part, predict(made.model, part))["log_loss"] == pytest.approx(best["log_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "method", ["full_pq", "full_opq", "full_int4", "full_soft_int8", "robe", "dhe", "cce", "cafe", "full_small_dim"]
)
def test_bundles_answer_like_the_model(method, folder, tmp_path):
    needs_faiss(method)
    trained_in(folder, method)
    trained, config = loaded(folder, method), settings_of(method)
    precisions = precisions_of(config, method, trained.maps, trained.model.spec.embeddings)
    # The export itself compares logits, and raises where they differ.
    manifest = export_ctr(
        trained,
        precisions,
        tmp_path / "bundle",
        ExportOptions(method, "int8"),
        part=trained.features.part("test"),
        metrics={},
        provenance={},
    )
    kinds = {column["name"]: column.get("embedding") for column in manifest["columns"]}
    own = METHODS[method].embedding
    assert kinds["user"] == (None if own == "bucket" else own)
    assert kinds["device"] is None


def test_one_training_serves_all_that_store_it_otherwise(tmp_path):
    log = write_csv(tmp_path / "log.csv", columns(100))
    methods = ("full_int8", "full_pq", "full_soft_int8", "full")
    data = {"data__path": str(log), "data__schema": write_schema(tmp_path), "run__out": str(tmp_path / "out")}
    steps = {
        ratio: plan(settings_of("full", run__methods=methods, cluster__ratio=ratio, **data), "evaluate", "log")
        for ratio in (0.25, 0.1)
    }
    one, other = steps[0.25], steps[0.1]
    assert one["train full_int8"].inputs["train full"] == one["train full"].key
    assert one["train full_soft_int8"].inputs["train full_soft"] == one["train full_soft"].key
    # Of these, only the codes depend on the budget.
    changed = [name for name in one if name.startswith("train") and one[name].key != other[name].key]
    assert changed == ["train full_pq"]


def test_methods_of_one_task_are_refused_by_the_other():
    check_methods(STORED, "ctr")
    check_methods([*STORED, "additive"], "retrieval")
    for method in ("residual", "additive"):
        with pytest.raises(ConfigError, match=rf"method '{method}' is not supported with run.task=ctr"):
            check_methods([method], "ctr")


@pytest.mark.parametrize("model", list(MODELS))
def test_codes_of_every_model_are_exported_with_fields_in_the_order_of_full_tables(model, tmp_path):
    pytest.importorskip("faiss")
    full = small_ctr(model, "full")
    codes = EmbeddingSpec("product", {"codes_per_id": 2, "users_codewords": 8, "rotated": 0})
    coded = with_embeddings(full.model, [(0, codes), (2, codes)])
    assert coded.fields.arrangement is not None
    assert coded.fields.order == full.model.fields.order
    # The export compares logits, and raises where they differ.
    export_small(replace(full, model=coded), tmp_path / "bundle", "float32")
