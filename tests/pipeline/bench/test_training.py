"""The training benchmark: its phases are the whole, it trains what a run trains, and the command says what it measured."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner
from scipy.sparse import csr_array

import graphhash
from pipeline.bench import training as bench_train
from pipeline.bench import workers as bench_workers
from pipeline.bench.training import BenchSettings, PhaseTimer
from pipeline.cli import main as cli
from pipeline.config.run_config import DataConfig, TrainConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError
from pipeline.training.checkpointing import fit_and_save
from tests.helpers import graphs
from tests.helpers.ctr_log import columns, write_csv, write_schema

TRAINING = ["batches", "negatives", "forward", "backward", "step"]


def settings(methods, **train) -> BenchSettings:
    return BenchSettings(methods, TrainConfig(**{"loss": "bpr"} | train), indices_per_id=None, resolution=3.0, rounds=3)


@pytest.fixture(scope="module")
def graph():
    return graphs.planted(0, 6, 30, 0.3, 0.02)[0]


@pytest.mark.parametrize("model", ["mf", "neumf", "lightgcn"])
def test_every_task_is_timed_by_phase(graph, model):
    results = bench_train.measure(graph, graph, settings(["soft", "full"], model=model, dim=8, batch_size=100))
    assert [(e["method"], e["task"]) for e in results] == [
        (method, task) for method in ("soft", "full") for task in ("full-batch epoch", "batches of 100", "evaluation")
    ]
    for entry in results:
        ranked = entry["task"] == "evaluation"
        assert list(entry["phases_s"]) == (["scores", "ranking", "metrics"] if ranked else TRAINING)
        assert entry["seconds"] == sorted(entry["rounds_s"])[1]
        # The phases of the round that is the median; how much of it is left over is the machine's affair.
        assert 0 < sum(entry["phases_s"].values()) <= entry["seconds"]
        n = graph.shape[0] if ranked else graph.nnz
        assert entry["per_second"] == pytest.approx(n / entry["seconds"])
    assert results[-1]["rows"] == sum(graph.shape) + 2


def test_a_loss_that_scores_many_negatives_has_no_full_batch_epoch(graph):
    results = bench_train.measure(graph, graph, settings(["full"], loss="softmax", dim=8, batch_size=100))
    assert [entry["task"] for entry in results] == ["batches of 100", "evaluation"]


def test_phases_share_out_the_time_of_a_round(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0, 6.5, 7.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    cpu = iter([1.0, 4.0, 5.0, 9.0, 9.5])
    monkeypatch.setattr("time.process_time", lambda: next(cpu))
    timer = PhaseTimer(torch.device("cpu"))
    for phase in ("a", "b", "a"):
        timer(phase)
    timer.end_round()
    timer("a")
    timer.end_round()
    assert timer.rounds == [(6.5, 3.0, {"a": 4.0, "b": 2.0}), (1.5, 4.0, {"a": 0.5})]


def test_a_log_without_a_test_set_is_refused(graph):
    with pytest.raises(graphhash.DataError, match="no test interactions to rank; give --split random"):
        bench_train.measure(graph, csr_array(graph.shape), settings(["full"], batch_size=9))


def test_command_prints_and_writes_what_it_measured(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + "".join(f"{n % 40},{n * n % 23}\n" for n in range(300)))
    arguments = ["bench", "train", "--data", tmp_path / "log.csv", "--method", "graph,full", "--resolution", 2, "--dim", 8,
                 "--batch-size", 64, "--epochs", 1, "--loss", "bpr", "--json", tmp_path / "f.json"]  # fmt: skip
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    results = json.loads((tmp_path / "f.json").read_text())
    assert [e["task"] for e in results] == ["full-batch epoch", "batches of 64", "evaluation"] * 2
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["method", "rows", "task", "seconds", "CPU", "s", "per", "second", "share", "of", "time"]
    assert len(lines) == 6
    assert all("forward" in line or "ranking" in line for line in lines)


def test_workers_are_timed_next_to_this_process(graph, tmp_path, monkeypatch):
    """Ray Train's workers are replaced by what they call, so that it is quick."""

    def run_on_ray(job, tracker):
        return fit_and_save(job["task"], job, torch.device("cpu"), lambda entry: None, lambda line: None)

    monkeypatch.setattr(bench_workers, "run_on_ray", run_on_ray)
    monkeypatch.setattr("pipeline.retrieval.ingest.ingest", lambda data, folder: write_graph(folder, graph))
    monkeypatch.setattr("pipeline.distributed.session.ray_session", nullcontext)
    monkeypatch.setattr(bench_workers, "COPIED_BYTES", 2**20)
    results = bench_workers.bench_workers(DataConfig("log"), settings(["soft"], dim=8, batch_size=100), workers=(1,))
    assert [(e["task"], e["where"]) for e in results] == [
        (task, where) for task in ("full-batch epoch", "batches of 100") for where in ("this process", "Ray Train")
    ]
    for entry in results:
        assert len(entry["rounds_s"]) == 3
        assert entry["seconds"] == sorted(entry["rounds_s"])[1]
        assert entry["per_second"] == pytest.approx(graph.nnz / entry["seconds"])
        assert entry["bound_s"] > 0
        assert entry["start_s"] >= 0
        assert entry["gpu_percent"] is None
    header, lines = bench_workers.table(results)
    assert all(len(line) == len(header) for line in lines)
    assert [line[header.index("speed")] for line in lines if line[1] == "Ray Train"] == ["1.00", "1.00"]


