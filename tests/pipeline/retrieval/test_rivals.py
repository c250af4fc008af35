"""Methods beside bucket maps in a run: what is stored of one training, sizes at a number of bytes, and bundles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import full_map
from graphhash.maps.quantization import rounded
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS
from pipeline.retrieval.budget import GraphSize, resolve_method, spendable
from pipeline.retrieval.cluster import cluster_run
from pipeline.retrieval.defaults import precision_of
from pipeline.retrieval.evaluate import evaluate_method
from pipeline.retrieval.export import ExportOptions, TrainedRetrieval, export_retrieval
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.stored import count_bytes
from pipeline.retrieval.train import train_method
from pipeline.retrieval.weights import load_method
from pipeline.runs.plan import plan
from pipeline.runs.tasks import task_of
from pipeline.runs.trained import warnings_of_bytes
from pipeline.task import StageContext
from pipeline.training.job import TrainingSession
from pipeline.training.memory import training_bytes
from serving import BundleError
from tests.helpers import graphs
from tests.helpers.command import exit_code_of
from tests.helpers.trained import trained_once

STORED_FULL = [name for name, method in METHODS.items() if method.trained_as is not None]
SIZED = [
    name
    for name, method in METHODS.items()
    if method.sized and name != "residual" and method.task in (None, "retrieval")
]
LARGE = GraphSize(29_858, 40_981, 700_000)


def settings_of(method, **settings) -> RunConfig:
    common = {"train.dim": 16, "train.epochs": 8, "train.eval_every": 4, "cluster.ratio": 0.5, "run.methods": (method,)}
    return RunConfig.from_flat(common | {key.replace("__", "."): value for key, value in settings.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of a planted graph, ingested and clustered, with `full` trained."""
    run = tmp_path_factory.mktemp("run")
    graph, _, _ = graphs.planted(0, 6, 60, 0.3, 0.02)
    part = np.random.default_rng(0).choice(3, graph.nnz, p=[0.8, 0.1, 0.1])
    for i, name in enumerate(("train", "validation", "test")):
        kept = csr_array(
            (graph.data * (part == i), graph.indices.copy(), graph.indptr.copy()), shape=graph.shape, dtype=np.float32
        )
        kept.eliminate_zeros()
        ShardedCsr.write(run / "ingest" / name, kept, n_shards=1)
        if name == "train":
            by_item = kept.T.tocsr()
            by_item.sort_indices()
            ShardedCsr.write(run / "ingest" / "train_by_item", by_item, n_shards=1)
    (run / "cluster").mkdir()
    cluster_run(RunConfig.from_flat({"cluster.resolution": 3.0}), run / "ingest", run / "cluster")
    trained_in(run, "full")
    return run


def trained_in(run, method, **settings):
    """Train a method into the run folder, what it is made of before it; its facts."""

    def train(name, out):
        return train_method(StageContext(settings_of(name, **settings), run), name, out, TrainingSession())

    return trained_once(run, method, train)


@pytest.mark.parametrize("method", STORED_FULL)
def test_stored_full_tables_are_the_trained_ones_rounded(method, folder):
    if METHODS[method].embedding == "product":
        pytest.importorskip("faiss")
    source = METHODS[method].trained_as
    trained = trained_in(folder, source)
    facts = trained_in(folder, method)
    assert facts["compressed"] == "after training"
    full, _, _ = load_method(folder / "methods" / source, folder / "ingest")
    model, _, _ = load_method(folder / "methods" / method, folder / "ingest")
    precision = precision_of(settings_of(method, export__precision="int8"), method)
    # Of codes it is that of the item bias alone.
    assert precision == ("int8" if METHODS[method].embedding == "product" else METHODS[method].precision)
    vectors = full.user_embedding.all().detach().numpy()
    if METHODS[method].embedding == "bucket":
        assert torch.equal(model.user_embedding.table, full.user_embedding.table)
        near = np.abs(rounded(vectors, precision) - vectors).max() / np.abs(vectors).max()
        assert near < 0.1
    else:
        decoded = model.user_embedding.all().detach().numpy()
        wanted = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if full.cosine else vectors
        assert np.square(decoded - wanted).sum() < 0.5 * np.square(wanted).sum()
    measured = evaluate_method(settings_of(method), method, folder / "ingest", folder / "methods" / method)
    assert measured["bytes"] == sum(count_bytes(model, precision).values())
    assert measured["compressed"] == "after training"
    assert measured["training_bytes"] == trained["training_bytes"] >= training_bytes(full)


