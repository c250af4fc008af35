"""The exported recommendations, and our figures of them against other evaluators."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_array

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import full_map
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.evaluate import evaluate_method
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.recommendations import write_recommendations, write_test_interactions
from pipeline.retrieval.weights import save_model
from pipeline.storage.atomic import write_json_atomic
from pipeline.task import StageContext

SHAPE = (60, 90)
K = (5, 20)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run folder with random weights, its metrics, and its recommendations and test interactions in files."""
    run = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    part = rng.choice(4, SHAPE, p=[0.5, 0.1, 0.1, 0.3])
    # Some users have more than 20 test items, and one has none.
    part[0] = 0
    graphs = {
        name: csr_array((part == number).astype(np.float32))
        for number, name in ((1, "train"), (2, "validation"), (3, "test"))
    }
    for name, graph in graphs.items():
        ShardedCsr.write(run / "ingest" / name, graph, n_shards=2)
    Vocabulary.from_ids(pa.array([f"u{i:03}" for i in range(SHAPE[0])])).save(run / "ingest" / "users.parquet")
    Vocabulary.from_ids(pa.array(range(1000, 1000 + SHAPE[1]))).save(run / "ingest" / "items.parquet")
    out, maps = run / "methods" / "full", (full_map(SHAPE[0]), full_map(SHAPE[1]))
    out.mkdir(parents=True)
    for side, bucket_map in zip(("users", "items"), maps, strict=True):
        bucket_map.save(out / f"{side}.npz")
    spec = ModelSpec("mf", 8, False, 0, 3)
    save_model(spec.build(*maps, graphs["train"]), spec, out)
    facts = {"training_bytes": 1, "training_bytes_measured": 1, "compressed": None}
    write_json_atomic(out / "history.json", {"facts": facts})
    settings = {"evaluate.k": tuple(map(str, K)), "export.precision": "int8", "train.dim": 8, "train.refit": False}
    config = RunConfig.from_flat(settings)
    metrics = evaluate_method(config, "full", run / "ingest", out)
    context = StageContext(config, run)
    n_rows = (
        write_recommendations(context, "full", run / "top.parquet"),
        write_test_interactions(context, run / "test.parquet"),
    )
    return run, metrics, n_rows, graphs


def test_the_files_hold_raw_ids_ranks_and_scores(evaluated):
    run, metrics, n_rows, graphs = evaluated
    top, test = pq.read_table(run / "top.parquet"), pq.read_table(run / "test.parquet")
    assert top.column_names == ["user_id", "item_id", "rank", "score"]
    assert (len(top), len(test)) == n_rows == (20 * metrics["n_test_users"], graphs["test"].nnz)
    assert not list(run.glob(".*"))
    expected = {(f"u{u:03}", 1000 + int(i)) for u, i in zip(*graphs["test"].nonzero(), strict=True)}
    assert set(zip(*(column.to_pylist() for column in test.columns), strict=True)) == expected
    by_user: dict[str, list[tuple[int, int, float]]] = {}
    for row in top.to_pylist():
        by_user.setdefault(row["user_id"], []).append((row["rank"], row["item_id"], row["score"]))
    assert "u000" not in by_user
    seen = graphs["train"] + graphs["validation"]
    for user, rows in by_user.items():
        assert [rank for rank, _, _ in rows] == list(range(1, 21))
        assert all(earlier[2] >= later[2] for earlier, later in pairwise(rows))
        assert not {item - 1000 for _, item, _ in rows} & set(seen[[int(user[1:])]].indices.tolist())


def test_the_files_hold_the_users_that_are_ranked(evaluated, tmp_path):
    run, metrics, _, _ = evaluated
    few = {"evaluate.users": 9, "export.precision": "int8", "train.dim": 8, "train.refit": False}
    config = RunConfig.from_flat(few)
    sampled = evaluate_method(config, "full", run / "ingest", run / "methods" / "full")
    assert (sampled["n_test_users"], sampled["n_users_with_test"]) == (9, metrics["n_test_users"])
    write_recommendations(StageContext(config, run), "full", tmp_path / "top.parquet")
    write_test_interactions(StageContext(config, run), tmp_path / "test.parquet")
    ranked, held_out = (
        set(pq.read_table(tmp_path / f"{name}.parquet")["user_id"].to_pylist()) for name in ("top", "test")
    )
    assert ranked == held_out
    assert len(ranked) == 9


def test_our_figures_are_those_of_ir_measures(evaluated):
    ir = pytest.importorskip("ir_measures")
    run, metrics, _, _ = evaluated
    qrels, ranked = tables(run)
    names = {"recall": "R", "ndcg": "nDCG", "hit_rate": "Success", "mrr": "RR"}
    for k in K:
        measures = {name: ir.parse_measure(f"{other}@{k}") for name, other in names.items()}
        found = ir.calc_aggregate(
            list(measures.values()),
            [ir.Qrel(user, str(item), 1) for user, items in qrels.items() for item in items],
            # By rank: equal scores would be in another order.
            [ir.ScoredDoc(user, str(item), -rank) for user, items in ranked.items() for item, rank in items.items()],
        )
        assert {f"{name}@{k}": metrics[f"{name}@{k}"] for name in names} == pytest.approx(
            {f"{name}@{k}": found[measure] for name, measure in measures.items()}, abs=1e-12
        )


@pytest.mark.slow
def test_our_figures_are_those_of_ranx(evaluated):
    ranx = pytest.importorskip("ranx")
    run, metrics, _, _ = evaluated
    qrels, ranked = tables(run)
    wanted = ranx.Qrels({user: {str(item): 1 for item in items} for user, items in qrels.items()})
    # By rank: equal scores would be in another order.
    given = ranx.Run({user: {str(i): 1 / rank for i, rank in items.items()} for user, items in ranked.items()})
    names = [f"{name}@{k}" for name in ("recall", "ndcg", "hit_rate", "mrr") for k in K]
    found = ranx.evaluate(wanted, given, names)
    assert {name: metrics[name] for name in names} == pytest.approx({n: float(found[n]) for n in names}, abs=1e-12)


def test_capped_recall_differs_where_users_have_many_test_items(evaluated):
    run, metrics, _, _ = evaluated
    qrels, ranked = tables(run)
    for k in K:
        hits = {u: sum(rank <= k and i in qrels[u] for i, rank in items.items()) for u, items in ranked.items()}
        capped = np.mean([n / min(k, len(qrels[user])) for user, n in hits.items()])
        assert metrics[f"capped_recall@{k}"] == pytest.approx(capped, abs=1e-12)
        assert metrics[f"capped_recall@{k}"] > metrics[f"recall@{k}"]
    assert metrics["k"] == list(K)
    assert metrics["recall@5_float32"] == pytest.approx(metrics["recall@5"], rel=0.05)


def tables(run: Path) -> tuple[dict[str, set[int]], dict[str, dict[int, int]]]:
    """Test items of every user, and the ranks of those recommended."""
    qrels: dict[str, set[int]] = {}
    for row in pq.read_table(run / "test.parquet").to_pylist():
        qrels.setdefault(row["user_id"], set()).add(row["item_id"])
    ranked: dict[str, dict[int, int]] = {}
    for row in pq.read_table(run / "top.parquet").to_pylist():
        ranked.setdefault(row["user_id"], {})[row["item_id"]] = row["rank"]
    return qrels, ranked
