"""`graphhash update` of CTR runs: new values get rows without training, and rows of known values are answered as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.folded_in import open_folded_columns, renumbered, stored_facts, with_folded_columns
from pipeline.ctr.weights import load_ctr, load_mixtures
from pipeline.errors import ConfigError
from pipeline.runs.run import run
from pipeline.updates.rules_ctr import MIXED
from pipeline.updates.update import update
from serving import Scorer
from tests.helpers.ctr_log import SCHEMA, columns, write_csv, write_schema

METHODS = (
    "graph",
    "double_frequency",
    "quotient_remainder",
    "soft",
    "double_soft",
    "multilevel",
    "baco",
    "lsh_structure",
    "full_soft",
    "full_soft_small_dim",
    "full_soft_int4",
)
HASHED = '[columns.device]\ncompress = "double"\nrows = 4\n'


def known_log():
    """Items of the last group of users only, with missing users, so that a missing value has an entry and edges."""
    log = columns(4000)
    return log | {"user": [None if i % 40 == 0 else user for i, user in enumerate(log["user"])]}


def later_log(seed=1):
    """Samples of trained and of new users and items, of the same tastes, and of a new device."""
    log = columns(1500, n_users=90, n_items=60, seed=0)
    rng = np.random.default_rng(seed)
    return log | {"device": [f"d{number}" for number in rng.integers(0, 8, 1500)]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all methods, and its folder."""
    folder = tmp_path_factory.mktemp("update")
    write_csv(folder / "log.csv", known_log())
    settings = {
        "run.task": "ctr",
        "run.mlflow": False,
        "run.methods": METHODS,
        "run.out": str(folder / "out"),
        "data.path": str(folder / "log.csv"),
        "data.schema": str(write_schema(folder, SCHEMA.replace("[multi_valued", f"{HASHED}[multi_valued"))),
        "cluster.rows": 60,
        "map.indices_per_id": 4,
        "train.dim": 8,
        "train.hidden": ("8",),
        "train.epochs": 2,
        "train.batch_size": 256,
        "train.refit": False,
    }
    run(RunConfig.from_flat(settings))
    return folder


def copied(whole, tmp_path):
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    write_csv(tmp_path / "later.csv", later_log())
    return out, str(tmp_path / "later.csv")


@pytest.mark.parametrize("method", METHODS)
def test_new_values_get_rows_and_known_rows_answer_as_before(method, whole, tmp_path):
    out, later = copied(whole, tmp_path)
    before = load_ctr(out / "methods" / method, out / "ingest")
    result = update(out, later, method=method)
    counts = result["columns"]
    # What keeps a row for every value hashes no column, whatever the schema says.
    assert set(counts) == {"user", "item"} | (set() if method in MIXED else {"device"})
    assert counts["user"]["new"] == 30
    assert counts["item"]["new"] == 20
    if method not in MIXED:
        assert counts["device"] == {"new": 3, "folded_in": 3, "unassigned": 0}
    most = 0 if method == "quotient_remainder" else 20
    assert counts["user"]["folded_in"] >= most
    assert result["bundle"] == "written"
    # The model with new values gives the same logits for rows of trained entries, of missing and of OOV values.
    folded = open_folded_columns(out, method, stored_facts(out, method)["train_key"])
    after = with_folded_columns(before, folded)
    from pipeline.ctr.evaluate import predict

    test = before.features.part("test")
    now = renumbered(test, before.features.columns, after.features.columns)
    np.testing.assert_array_equal(predict(before.model, test), predict(after.model, now))
    # And so does the bundle, for raw rows; new values are known to it.
    log = later_log()
    rows = {name: values for name, values in log.items() if name != "click"}
    scorer = Scorer(out / "bundle", provider="cpu")
    known = scorer.details(rows).known
    vocabulary = set(before.vocabularies[0].ids.to_pylist())
    is_new = np.array([user not in vocabulary for user in log["user"]])
    assert known["user"][~is_new].all()
    assert known["user"][is_new].any() == bool(counts["user"]["folded_in"])
    assert known["device"].all() == (method not in MIXED)


@pytest.mark.parametrize("method", ["full_soft", "full_soft_small_dim"])
def test_a_new_values_row_is_its_mixture_and_columns_keep_their_order(method, whole, tmp_path, monkeypatch):
    out, later = copied(whole, tmp_path)
    before = load_ctr(out / "methods" / method, out / "ingest")
    update(out, later, method=method)
    folded = open_folded_columns(out, method, stored_facts(out, method)["train_key"])
    # The users, of whom there are more now, would come after the others if their number told.
    monkeypatch.setattr("graphhash.models.ctr_fields.JOINT_ROWS", before.maps[0].n_ids + 1)
    before = load_ctr(out / "methods" / method, out / "ingest")
    after = with_folded_columns(before, folded)
    assert after.maps[0].n_ids > before.maps[0].n_ids
    assert after.model.fields.order == before.model.fields.order
    mixtures = load_mixtures(out / "methods" / method)
    [group] = folded.groups.values()
    for side, number in (("users", 0), ("items", 1)):
        mixed, table = group.maps[side], mixtures[number].table
        n_last = 1 + before.features.columns[number].has_missing
        n_trained = before.maps[number].n_ids + 1 - n_last
        n_new = after.maps[number].n_ids - before.maps[number].n_ids
        rows = after.model.embeddings[number].table
        for new in range(n_new):
            # Mixtures are in the order trained entries, among them the missing value's, and new ids.
            entry = before.maps[number].n_ids + new
            expected = sum(
                w * table[r] for w, r in zip(mixed.codebook[mixed.codes[entry]], mixed.rows[entry], strict=True)
            )
            np.testing.assert_allclose(rows[n_trained + new].detach(), expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(rows[-n_last:].detach(), before.model.embeddings[number].table[-n_last:].detach())
    from pipeline.ctr.evaluate import predict

    test = before.features.part("test")
    now = renumbered(test, before.features.columns, after.features.columns)
    np.testing.assert_array_equal(predict(before.model, test), predict(after.model, now))


def test_a_training_without_its_mixtures_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"mixtures.npz: not readable .*; remove .*, and run 'graphhash run' again"):
        load_mixtures(tmp_path)