@pytest.mark.parametrize("method", ["full", "full_soft", "soft", "cce", "cafe", "robe", "dhe", "full_small_dim"])
def test_training_holds_the_bytes_that_are_computed(method, folder):
    if method == "cce":
        pytest.importorskip("faiss")
    facts = trained_in(folder, method, map__indices_per_id=4)
    assert facts["training_bytes_measured"] == facts["training_bytes"]
    assert facts["compressed"] == (None if method in ("full", "full_soft") else "in training")


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("ratio", [0.25, 0.07, 0.02])
def test_sizes_fill_the_budget_and_stay_within_it(method, ratio):
    config = settings_of(method, cluster__ratio=ratio, train__dim=64)
    resolved = resolve_method(config, method, LARGE, 0)
    maps = full_map(LARGE.n_users), full_map(LARGE.n_items)
    spec = ModelSpec("mf", resolved.dim or 64, False, 0, 0, resolved.embedding)
    stored = sum(count_bytes(spec.build(*maps, None), resolved.precision).values())
    allowed = spendable(ratio, LARGE.n_users, LARGE.n_items, 64)
    # Codes per id are divisors of the dim, or have an upper bound; dims are whole numbers.
    least = 0.5 if METHODS[method].stores_codes else 0.75 if method == "full_small_dim" else 0.98
    assert least * allowed <= stored <= allowed


def test_a_budget_that_is_too_small_says_what_is_needed():
    for method in ("full_pq", "cce", "full_small_dim"):
        with pytest.raises(DataError, match=rf"method '{method}' needs .* of the full tables', .* raise the ratio"):
            resolve_method(settings_of(method, cluster__ratio=0.003, train__dim=64), method, LARGE, 0)
    config = settings_of("full_pq", map__codes_per_id=5)
    with pytest.raises(DataError, match=r"map.codes_per_id=5 does not divide train.dim=16"):
        resolve_method(config, "full_pq", LARGE, 0)
    assert (
        resolve_method(settings_of("full_pq", map__codes_per_id=8), "full_pq", LARGE, 0).embedding.sizes["codes_per_id"]
        == 8
    )


@pytest.mark.parametrize("runtime", ["materialized", "compressed"])
@pytest.mark.parametrize(
    "method", ["full_pq", "full_opq", "full_int4", "additive", "full_additive", "cafe", "robe", "dhe"]
)
def test_bundles_answer_like_the_model(method, runtime, folder, tmp_path):
    if METHODS[method].embedding == "product":
        pytest.importorskip("faiss")
    trained_in(folder, method)
    model, users, items = load_method(folder / "methods" / method, folder / "ingest")
    trained = TrainedRetrieval(
        model, users, items, Vocabulary.from_ids(range(users.n_ids)), Vocabulary.from_ids(range(items.n_ids))
    )
    options = ExportOptions(precision_of(settings_of(method), method), runtime)
    # The export itself compares all scores, and raises where they differ.
    if method in ("cafe", "robe", "dhe") and runtime == "compressed":
        with pytest.raises(BundleError, match="as a vector per id"):
            export_retrieval(trained, tmp_path / "bundle", options, metrics={}, provenance={})
        return
    manifest = export_retrieval(trained, tmp_path / "bundle", options, metrics={}, provenance={})
    assert manifest["runtime"]["mode"] == runtime


def test_one_training_serves_all_that_store_it_otherwise(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\n1,1\n")
    methods = ("full_int8", "full_pq", "full")
    steps = {
        ratio: plan(
            settings_of("full", run__methods=methods, run__out=str(tmp_path), cluster__ratio=ratio), "evaluate", "log"
        )
        for ratio in (0.25, 0.1)
    }
    one, other = steps[0.25], steps[0.1]
    assert [name for name in one if name.startswith("train")] == ["train full", "train full_int8", "train full_pq"]
    assert one["train full_int8"].inputs["train full"] == one["train full"].key
    # Of these, only the codes depend on the budget.
    changed = [name for name in one if name.startswith("train") and one[name].key != other[name].key]
    assert changed == ["train full_pq"]


def test_a_budget_that_codes_cannot_keep_is_refused_before_anything_is_trained(tmp_path, capsys):
    log = graphs.write_log(tmp_path / "log.csv", graphs.planted(0, 6, 40, 0.3, 0.02)[0])
    words = ["--data", log, "--dim", "16", "--ratio", "0.01", "--no-mlflow", "--out", tmp_path / "run"]
    assert exit_code_of(tmp_path, "run", *words, "--method", "additive", "--loss", "softmax") == 1
    assert "method 'additive' needs" in capsys.readouterr().err
    assert exit_code_of(tmp_path, "run", *words, "--method", "additive", "--loss", "softmax", "--dry-run") == 1
    assert "method 'additive' needs" in capsys.readouterr().err
    assert not (tmp_path / "run" / "methods").exists()
    assert exit_code_of(tmp_path, "run", *words, "--method", "full_pq", "--model", "neumf") == 2
    assert "method 'full_pq' needs train.model=mf, got neumf" in capsys.readouterr().err


def test_what_settings_do_not_change_about_stored_codes_is_said():
    task = task_of(settings_of("additive"))
    within = {"bytes_ratio": 0.2}
    assert warnings_of_bytes(settings_of("additive"), task, "additive", within) == []
    asked = settings_of("additive", export__precision="float16")
    assert warnings_of_bytes(asked, task, "additive", within) == [
        "additive: stored in codes; --precision float16 does not change it"
    ]
    many = settings_of("additive", map__codes_per_id=16, cluster__ratio=0.07)
    assert warnings_of_bytes(many, task, "additive", within) == [
        "additive: 20.0% of the full tables' bytes, above the budget of 7.0%: map.codes_per_id=16 goes before it"
    ]
