from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving import BundleError, Retriever, bundle_model, retriever, session
from tests.helpers.small_models import INT_IDS, STRING_IDS, naive_answer, small_model
from tests.helpers.tampering import rewrite

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integers") / "bundle"
    small = small_model()
    small.export(folder)
    return small, Retriever(folder, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def strings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strings") / "bundle"
    small = small_model(users="string", items="string")
    small.export(folder)
    return small, Retriever(folder, provider="cpu", threads=1)


def same(a, b) -> bool:
    return (
        all(np.array_equal(x, y) for x, y in zip(a.item_ids, b.item_ids, strict=True))
        and all(np.array_equal(x, y) for x, y in zip(a.scores, b.scores, strict=True))
        and np.array_equal(a.known, b.known)
    )


def test_onnx_runtime_reports_to_nobody_and_writes_nothing_at_home(tmp_path):
    """Its packages of 1.29 and later do, unless they run in CI."""
    small_model().export(tmp_path / "bundle")
    (tmp_path / "home").mkdir()
    quiet = ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    variables = {name: value for name, value in os.environ.items() if name not in quiet}
    variables |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    code = f"""
import os
import serving
serving.Retriever({str(tmp_path / "bundle")!r}).recommend([3], 2)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""

    def run(**more: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env=variables | more, capture_output=True, text=True, check=True
        ).stdout

    assert run() == "1\n"
    assert list((tmp_path / "home").iterdir()) == []
    assert run(ORT_DISABLE_TELEMETRY="0") == "0\n", "a choice is kept"


@pytest.mark.parametrize(
    "ids",
    [
        [3, 12],
        (3, 12),
        range(3, 13, 9),
        np.array([3, 12]),
        np.array([3, 12], np.uint8),
        np.array([3, 12], object),
    ],
)
def test_ids_may_come_as_any_sequence_of_integers(ids, integers):
    small, loaded = integers
    got = loaded.recommend(ids, 5)
    assert [row.tolist() for row in got.item_ids] == [naive_answer(small, user, 5, [])[0] for user in (3, 12)]
    assert got.item_ids[0].dtype == np.int64
    assert got.scores[0].dtype == np.float32
    assert got.known.dtype == bool


@pytest.mark.parametrize(
    "ids", [["a", "nobody"], ("a", "nobody"), np.array(["a", "nobody"]), np.array(["a", "nobody"], object)]
)
def test_ids_may_come_as_any_sequence_of_strings(ids, strings):
    small, loaded = strings
    got = loaded.recommend(ids, 5)
    assert [row.tolist() for row in got.item_ids] == [naive_answer(small, user, 5, [])[0] for user in ("a", "nobody")]
    assert got.known.tolist() == [True, False]


def test_every_boundary_id_reads_its_own_row(integers, strings):
    for (small, loaded), ids in ((integers, INT_IDS), (strings, STRING_IDS)):
        got = loaded.recommend(ids, 23)
        assert got.known.all()
        assert [row.tolist() for row in got.scores] == [naive_answer(small, user, 23, [])[1] for user in ids]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["03"], r"user_ids\[0\] is '03'; this model takes int64 ids"),
        ([3, "a"], r"user_ids\[1\] is 'a'"),
        (np.array(["+3"]), r"user_ids\[0\] is '\+3'"),
        ([3.5], r"user_ids\[0\] is 3\.5"),
        (np.array([3.5]), r"user_ids\[0\] is 3\.5"),
        (np.array([2.0**60]), r"user_ids\[0\] is 1\.15"),
        ([3, True], r"user_ids\[1\] is True"),
        (np.array([True]), r"user_ids\[0\] is True"),
        ([None], r"user_ids\[0\] is None"),
        ([[3], [12]], r"user_ids\[0\] is \[3\]"),
        (np.array([[3]]), "pass a list of int64 ids"),
        (3, "pass a list of int64 ids"),
        ("3", "pass a list of int64 ids"),
        ([2**63], "leaves int64"),
        (np.array([2**63], np.uint64), "leaves int64"),
    ],
)
def test_ids_of_another_type_are_refused_with_the_value(ids, message, integers):
    with pytest.raises(ValueError, match=message):
        integers[1].recommend(ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([True], r"user_ids\[0\] is True; this model takes string ids"),
        (np.array([2.0**60]), r"user_ids\[0\] is 1\.15"),
        (["a", b"\xff"], r"user_ids\[1\] is b'\\xff'"),
        (["a", None], r"user_ids\[1\] is None"),
        ("abc", "pass a list of string ids"),
        (["a", "\ud800"], "UTF-8"),
    ],
)
def test_strings_are_checked_too(ids, message, strings):
    with pytest.raises(ValueError, match=message):
        strings[1].recommend(ids)


@pytest.mark.parametrize("k", [0, -1, 2.0, "3", None, True])
def test_k_below_one_or_of_another_type_is_refused(k, integers):
    with pytest.raises(ValueError, match="pass a whole number from 1"):
        integers[1].recommend([3], k)


@pytest.mark.parametrize("k", [24, 2**40, 2**70, np.int32(100)])
def test_k_over_the_catalogue_gives_all_of_it(k, integers):
    assert len(integers[1].recommend([3], k).item_ids[0]) == 23


def test_an_empty_batch_gets_an_empty_answer(integers, strings):
    for loaded in (integers[1], strings[1]):
        for none in ([], np.array([])):
            got = loaded.recommend(none, exclude=[])
            assert got.item_ids == []
            assert got.scores == []
            assert got.known.shape == (0,)


def test_exclude_is_checked(integers):
    _, loaded = integers
    with pytest.raises(ValueError, match="exclude has 1 lists for 2 users"):
        loaded.recommend([3, 12], exclude=[[1]])
    with pytest.raises(ValueError, match=r"exclude\[1\]\[0\] is 'x'; this model takes int64 ids"):
        loaded.recommend([3, 12], exclude=[[1], ["x"]])
    with pytest.raises(ValueError, match=r"exclude\[0\] is 3"):
        loaded.recommend([3], exclude=[3])
    with pytest.raises(ValueError, match="one list of item ids per user"):
        loaded.recommend([3], exclude=3)


def test_many_users_in_small_chunks_get_the_same_answers(integers, monkeypatch):
    _small, loaded = integers
    rng = np.random.default_rng(0)
    users = rng.choice([*INT_IDS, 55], 500)
    exclude = [rng.choice(INT_IDS, n % 5) for n in range(500)]
    whole = loaded.recommend(users, 7, exclude)
    for size in (1, 24 * 4 * 7):
        monkeypatch.setattr(retriever, "_CHUNK_SCORE_BYTES", size)
        assert same(loaded.recommend(users, 7, exclude), whole)


def test_cuda_is_refused_where_it_is_not_in_use(integers):
    if session.n_cuda_devices():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BundleError, match="'cuda' is not in use") as error:
        Retriever(integers[1].path, provider="cuda")
    assert "\n" not in str(error.value)


def test_auto_says_what_it_got_and_answers_the_same(integers):
    _small, loaded = integers
    automatic = Retriever(loaded.path)
    assert automatic.provider == ("cuda" if "CUDAExecutionProvider" in automatic._session.get_providers() else "cpu")
    assert same(automatic.recommend(INT_IDS, 23), loaded.recommend(INT_IDS, 23))


@pytest.mark.parametrize("kind", ["integers", "strings"])
def test_cuda_answers_like_the_cpu(kind, request):
    if not session.n_cuda_devices():
        pytest.skip("no CUDA device")
    small, loaded = request.getfixturevalue(kind)
    users = small.users.ids.to_pylist()
    on_gpu = Retriever(loaded.path, provider="cuda")
    assert same(on_gpu.recommend(users, 23), loaded.recommend(users, 23))
    candidates = [small.items.ids.to_pylist()] * len(users)
    assert np.array_equal(on_gpu.score(users, candidates).scores, loaded.score(users, candidates).scores)


def test_bound_inputs_and_outputs_answer_like_plain_ones(integers, monkeypatch):
    small, loaded = integers
    users, items = small.users.ids.to_pylist(), small.items.ids.to_pylist()
    plain = loaded.recommend(users, 5, [items[:2]] * 14), loaded.score(users, [items] * 14)
    monkeypatch.setattr(loaded, "_bound", True)
    monkeypatch.setattr(bundle_model, "bound_run", lambda *parts: session.bound_run(*parts[:-1], "cpu"))
    assert same(loaded.recommend(users, 5, [items[:2]] * 14), plain[0])
    assert np.array_equal(loaded.score(users, [items] * 14).scores, plain[1].scores)


def test_a_hundred_thousand_users_are_answered_in_bounded_memory(integers):
    import psutil

    _small, loaded = integers
    users = np.random.default_rng(0).choice([*INT_IDS, 55], 100_000)
    candidates = np.random.default_rng(1).choice(INT_IDS, (100_000, 4))
    loaded.recommend(users[:5000], 2), loaded.score(users[:5000], candidates[:5000])
    before = psutil.Process().memory_info().rss
    got, scored = loaded.recommend(users, 2), loaded.score(users, candidates)
    # 100,000 pairs of small arrays are some 30 MB; all scores at once would be 18 MB more per array of them.
    assert psutil.Process().memory_info().rss - before < 150 * 2**20
    assert len(got.item_ids) == 100_000
    assert got.known.sum() == (users != 55).sum()
    assert scored.scores.shape == (100_000, 4)
    assert np.isfinite(scored.scores).all()


def test_a_graph_of_another_bundle_is_refused(integers, tmp_path):
    shutil.copytree(integers[1].path, tmp_path / "bundle")
    rewrite(tmp_path / "bundle", lambda m: m.update(n_items=5))
    with pytest.raises(BundleError, match="of different bundles"):
        Retriever(tmp_path / "bundle")


@pytest.mark.parametrize("arguments", [{"provider": "gpu"}, {"threads": 0}, {"threads": True}, {"threads": 1.5}])
def test_bad_arguments_are_refused(arguments, integers):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Retriever(integers[1].path, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["outputs"]["score"].update(dtype="int64"), "the manifest states outputs"),
        (lambda m: m["inputs"].pop("k"), "the manifest states inputs"),
        (lambda m: m.update(task="ctr"), "columns is None"),
    ],
)
def test_a_manifest_that_does_not_fit_the_graph_is_refused(change, message, integers, tmp_path):
    shutil.copytree(integers[1].path, tmp_path / "bundle")
    rewrite(tmp_path / "bundle", change)
    with pytest.raises(BundleError, match=message):
        Retriever(tmp_path / "bundle")


def test_a_file_that_is_no_model_is_refused_in_one_line(integers, tmp_path):
    shutil.copytree(integers[1].path, tmp_path / "bundle")
    (tmp_path / "bundle/model.onnx").write_bytes(b"no model")
    entry = {"bytes": 8, "sha256": hashlib.sha256(b"no model").hexdigest()}
    rewrite(tmp_path / "bundle", lambda m: m["files"].update({"model.onnx": entry}))
    with pytest.raises(BundleError, match="cannot load it") as error:
        Retriever(tmp_path / "bundle")
    assert "\n" not in str(error.value)


def naive_scores(small, users, candidates):
    """Scores of known items from the obvious loop, of unknown ones from the fallback row alone."""
    ids = small.items.ids.to_pylist()
    rows = []
    for user, asked in zip(users, candidates, strict=True):
        answer = naive_answer(small, user, len(ids), [])
        score_of = dict(zip(answer[0], answer[1], strict=True))
        rows.append([score_of.get(item) for item in asked])
    return rows


@pytest.mark.parametrize("kind", ["integers", "strings"])
def test_candidates_score_as_in_the_catalogue_and_unknown_ones_are_marked(kind, request):
    small, loaded = request.getfixturevalue(kind)
    users = [*small.users.ids.to_pylist(), 55 if kind == "integers" else "nobody"]
    item_ids, rng = small.items.ids.to_pylist(), np.random.default_rng(0)
    nothing = 77 if kind == "integers" else "nothing"
    candidates = [[*(item_ids[i] for i in rng.integers(0, 23, 9)), nothing] for _ in users]
    got = loaded.score(users, candidates)
    assert got.scores.dtype == np.float32
    assert got.scores.shape == (15, 10)
    assert got.known.tolist() == [True] * 14 + [False]
    assert got.known_items.tolist() == [[True] * 9 + [False]] * 15
    assert [row[:9] for row in got.scores.tolist()] == [row[:9] for row in naive_scores(small, users, candidates)]
    assert np.isfinite(got.scores[:, 9]).all()


def test_candidates_in_small_chunks_get_the_same_scores(integers, monkeypatch):
    _small, loaded = integers
    rng = np.random.default_rng(0)
    users, candidates = rng.choice([*INT_IDS, 55], 300), rng.choice([*INT_IDS, 55], (300, 11))
    whole = loaded.score(users, candidates)
    for size in (1, 4 * 4 * 4 * 7, 4 * 4 * 4 * 50):
        monkeypatch.setattr(retriever, "_CHUNK_SCORE_BYTES", size)
        got = loaded.score(users, candidates)
        assert np.array_equal(got.scores, whole.scores)
        assert np.array_equal(got.known_items, whole.known_items)
        assert np.array_equal(got.known, whole.known)


@pytest.mark.parametrize(("users", "shape"), [([], (0, 0)), ([3], (1, 0))])
def test_no_users_and_no_candidates_are_answered(users, shape, integers):
    got = integers[1].score(users, [[]] * len(users))
    assert got.scores.shape == got.known_items.shape == shape
    assert got.known.tolist() == [True] * len(users)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([[1], [2]], "2 lists for 1 users"),
        ([1], r"item_ids\[0\] is 1; pass a list"),
        ("3", "one list of item ids per user"),
        (3, "one list of item ids per user"),
        (np.array(3), "one list of item ids per user"),
        ([["a"]], r"item_ids\[0\]\[0\] is 'a'; this model takes int64 ids"),
        (np.array([["a"]]), "this model takes int64 ids"),
        (np.array([[1.5]]), r"item_ids\[0\]\[0\] is 1\.5"),
        ([[2**63]], "leaves int64"),
    ],
)
def test_candidates_of_another_shape_or_type_are_refused(items, message, integers):
    with pytest.raises(ValueError, match=message):
        integers[1].score([3], items)


def test_candidate_lists_of_several_lengths_are_refused(integers):
    with pytest.raises(ValueError, match="lists of 1 to 2 items"):
        integers[1].score([3, 12], [[1], [1, 2]])
