"""`graphhash update` on a small trained run: what it folds in, writes, keeps, and refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.vocabulary import Vocabulary
from pipeline.bundles.recommend import recommend
from pipeline.cli.update import lines
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError, RunFolderError
from pipeline.logs.synthetic import synth
from pipeline.retrieval.folded_in import FoldedIn, folded_in_dir
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.task import Retrieval
from pipeline.runs.run import run
from pipeline.task import REFIT_PARTS
from pipeline.updates.update import update
from serving.bundle import check_bundle
from serving.retriever import Recommendations, Retriever


def write_log(path: Path, users, items, **more) -> str:
    pq.write_table(pa.table({"user_id": users, "item_id": items, **more}), path)
    return str(path)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A planted log: the rows of trained users, and of a tenth of the users that come later."""
    path = tmp_path_factory.mktemp("log")
    synth(path / "all", n_users=400, n_items=150, n_interactions=9000, n_communities=6, mixing=0.2, seed=1)
    table = pq.read_table(path / "all" / "log-00000.parquet")
    users, items = table["user_id"].to_numpy(), table["item_id"].to_numpy()
    later = np.random.default_rng(0).choice(np.unique(users), 40, replace=False)
    is_later = np.isin(users, later)
    write_log(path / "old.parquet", users[~is_later], items[~is_later])
    write_log(path / "new.parquet", users[is_later], items[is_later])
    return path, later


