"""Answers for raw ids given as text, and what a user has seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.bundles.recommend import recommend
from pipeline.cli.main import app
from pipeline.distributed.shards import ShardedCsr
from tests.helpers.small_models import naive_answer, small_model

ROOT = Path(__file__).resolve().parents[3]


def make_run(path, kind):
    """A run folder with a bundle, vocabularies and a training graph in three shards."""
    small = small_model(kind, kind)
    (path / "ingest").mkdir(parents=True)
    small.export(path / "bundle")
    small.users.save(path / "ingest" / "users.parquet")
    small.items.save(path / "ingest" / "items.parquet")
    seen = np.random.default_rng(1).random((len(small.users), len(small.items))) < 0.3
    ShardedCsr.write(path / "ingest" / "train", csr_array(seen.astype(np.float32)), n_shards=3)
    return small, seen


@pytest.fixture(scope="module", params=["int64", "string"])
def case(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "run"
    return path, *make_run(path, request.param)


def as_text(ids) -> list[str]:
    return [str(value) for value in ids.tolist()]


def items_of(answer) -> list:
    return [item["item_id"] for item in answer["items"]]


def test_answers_are_those_of_the_model(case):
    path, small, _ = case
    users = small.users.ids.to_pylist()
    for user, answer in zip(users, recommend(path / "bundle", [str(user) for user in users], 5), strict=True):
        assert answer["user_id"] == user
        assert answer["known"] is True
        item_ids, scores, _ = naive_answer(small, user, 5, [])
        assert items_of(answer) == item_ids
        assert [item["score"] for item in answer["items"]] == scores


def test_the_command_imports_nothing_that_an_answer_does_not_need(case):
    path, small, _ = case
    user = str(small.users.ids[0].as_py())
    heavy = ["torch", "ray", "mlflow", "numba", "scipy", "pyarrow", "pandas", "onnx", "pydantic", "matplotlib"]
    code = (
        "import sys\nfrom pipeline.cli.main import app\n"
        f"app.main(['recommend', {str(path / 'bundle')!r}, '--user-id', {user!r}], standalone_mode=False)\n"
        f"print('imported', *(name for name in {heavy!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"user {user}"
    assert done.stdout.splitlines()[-1] == "imported"


def test_seen_and_excluded_items_are_left_out(case):
    path, small, seen = case
    excluded = as_text(small.items.take([0, 5]))
    answers = recommend(
        path / "bundle",
        as_text(small.users.take(np.arange(len(small.users)))),
        100,
        exclude=excluded,
        exclude_seen=True,
    )
    for row, answer in enumerate(answers):
        allowed = np.flatnonzero(~seen[row])
        assert set(items_of(answer)) == set(small.items.take(allowed[~np.isin(allowed, [0, 5])]).tolist())


def test_excluded_items_that_the_bundle_does_not_know_are_named(case, caplog):
    path, small, _ = case
    unknown = "424242" if small.items.kind == "int64" else "no, such item"
    user, item = str(small.users.ids[0].as_py()), as_text(small.items.take([0]))[0]
    recommend(path / "bundle", [user], 3, exclude=[item])
    assert not caplog.messages
    recommend(path / "bundle", [user], 3, exclude=[item, unknown])
    named = 424242 if small.items.kind == "int64" else unknown
    assert caplog.messages == [f"exclude: 1 of 2 items are not in the bundle: {named!r}"]


def test_excluded_ids_are_given_among_commas_and_in_a_file(case, tmp_path):
    path, small, _ = case
    texts = as_text(small.items.take(np.arange(len(small.items))))
    in_file, among_commas = [row for row, text in enumerate(texts) if text.isalnum() and text.isascii()][:2]
    file, answers = tmp_path / "excluded.txt", tmp_path / "answers.json"
    file.write_text(texts[in_file] + "\n", encoding="utf-8")
    words = ["--user-id", str(small.users.ids[0].as_py()), "-k", "100", "--json", str(answers)]
    words += ["--exclude", texts[among_commas], "--exclude-file", str(file)]
    app.main(["recommend", str(path / "bundle"), *words], standalone_mode=False)
    (answer,) = json.loads(answers.read_text(encoding="utf-8"))
    left = np.delete(np.arange(len(small.items)), [in_file, among_commas])
    assert set(items_of(answer)) == set(small.items.take(left).tolist())


def test_unknown_user_is_marked_and_has_seen_nothing(case):
    path, small, _ = case
    unknown = "424242" if small.users.kind == "int64" else "nobody"
    (answer,) = recommend(path / "bundle", [unknown], 100, exclude_seen=True)
    assert answer["known"] is False
    assert len(answer["items"]) == len(small.items)


@pytest.mark.parametrize(
    ("text", "message"), [("anna", "'anna' is not a whole number"), (str(2**63), "does not fit int64")]
)
def test_id_of_another_type_is_refused(tmp_path, text, message):
    make_run(tmp_path / "run", "int64")
    with pytest.raises(DataError, match=message):
        recommend(tmp_path / "run" / "bundle", [text], 5)
    with pytest.raises(DataError, match=message):
        recommend(tmp_path / "run" / "bundle", ["1"], 5, exclude=[text])


def test_bundle_outside_its_run_folder_knows_nothing_seen(tmp_path):
    _small, _ = make_run(tmp_path / "run", "int64")
    shutil.copytree(tmp_path / "run" / "bundle", tmp_path / "alone")
    with pytest.raises(DataError, match="what users have seen is not known"):
        recommend(tmp_path / "alone", ["1"], 5, exclude_seen=True)
    Vocabulary.from_ids(np.arange(9)).save(tmp_path / "run" / "ingest" / "users.parquet")
    with pytest.raises(DataError, match=r"not the ids that .* was made with"):
        recommend(tmp_path / "run" / "bundle", ["1"], 5, exclude_seen=True)
