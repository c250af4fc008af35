from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.config.run_config import DataConfig
from pipeline.distributed import session
from pipeline.distributed.session import ray_session, run_tasks
from pipeline.distributed.shards import ShardedCsr
from pipeline.logs import sources
from pipeline.retrieval import ingest as module
from pipeline.retrieval.ingest import ingest
from pipeline.retrieval.ingestion.ranges import Ranges

MASK = 2**64 - 1
GRAPHS = ("train", "train_by_item", "validation", "test")


def mix(state):
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & MASK
    return state ^ state >> 31


def naive_ingest(log, *, seed, validation, test, given=None):
    """With dicts and loops: ids, and {(user row, item row): weight} of train, validation and test."""

    def by_bytes(raw):
        return raw.encode() if isinstance(raw, str) else raw

    users, items = (sorted({row[side] for row in log}, key=by_bytes) for side in (0, 1))
    row_of = [{raw: row for row, raw in enumerate(side)} for side in (users, items)]

    def merged(rows):
        edges = {}
        for user, item, weight in rows:
            pair = (row_of[0][user], row_of[1][item])
            edges[pair] = edges.get(pair, 0.0) + weight
        return edges

    edges = merged(log)
    state = mix(mix(seed))
    number = {(u, i): mix((mix((state + u) & MASK) + i) & MASK) for u, i in edges}
    kept = {min(group, key=number.get) for side in (0, 1) for group in groups(edges, side)}
    parts = {"train": {}, "validation": {}, "test": {}}
    for pair, weight in edges.items():
        share = mix(number[pair] ^ 0x5851F42D4C957F2D) / 2**64
        bounds = test if given is None else 0.0
        part = "test" if share < bounds else "validation" if share < bounds + validation else "train"
        parts["train" if pair in kept else part][pair] = weight
    if given is not None:
        parts["test"] = merged(given)
    return users, items, parts


def groups(edges, side):
    found = {}
    for pair in edges:
        found.setdefault(pair[side], []).append(pair)
    return found.values()


def random_log(kind, n_rows=400, weighted=True, seed=0):
    rng = np.random.default_rng(seed)
    users = (rng.zipf(1.5, n_rows) % 40 - 5).tolist()
    items = (rng.integers(0, 30, n_rows) * 1000).tolist()
    if kind == "string":
        users, items = [f"ü{u}" if u else "" for u in users], [f"item {i}" for i in items]
    weights = (rng.random(n_rows) + 0.1).tolist() if weighted else [1.0] * n_rows
    return list(zip(users, items, weights, strict=True))


def write_log(folder: Path, log, n_files=1, name="log"):
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(log)), n_files)):
        users, items, weights = zip(*(log[i] for i in part), strict=True)
        table = pa.table({"user_id": users, "item_id": items, "w": weights})
        pq.write_table(table, folder / f"{name}-{number}.parquet", row_group_size=50)
    return folder


def edges_of(graph: ShardedCsr):
    matrix = graph.load().tocoo()
    return {(int(r), int(c)): float(w) for r, c, w in zip(*matrix.coords, matrix.data, strict=True)}


def single(edges):
    return {pair: float(np.float32(weight)) for pair, weight in edges.items()}