@pytest.fixture(scope="module")
def normalized(whole, tmp_path_factory):
    """A run of a model with batch normalization, whose statistics are no parameters, and with a calibration."""
    folder = tmp_path_factory.mktemp("normalized")
    settings = {
        "run.out": str(folder / "out"),
        "run.methods": METHODS[3:4],
        "train.model": "finalnet",
        "train.epochs": 4,
    }
    run(RunConfig.from_flat(RunConfig.load(whole / "out" / "config.toml").flat() | settings))
    return folder


@pytest.mark.parametrize("folder", ["whole", "normalized"])
def test_a_bundle_answers_known_rows_as_before(folder, request, tmp_path):
    out, later = copied(request.getfixturevalue(folder), tmp_path)
    run_config = RunConfig.load(out / "config.toml", **{"run.out": str(out)})
    log = known_log()
    rows = {name: values[:500] for name, values in log.items() if name != "click"}
    before = Scorer(out / "bundle", provider="cpu").details(rows)
    method = run_config.run.methods[0]
    update(out, later, method=method)
    after = Scorer(out / "bundle", provider="cpu").details(rows)
    np.testing.assert_allclose(after.logits, before.logits, atol=2e-6)
    for name, there in before.known.items():
        np.testing.assert_array_equal(after.known[name], there)
    manifest = json.loads((out / "bundle" / "manifest.json").read_text())
    assert manifest["provenance"]["updates"][0]["columns"]["user"]["new"] == 30


def test_a_new_user_reads_what_a_trained_one_with_the_same_samples_reads(whole, tmp_path):
    """Of community methods and soft ones: the rows of a copy of a trained user are near to the user's own."""
    out, _ = copied(whole, tmp_path)
    log = known_log()
    twin = [("twin" if user == "u003" else user) for user in log["user"]]
    chosen = [i for i, user in enumerate(twin) if user == "twin"]
    write_csv(
        tmp_path / "twin.csv", {name: [values[i] for i in chosen] for name, values in (log | {"user": twin}).items()}
    )
    update(out, str(tmp_path / "twin.csv"), method="graph")
    folded = open_folded_columns(out, "graph", stored_facts(out, "graph")["train_key"])
    ids = folded.vocabularies[0].ids.to_pylist()
    rows = folded.maps[0].rows
    # Its positive samples of all parts are those of one taste; so is its community.
    users = rows[: len(ids), 0]
    same_group = [ids.index(user) for user in ids if user != "twin"]
    assert users[ids.index("twin")] in users[same_group]
    assert users[ids.index("twin")] == users[ids.index("u003")]


def test_the_same_log_twice_changes_nothing_and_a_further_one_goes_on(whole, tmp_path):
    out, later = copied(whole, tmp_path)
    update(out, later, method="soft")
    first = stored_facts(out, "soft")
    again = update(out, later, method="soft")
    assert again["bundle"] == "unchanged"
    assert all(counts["folded_in"] == 0 for counts in again["columns"].values())
    assert stored_facts(out, "soft") == first
    more = later_log() | {"user": ["w1" if i % 3 else "w2" for i in range(1500)]}
    write_csv(tmp_path / "more.csv", more)
    further = update(out, str(tmp_path / "more.csv"), method="soft")
    assert further["columns"]["user"] == {"new": 2, "folded_in": 2, "unassigned": 0}
    folded = open_folded_columns(out, "soft", first["train_key"])
    before = with_folded_columns(load_ctr(out / "methods" / "soft", out / "ingest"), folded)
    assert before.vocabularies[0].ids.to_pylist()[-2:] == ["w1", "w2"]
    assert len(folded.updates) == 2


def test_values_without_a_positive_sample_stay_unassigned(whole, tmp_path):
    out, _ = copied(whole, tmp_path)
    log = later_log()
    write_csv(tmp_path / "negative.csv", log | {"click": [0] * 1500})
    result = update(out, str(tmp_path / "negative.csv"), method="graph")
    assert result["columns"]["user"] == {"new": 30, "folded_in": 0, "unassigned": 30}
    # A hash needs none.
    assert result["columns"]["device"]["folded_in"] == 3


def test_what_cannot_be_updated_is_said(whole, tmp_path):
    out, later = copied(whole, tmp_path)
    with pytest.raises(ConfigError, match=r"method 'robe' has no rows that a new value could read"):
        update(out, later, method="robe")
    with pytest.raises(ConfigError, match=r"--refit is not supported with run.task=ctr"):
        update(out, later, method="graph", refit=(0.2, 0))
    assert Features.open(out / "ingest").columns