def write_graph(folder, graph):
    for name, part in (("train", graph), ("validation", csr_array(graph.shape, dtype=graph.dtype))):
        ShardedCsr.write(folder / name, part, n_shards=1)


def test_the_least_that_an_epoch_moves():
    # Ten interactions of three vectors of two floats, four times; Adam's seven for ten numbers, in one step and in five.
    assert bench_workers.bytes_to_move(10, 2, 10, None) == 4 * (10 * 3 * 2 * 4 + 7 * 10)
    assert bench_workers.bytes_to_move(10, 2, 10, 2) == 4 * (10 * 3 * 2 * 4 + 5 * 7 * 10)
    # A step over two interactions touches twelve numbers of a thousand.
    assert bench_workers.bytes_to_move(10, 2, 1000, 2) == 4 * (10 * 3 * 2 * 4 + 5 * 7 * 12)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no method 'sofd'; use full, "):
        cli.app.main(["bench", "train", "--data", "x", "--method", "sofd"], standalone_mode=False)


def test_workers_of_a_ctr_training_are_refused():
    with pytest.raises(ConfigError, match="--workers is not supported with --task ctr"):
        cli.app.main(
            ["bench", "train", "--data", "x", "--task", "ctr", "--workers", "2", "--method", "full"],
            standalone_mode=False,
        )


def test_ctr_trainings_are_timed_by_phase(tmp_path):
    write_csv(tmp_path / "log.csv", columns(600))
    arguments = ["bench", "train", "--task", "ctr", "--data", tmp_path / "log.csv", "--schema", write_schema(tmp_path),
                 "--method", "double_soft,full", "--dim", 4, "--batch-size", 100, "--epochs", 2, "--json", tmp_path / "f.json"]  # fmt: skip
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    results = json.loads((tmp_path / "f.json").read_text())
    assert [(e["method"], e["task"]) for e in results] == [
        (method, task) for method in ("double_soft", "full") for task in ("batches of 100", "evaluation")
    ]
    for entry in results:
        assert len(entry["rounds_s"]) == 2
        assert 0 < sum(entry["phases_s"].values()) <= max(entry["rounds_s"])
    assert results[0]["per_second"] == pytest.approx(results[0]["n_rows"] / results[0]["seconds"])
    assert len(done.stdout.splitlines()) == 5