def csv_log(folder: Path, name: str, rows) -> Path:
    path = folder / name
    path.write_text("user_id,item_id,w\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return path


@pytest.mark.parametrize("split", ["random", "given"])
@pytest.mark.parametrize(("kind", "weighted"), [("int64", True), ("string", True), ("int64", False)])
def test_ingest_is_the_naive_one_for_any_shards_files_and_chunks(split, kind, weighted, tmp_path, monkeypatch):
    log, given = random_log(kind, weighted=weighted), None
    if split == "given":
        # Test rows: known users and items in pairs that train does not have.
        train_pairs = {row[:2] for row in log}
        pairs = [(u, i, 2.0) for u in {r[0] for r in log} for i in {r[1] for r in log} if (u, i) not in train_pairs]
        given = sorted(pairs, key=str)[::7] * 2
    users, items, parts = naive_ingest(log, seed=5, validation=0.2, test=0.3, given=given)

    contents = set()
    for n_shards, n_files, chunk_rows in [(1, 1, 10**6), (2, 3, 60), (7, 5, 1)]:
        monkeypatch.setattr(sources, "CHUNK_ROWS", chunk_rows)
        monkeypatch.setattr(module, "PARTITION_EDGES", 10**6 if n_shards < 7 else 30)
        monkeypatch.setattr(module, "BLOCK_ROWS", 10**6 if n_shards < 7 else 11)
        folder = write_log(tmp_path / f"log{n_shards}", log, n_files, name="train")
        if given:
            write_log(folder, given, 1, name="test")
        config = DataConfig(
            path=str(folder),
            weight_column="w" if weighted or given else None,
            split=split,
            validation=0.2,
            test=0.3,
            seed=5,
            shards=n_shards,
        )
        out = tmp_path / f"out{n_shards}"
        result = ingest(config, out)

        assert Vocabulary.load(out / "users.parquet").ids.to_pylist() == users
        assert Vocabulary.load(out / "items.parquet").ids.to_pylist() == items
        graphs = {name: ShardedCsr.open(out / name) for name in GRAPHS}
        for name, edges in parts.items():
            assert edges_of(graphs[name]) == single(edges)
            assert result[f"n_{name}"] == graphs[name].n_edges == len(edges)
        assert edges_of(graphs["train_by_item"]) == {(i, u): w for (u, i), w in single(parts["train"]).items()}
        assert all(graph.n_shards == n_shards for graph in graphs.values())
        assert result["n_users"] == len(users)
        assert result["n_items"] == len(items)
        assert result["n_rejected"] == 0
        assert json.loads((out / "ingest.json").read_text()) == result
        assert {p.name for p in out.iterdir()} == {"users.parquet", "items.parquet", "ingest.json", *GRAPHS}
        bytes_ = [a.tobytes() for name in GRAPHS for a in graphs[name].read(0, graphs[name].n_rows)]
        contents.add((*bytes_, result["users_hash"], result["items_hash"], *(g.total_weight for g in graphs.values())))
    assert len(contents) == 1
    assert not list(tmp_path.glob(".*"))


def test_splits_are_disjoint_complete_and_keep_every_id_in_train(tmp_path):
    log = random_log("int64", 1000)
    ingest(
        DataConfig(path=str(write_log(tmp_path / "log", log)), validation=0.3, test=0.6, shards=3),
        tmp_path / "out",
    )
    edges = {name: set(edges_of(ShardedCsr.open(tmp_path / "out" / name))) for name in ("train", "validation", "test")}
    assert sum(map(len, edges.values())) == len(set.union(*edges.values())) == len({row[:2] for row in log})
    train = ShardedCsr.open(tmp_path / "out" / "train").load()
    assert np.all(np.diff(train.indptr) > 0)
    assert np.all(train.sum(axis=0) > 0)


def test_without_a_weight_column_duplicates_count(tmp_path):
    path = csv_log(tmp_path, "log.csv", [(1, 2, 9), (1, 2, 9), (1, 3, 9)])
    ingest(DataConfig(path=str(path)), tmp_path / "out")
    assert edges_of(ShardedCsr.open(tmp_path / "out" / "train")) == {(0, 0): 2.0, (0, 1): 1.0}


def test_skipped_rows_are_counted_and_kept_in_order(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    csv_log(folder, "train.csv", [(1, 2, 1), (1, 3, "x"), (2, 2, 1), (2, 3), (3, 3, 1), (2, "", 1)])
    csv_log(folder, "test.csv", [(1, 9, 1), (1, 3, 1), (9, 2, 1), (2, 2, 1), (3, 2, -1), (1, 9, 1)])
    config = DataConfig(path=str(folder), weight_column="w", split="given", bad_rows="skip", validation=0.0, shards=4)
    result = ingest(config, tmp_path / "out")
    assert (result["n_train"], result["n_test"], result["n_rejected"]) == (3, 1, 8)
    rejected = [tuple(row.values()) for row in pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()]
    train, test = str(folder / "train.csv"), str(folder / "test.csv")
    assert rejected == [
        (train, 3, "column 'w' is not a number", "user_id=1, item_id=3, w=x"),
        (train, 5, "2 fields, the header has 3", "2,3"),
        (train, 7, "column 'item_id' is null", "user_id=2, item_id=, w=1"),
        (test, 6, "column 'w' is not above zero", "user_id=3, item_id=2, w=-1"),
        (test, 2, "the item is not in train", "user_id=1, item_id=9"),
        (test, 4, "the user is not in train", "user_id=9, item_id=2"),
        (test, 5, "the pair is in train too, it would leak", "user_id=2, item_id=2"),
        (test, 7, "the item is not in train", "user_id=1, item_id=9"),
    ]


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [(1, 3, 1), (2, 9, 1), (9, 9, 1)],
            "test.csv: row 3: the item is not in train (user_id=2, item_id=9)",
        ),
        (
            [(1, 3, 1), (9, 2, 1), (2, 9, 1)],
            "test.csv: row 3: the user is not in train (user_id=9, item_id=2)",
        ),
        (
            [(2, 2, 1), (2, 9, 1)],
            "test.csv: row 2: the pair is in train too, it would leak (user_id=2, item_id=2)",
        ),
    ],
)
def test_a_test_row_that_does_not_fit_train_is_named(rows, words, shards, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    csv_log(folder, "train.csv", [(1, 2, 1), (2, 2, 1), (3, 3, 1)])
    csv_log(folder, "test.csv", rows)
    with pytest.raises(DataError) as error:
        ingest(DataConfig(path=str(folder), split="given", shards=shards), tmp_path / "out")
    assert words in str(error.value)
    assert "--bad-rows skip" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_crosses_ray_as_one_line_from_the_first_file_and_leaves_the_old_result(tmp_path, ray_local):
    folder = write_log(tmp_path / "log", random_log("int64"), n_files=2)
    config = DataConfig(path=str(folder), weight_column="w")
    ingest(config, tmp_path / "out")
    before = (tmp_path / "out" / "ingest.json").read_bytes()
    for number in (3, 2):
        table = pa.table({"user_id": [1, 1], "item_id": [1, 2], "w": [1.0, -number]})
        pq.write_table(table, folder / f"log-{number}.parquet")
    with pytest.raises(DataError) as error:
        ingest(config, tmp_path / "out")
    assert type(error.value) is DataError
    assert len(error.value.args) == 1
    assert f"{folder / 'log-2.parquet'}: row 2: column 'w' is not above zero" in str(error.value)
    assert (tmp_path / "out" / "ingest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


def test_a_log_of_bad_rows_alone_is_an_error_even_when_skipping(tmp_path):
    path = csv_log(tmp_path, "log.csv", [(1, 2, 0), (1, 3, 0)])
    with pytest.raises(DataError, match="all 2 rows were rejected"):
        ingest(DataConfig(path=str(path), weight_column="w", bad_rows="skip"), tmp_path / "out")


def test_weights_that_overflow_float32_when_merged_are_an_error(tmp_path):
    path = csv_log(tmp_path, "log.csv", [(1, 2, 3e38), (1, 2, 3e38)])
    with pytest.raises(DataError, match="add up to 6e"):
        ingest(DataConfig(path=str(path), weight_column="w"), tmp_path / "out")


@pytest.mark.parametrize("n_ranges", [1, 3, 50])
@pytest.mark.parametrize("n_rows", [0, 1, 40, 100_000])
def test_ranges_hold_every_row_once_and_about_as_many_edges(n_rows, n_ranges):
    n_edges = np.random.default_rng(0).zipf(2.5, n_rows).clip(max=30)
    ranges = Ranges.balanced(np.arange(n_rows), n_edges, n_rows, n_ranges)
    rows = np.arange(n_rows)
    part = ranges.part_of_cell[rows >> ranges.shift]
    assert len(ranges) == n_ranges
    assert (ranges.bounds[0], ranges.bounds[-1]) == (0, n_rows)
    assert np.array_equal(part, np.searchsorted(ranges.bounds, rows, side="right") - 1)
    if n_rows == 100_000:
        sums = np.bincount(part, weights=n_edges, minlength=n_ranges)
        assert np.all(abs(sums / n_edges.sum() * n_ranges - 1) < 0.2)


def square(number, bad, waits):
    if waits and number == 1:
        time.sleep(0.3)
    if number in bad:
        raise DataError(f"number {number}")
    return number**2


def test_the_earliest_failing_task_decides_the_error(ray_local):
    tasks = [(n, (), True) for n in range(9)]
    assert run_tasks(square, tasks, label="x", n_in_flight=2) == [n**2 for n in range(9)]
    with pytest.raises(DataError, match="number 1"):
        run_tasks(square, [(n, (1, 3), True) for n in range(6)], label="x", n_in_flight=4)


@pytest.fixture
def no_ray(monkeypatch):
    """As in a process that has not started Ray, whatever other tests have done."""
    monkeypatch.setattr(session, "is_running", lambda: False)


def test_without_ray_tasks_are_calls(no_ray):
    assert run_tasks(square, [(n, (), False) for n in range(9)], label="x") == [n**2 for n in range(9)]
    with pytest.raises(DataError, match="number 1"):
        run_tasks(square, [(n, (1, 3), False) for n in range(6)], label="x")


def test_ray_tasks_and_this_process_write_the_same_bytes(tmp_path, ray_local, monkeypatch):
    config = DataConfig(path=str(write_log(tmp_path / "log", random_log("string"), 3)), weight_column="w", shards=3)
    contents = []
    for is_running in (True, False):
        monkeypatch.setattr(session, "is_running", lambda answer=is_running: answer)
        out = tmp_path / str(is_running)
        facts = ingest(config, out)
        files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
        content = {file: (out / file).read_bytes() for file in files if file.name != "ingest.json"}
        contents.append((content, {key: value for key, value in facts.items() if key != "seconds"}))
    assert contents[0] == contents[1]


def test_a_session_inside_a_session_uses_and_leaves_the_outer_one(ray_local):
    import ray

    with ray_session():
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_shuts_ray_down_and_removes_its_folder(number, error, monkeypatch):
    """What is called, with a stand-in for Ray."""
    calls = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: calls.append(Path(options["_temp_dir"])))
    monkeypatch.setattr("ray.shutdown", lambda: calls.append(calls[0].is_dir()))
    with pytest.raises(error), ray_session(num_cpus=1):
        signal.raise_signal(number)
    folder, was_there = calls
    assert was_there
    assert not folder.exists()


SLEEPER = """
import signal, sys
# A shell's background job ignores Ctrl-C, and so would this program when the tests run in one.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
import time
from pipeline.distributed.session import ray_session
with ray_session(num_cpus=1):
    import ray
    try:
        print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)
        time.sleep(500)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    time.sleep(500)
"""


def test_an_interrupted_session_leaves_nothing_behind(tmp_path):
    """Of a real Ray, whose processes and handlers of signals are its own."""
    program = SLEEPER.format(root=str(Path(module.__file__).parents[2]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}

    def started() -> tuple[subprocess.Popen[str], Path]:
        """A Ray gives up where its start takes half a minute, as on a machine with other work; another try is then allowed."""
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment, cwd=tmp_path, start_new_session=True,
            )  # fmt: skip
            if line := process.stdout.readline().strip():
                return process, Path(line)
        raise AssertionError(process.communicate(timeout=60)[1])

    process, folder = started()
    assert folder.is_dir()
    # Ctrl-C reaches the whole process group, and so all that Ray has started; a SIGTERM of `kill` the process alone.
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not folder.exists()
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("gowalla", "given", {"n_users": 29_858, "n_items": 40_981, "train": 810_128, "n_test": 217_242}),
        ("ml-100k", "random", {"n_users": 943, "n_items": 1_682, "all": 100_000}),
        ("ml-1m", "random", {"n_users": 6_040, "n_items": 3_706, "all": 1_000_209}),
    ],
)
def test_real_data_has_the_published_counts(name, split, counts, real_data, tmp_path):
    result = ingest(DataConfig(path=str(real_data / name), split=split), tmp_path / "out")
    result["train"] = result["n_train"] + result["n_validation"]
    result["all"] = result["train"] + result["n_test"]
    assert {key: result[key] for key in counts} == counts
    assert result["n_rejected"] == 0