@pytest.fixture(scope="module", params=["rows shared", "rows of their own"])
def trained(request, log, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "out"
    rows = (
        ["cluster.rows=60"]
        if request.param == "rows shared"
        else ["cluster.rows=500", "map.hops=2", "map.indices_per_id=4"]
    )
    settings = [*rows, "train.epochs=30", "train.dim=16", "run.methods=soft,full", "data.shards=2"]
    fixed = {"data.path": str(log[0] / "old.parquet"), "run.out": str(path), "run.mlflow": False}
    run(RunConfig.load(None, settings, **fixed), until="export")
    return path


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the trained run, to be updated."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same(left: Recommendations, right: Recommendations) -> bool:
    """Items and scores, bit for bit."""
    pairs = [*zip(left.item_ids, right.item_ids, strict=True), *zip(left.scores, right.scores, strict=True)]
    return all(np.array_equal(a, b) for a, b in pairs)


def ids_of(run_folder: Path, side: str) -> list:
    return Vocabulary.load(run_folder / "ingest" / f"{side}.parquet").ids.to_pylist()


def test_new_users_are_answered_and_known_ones_as_before(out, log):
    path, later = log
    some = ids_of(out, "users")[:20]
    before = Retriever(out / "bundle", provider="cpu").recommend(some, 10)
    assert not Retriever(out / "bundle", provider="cpu").recommend(later.tolist(), 5).known.any()
    result = update(out, str(path / "new.parquet"))
    retriever = Retriever(out / "bundle", provider="cpu")
    after = retriever.recommend(some, 10)
    assert same(before, after)
    got = retriever.recommend(later.tolist(), 10)
    assert got.known.all()
    assert result["users"] == {"new": 40, "folded_in": 40, "unassigned": 0}
    assert result["bundle"] == "written"
    assert result["n_interactions"] == result["n_used"] + result["n_unused"]
    assert result["n_known"] == 0
    # A new user's rows are not the fallback's: two of them are answered differently.
    assert len({tuple(row.tolist()) for row in got.item_ids}) > 5
    manifest = check_bundle(out / "bundle")
    assert manifest["n_users"] == 400
    assert manifest["provenance"]["updates"][0]["log_sha256"] == result["log_sha256"]
    assert not list(out.glob("**/.*partial"))


def test_what_new_users_had_is_left_out_of_their_answers(out, log):
    path, later = log
    update(out, str(path / "new.parquet"))
    table = pq.read_table(path / "new.parquet")
    users, items = table["user_id"].to_numpy(), table["item_id"].to_numpy()
    n_items = check_bundle(out / "bundle")["n_items"]
    user = int(later[0])
    (answer,) = recommend(out / "bundle", [str(user)], n_items, exclude_seen=True)
    answered = {item["item_id"] for item in answer["items"]}
    assert answered.isdisjoint(items[users == user].tolist())
    assert len(answered) == n_items - len(set(items[users == user].tolist()))


def test_a_new_item_is_recommended_and_one_that_met_nobody_known_stays_unassigned(out, tmp_path):
    users = ids_of(out, "users")
    log = write_log(tmp_path / "items.parquet", [*users[:30], 999_999], [888_888] * 30 + [777_777])
    result = update(out, log)
    assert result["items"] == {"new": 2, "folded_in": 1, "unassigned": 1}
    assert result["users"] == {"new": 1, "folded_in": 0, "unassigned": 1}
    assert (result["n_used"], result["n_unused"]) == (30, 1)
    got = Retriever(out / "bundle", provider="cpu").recommend(
        [users[0], 999_999], check_bundle(out / "bundle")["n_items"]
    )
    assert 888_888 in got.item_ids[0]
    assert 777_777 not in got.item_ids[0]
    assert got.known.tolist() == [True, False]


def test_a_second_update_goes_on_from_the_first(out, log, tmp_path):
    path, later = log
    table = pq.read_table(path / "new.parquet")
    first = table.filter(pa.array(np.isin(table["user_id"].to_numpy(), later[:20])))
    pq.write_table(first, tmp_path / "first.parquet")
    update(out, str(tmp_path / "first.parquet"))
    maps = FoldedIn.load(folded_in_dir(out, "soft")).maps
    known = Retriever(out / "bundle", provider="cpu").recommend(later[:20].tolist(), 10)
    result = update(out, str(path / "new.parquet"))
    assert result["users"]["new"] == 20
    assert result["n_known"] == len(first)
    folded_in = FoldedIn.load(folded_in_dir(out, "soft"))
    assert folded_in.n_folded_in["users"] == 40
    assert len(folded_in.updates) == 2
    n_first = maps["users"].n_ids
    assert np.array_equal(folded_in.maps["users"].rows[:n_first], maps["users"].rows[:-1])
    again = Retriever(out / "bundle", provider="cpu").recommend(later[:20].tolist(), 10)
    assert same(known, again)
    # Nothing was counted twice.
    assert folded_in.seen.nnz == load_interactions(out / "ingest", REFIT_PARTS).nnz + len(table)
    assert folded_in.seen.max() == 1


def test_the_same_log_twice_changes_nothing(out, log):
    update(out, str(log[0] / "new.parquet"))
    before = files_of(out)
    result = update(out, str(log[0] / "new.parquet"))
    assert result["users"]["new"] == result["items"]["new"] == 0
    assert result["bundle"] == "unchanged"
    after = files_of(out)
    assert {name for name in before if before[name] != after[name]} <= {".lock"}
    assert before.keys() == after.keys()
    assert "the log holds no new user and no new item" in lines(result)


def test_pairs_of_known_ids_are_left_out_of_answers_and_change_none(out, tmp_path):
    before = files_of(out / "bundle")
    user = ids_of(out, "users")[0]
    item = recommend(out / "bundle", [str(user)], 1, exclude_seen=True)[0]["items"][0]["item_id"]
    result = update(out, write_log(tmp_path / "known.parquet", [user], [item]))
    assert (result["n_known"], result["bundle"]) == (1, "unchanged")
    assert files_of(out / "bundle") == before
    assert recommend(out / "bundle", [str(user)], 1, exclude_seen=True)[0]["items"][0]["item_id"] != item


def test_a_later_run_keeps_the_folded_in_ids_and_a_new_training_starts_without(out, log, caplog):
    update(out, str(log[0] / "new.parquet"))
    config = RunConfig.load(out / "config.toml", **{"run.out": str(out)})
    caplog.set_level(logging.INFO, "pipeline")
    run(config, until="export")
    assert "export: unchanged, skipped" in caplog.messages
    assert check_bundle(out / "bundle")["n_users"] == 400
    (out / "bundle" / "model.onnx").write_bytes(b"damaged")
    run(config, until="export")
    assert check_bundle(out / "bundle")["n_users"] == 400
    other = RunConfig.load(out / "config.toml", ["train.epochs=5", "run.methods=soft"], **{"run.out": str(out)})
    run(other, until="export")
    assert check_bundle(out / "bundle")["n_users"] == 360
    assert recommend(out / "bundle", [str(log[1][0])], 3, exclude_seen=True)[0]["known"] is False
    assert update(out, str(log[0] / "new.parquet"))["users"]["folded_in"] == 40


def test_a_crash_before_the_bundle_leaves_the_old_one_and_the_same_command_writes_it(out, log, monkeypatch):
    before = files_of(out / "bundle")
    with monkeypatch.context() as patch:
        patch.setattr(Retrieval, "export", lambda *_: (_ for _ in ()).throw(OSError("bang")))
        with pytest.raises(OSError, match="bang"):
            update(out, str(log[0] / "new.parquet"))
    assert files_of(out / "bundle") == before
    user = ids_of(out, "users")[0]
    assert recommend(out / "bundle", [str(user)], 3, exclude_seen=True)[0]["known"]
    assert update(out, str(log[0] / "new.parquet"))["bundle"] == "written"
    assert check_bundle(out / "bundle")["n_users"] == 400


def test_the_refit_is_compared_on_held_out_interactions(out, log):
    result = update(out, str(log[0] / "new.parquet"), refit=(0.2, 0))
    refit = result["refit"]
    assert refit["n_users"] == 40
    assert 0.15 < refit["n_held_out"] / result["n_interactions"] < 0.25
    assert all(0 <= refit[name]["recall@20"] <= 1 for name in ("folded_in", "refit", "fallback"))
    assert refit["folded_in"]["recall@20"] > refit["fallback"]["recall@20"]
    assert any("of the refit's" in line for line in lines(result))
    assert json.dumps(result)
    assert not list(out.glob(".refit*"))


def test_new_users_and_items_get_rows_of_a_full_table_that_are_fitted(out, log):
    new = str(log[0] / "new.parquet")
    result = update(out, new, method="full", refit=(0.2, 0))
    assert result["users"] == {"new": 40, "folded_in": 40, "unassigned": 0}
    assert result["items"]["folded_in"] == result["items"]["new"]
    assert "to rows of their own, fitted to their interactions" in lines(result)[0]
    assert result["refit"]["folded_in"]["recall@20"] > result["refit"]["fallback"]["recall@20"]
    folded_in = FoldedIn.load(folded_in_dir(out, "full"))
    for side in SIDES:
        assert folded_in.maps[side].identity
        assert len(folded_in.rows[side]) == result[side]["new"]
    assert Retriever(out / "bundle", provider="cpu").recommend(log[1].tolist(), 5).known.all()
    assert update(out, new, method="full")["bundle"] == "unchanged"


@pytest.fixture(scope="module")
def coded(log, tmp_path_factory):
    path = tmp_path_factory.mktemp("coded") / "out"
    settings = ["cluster.ratio=0.9", "train.loss=softmax", "train.epochs=10", "train.dim=16", "run.methods=additive"]
    run(
        RunConfig.load(
            None,
            settings,
            **{"data.path": str(log[0] / "old.parquet"), "run.out": str(path), "run.mlflow": False},
        ),
        until="export",
    )
    return path


@pytest.mark.parametrize("runtime", ["materialized", "compressed"])
def test_new_users_get_codes_and_known_ones_are_answered_as_before(coded, log, tmp_path, runtime):
    out, new = Path(shutil.copytree(coded, tmp_path / "out")), str(log[0] / "new.parquet")
    config = RunConfig.load(out / "config.toml", [f"export.runtime={runtime}"], **{"run.out": str(out)})
    run(config, until="export", keep_trained=True)
    some = ids_of(out, "users")[:20]
    before = Retriever(out / "bundle", provider="cpu").recommend(some, 10)
    result = update(out, new, refit=(0.2, 0))
    assert result["users"] == {"new": 40, "folded_in": 40, "unassigned": 0}
    assert result["refit"]["folded_in"]["recall@20"] > result["refit"]["fallback"]["recall@20"]
    retriever = Retriever(out / "bundle", provider="cpu")
    assert same(before, retriever.recommend(some, 10))
    assert retriever.recommend(log[1].tolist(), 5).known.all()
    # A later update goes on from this one.
    more = write_log(tmp_path / "more.parquet", [10**6] * 3, ids_of(out, "items")[:3])
    answers = retriever.recommend(log[1].tolist(), 5)
    assert update(out, more)["users"]["folded_in"] == 1
    again = Retriever(out / "bundle", provider="cpu")
    assert same(answers, again.recommend(log[1].tolist(), 5))
    assert again.recommend([10**6], 5).known.all()


def check_a_new_item(out: Path, method: str, folder: Path) -> None:
    """The users of a known item take up a new one, which two new users have as well, one of them it alone."""
    users, items = ids_of(out, "users"), ids_of(out, "items")
    # The bundle of this method.
    update(out, write_log(folder / "first.parquet", [10**7] * 3, items[:3]), method=method)
    fans = [users[row] for row in load_interactions(out / "ingest", REFIT_PARTS)[:, [3]].nonzero()[0]]
    assert len(fans) > 10
    new, people = 10**6, [*fans, 10**6, 10**6, 10**6 + 1]
    taken = [*[new] * len(fans), items[3], new, new]
    before = Retriever(out / "bundle", provider="cpu").score(users[:30], [items] * 30)
    result = update(out, write_log(folder / "item.parquet", people, taken), method=method)
    assert result["items"] == {"new": 1, "folded_in": 1, "unassigned": 0}
    assert result["users"] == {"new": 2, "folded_in": 2, "unassigned": 0}
    assert [len(FoldedIn.load(folded_in_dir(out, method)).rows[side]) for side in SIDES] == [3, 1]
    retriever = Retriever(out / "bundle", provider="cpu")
    for ours, theirs in zip(retriever.score(users[:30], [items] * 30).scores, before.scores, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Those who took it up have it nearer to the top than the others, who have not seen it.
    scores = dict(zip(users, np.concatenate(retriever.score(users, [[new]] * len(users)).scores), strict=True))
    others = [scores[user] for user in users if user not in fans]
    assert np.mean([scores[user] for user in fans]) > np.mean(others) + np.std(others)
    assert new in np.concatenate(retriever.recommend(fans, 20).item_ids)
    assert retriever.recommend([10**6, 10**6 + 1, 10**7], 5).known.all()


def test_a_new_item_of_a_full_table_is_fitted_and_known_ones_keep_their_scores(out, tmp_path):
    check_a_new_item(out, "full", tmp_path)


def test_a_new_item_gets_codes_and_known_ones_keep_their_scores(coded, tmp_path):
    check_a_new_item(Path(shutil.copytree(coded, tmp_path / "out")), "additive", tmp_path)


def test_updates_of_two_methods_stay_apart(out, log, tmp_path):
    update(out, str(log[0] / "new.parquet"))
    items = ids_of(out, "items")
    known = write_log(tmp_path / "known.parquet", [ids_of(out, "users")[0]] * len(items), items)
    update(out, known, method="full")
    assert FoldedIn.load(folded_in_dir(out, "soft")).n_folded_in["users"] == 40
    assert FoldedIn.load(folded_in_dir(out, "full")).id is None
    assert check_bundle(out / "bundle")["n_users"] == 400
    result = update(out, known, refit=(0.2, 0))
    assert result["refit"] is None
    assert "nothing to compare" in lines(result)[-1]


BAD_LOGS = {
    "no rows": (lambda f: write_log(f, pa.array([], pa.int64()), pa.array([], pa.int64())), "holds no rows"),
    "strings": (lambda f: write_log(f, ["a", "b"], [1, 2]), "holds string ids, the run's users are int64"),
    "no column": (lambda f: pq.write_table(pa.table({"uid": [1], "item_id": [1]}), f), "user_id"),
    "null": (lambda f: write_log(f, pa.array([1, None]), [1, 2]), "is null"),
}


@pytest.mark.parametrize(("write", "message"), BAD_LOGS.values(), ids=BAD_LOGS.keys())
def test_a_bad_log_is_refused_and_changes_nothing(out, tmp_path, write, message):
    before = files_of(out)
    write(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message) as error:
        update(out, str(tmp_path / "bad.parquet"))
    assert "\n" not in str(error.value)
    after = files_of(out)
    assert {name for name in after if before.get(name) != after[name]} <= {".lock"}


def test_columns_of_the_new_log_can_have_other_names(out, log, tmp_path):
    table = pq.read_table(log[0] / "new.parquet").rename_columns(["uid", "sku"])
    pq.write_table(table, tmp_path / "renamed.parquet")
    data = {"user_column": "uid", "item_column": "sku"}
    assert update(out, str(tmp_path / "renamed.parquet"), data=data)["users"]["folded_in"] == 40


def test_a_run_that_is_not_whole_is_refused(out, log, tmp_path):
    new = str(log[0] / "new.parquet")
    with pytest.raises(RunFolderError, match="no run is there"):
        update(tmp_path / "nothing", new)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ConfigError, match="unknown method 'sfot'"):
        update(out, new, method="sfot")
    with pytest.raises(RunFolderError, match="none of the run's"):
        update(out, new, method="graph")
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(config.replace('model = "mf"', 'model = "lightgcn"'))
    with pytest.raises(ConfigError, match="cannot fold in new ids"):
        update(out, new)
    (out / "config.toml").write_text(config.replace("epochs = 30", "epochs = 31"))
    with pytest.raises(RunFolderError, match="'train soft' was made with other settings"):
        update(out, new)
    (out / "config.toml").write_text(config)
    shutil.rmtree(out / "methods" / "soft")
    with pytest.raises(RunFolderError, match="'train soft' is missing or damaged; run 'graphhash run"):
        update(out, new)
