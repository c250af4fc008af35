"""The clustering benchmark: who is run, in what order, and that its figures are what they say."""

from __future__ import annotations

import json

import click
import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.bench import clustering as bench_cluster
from pipeline.bench.clustering import ClusteringBench
from pipeline.bench.clustering_peers import OURS, PEERS, PROGRAMS, choose_programs
from pipeline.cli import main as cli
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError
from pipeline.training.memory import peak_mib
from tests.helpers import graphs

KEYS = {
    "program",
    "seconds",
    "edges_per_s",
    "rows",
    "modularity",
    "peak_mib",
    "threads",
    "resolution",
    "n_edges",
}


def settings(*resolutions: float, programs=(OURS,), rounds: int = 1) -> ClusteringBench:
    return ClusteringBench(resolutions, programs, rounds, threads=2)


@pytest.fixture
def stored(tmp_path):
    return ShardedCsr.write(tmp_path / "graph", graphs.two_blocks(), n_shards=2).path


def test_ours_on_a_graph_with_a_known_answer(stored):
    coarse, fine = bench_cluster.compare("blocks", stored, settings(1, 9))
    assert set(coarse) >= KEYS | {"phases_s", "start_mib"}
    assert "speedup" not in coarse
    # Two equal blocks that share no edge: everything inside, half of it expected.
    assert (coarse["modularity"], coarse["rows"], coarse["n_edges"]) == (pytest.approx(0.5), 4, 18)
    assert fine["rows"] >= coarse["rows"]
    assert coarse["edges_per_s"] == pytest.approx(18 / coarse["seconds"])
    assert sum(coarse["phases_s"].values()) == pytest.approx(coarse["seconds"])
    assert 20 < coarse["start_mib"] <= coarse["peak_mib"] < 4000


@pytest.mark.parametrize("weighted", [False, True], ids=["unit", "weighted"])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_find_the_two_blocks(peer, weighted):
    pytest.importorskip(PEERS[peer])
    graph = graphs.two_blocks()
    graph.data *= 2.5 if weighted else 1
    run, n_threads = PROGRAMS[peer](graph, 1)
    users, items, _ = run(1.0)
    assert n_threads == 1
    assert graphs.naive_modularity(graph, users, items, 1.0) == pytest.approx(0.5)
    assert len(np.unique(users)) == len(np.unique(items)) == 2


def test_programs_take_turns_and_medians_are_compared(stored, monkeypatch):
    calls = []

    def program(name, labels):
        def run(resolution):
            calls.append((name, resolution))
            return np.array(labels), np.array(labels), {}

        return lambda graph, threads: (run, 1)

    monkeypatch.setitem(PROGRAMS, OURS, program(OURS, [0, 0, 0, 1, 1, 1]))
    monkeypatch.setitem(PROGRAMS, "worse", program("worse", [0, 0, 0, 1, 1, 2]))
    monkeypatch.setattr(bench_cluster, "_memory", lambda *_: {"start_mib": 1.0, "peak_mib": 2.0})
    ours, worse = bench_cluster.compare("blocks", stored, settings(1, programs=(OURS, "worse"), rounds=3))
    assert [name for name, _ in calls] == [OURS] + [OURS, "worse"] * 3
    assert ours["seconds"] == sorted(ours["rounds_s"])[1]
    assert worse["speedup"] == worse["seconds"] / ours["seconds"]
    expected = graphs.naive_modularity(graphs.two_blocks(), [0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 2], 1.0)
    assert worse["modularity"] == pytest.approx(expected)
    assert worse["modularity_ratio"] == pytest.approx(0.5 / expected)
    ((title, (header, *lines), _),) = bench_cluster.by_setting([ours, worse])
    assert title == "blocks: 6 users, 6 items, 18 edges; resolution 1"
    assert [line[0] for line in lines] == [OURS, "worse"]
    assert dict(zip(header, lines[1], strict=True))["Q ratio"] == f"{0.5 / expected:.4f}"


def test_peak_counts_memory_that_is_given_back():
    start = peak_mib(reset=True)
    array = np.ones(64 * 2**17)
    del array
    assert peak_mib() > start + 60


def test_peers_are_the_installed_ones_or_those_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package != "igraph" or None)
    assert choose_programs(()) == [OURS, "scikit-network", "networkit"]
    fine = "scikit-network-fine"
    assert choose_programs((fine, fine)) == [OURS, fine]
    with pytest.raises(ConfigError, match="igraph is not installed"):
        choose_programs(("igraph-fine",))
    with pytest.raises(ConfigError, match="no peer 'louvain'; the peers are scikit-network"):
        choose_programs(("louvain",))


def test_planted_graphs_of_several_sizes_are_one_family():
    sizes = bench_cluster.planted_sizes(10_000_000, None, None, None)
    assert (sizes["n_users"], sizes["n_items"], sizes["n_communities"]) == (1_000_000, 200_000, 2_000)
    assert bench_cluster.planted_sizes(100, 7, 20, 3)["n_users"] == 7


def test_command_draws_prints_and_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cluster, "_memory", lambda *_: {"start_mib": 1.0, "peak_mib": 2.0})
    monkeypatch.setattr("pipeline.bench.clustering_peers.PEERS", {})
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + "".join(f"{u},{u % 3}\n" for u in range(9)))
    arguments = ["bench", "cluster", "--data", tmp_path / "log.csv", "--interactions", 400, "--mixing", 0.1,
                 "--users", 40, "--items", 30, "--communities", 3, "--resolution", 1, "--resolution", 4,
                 "--rounds", 1, "--plot", tmp_path / "cost.png", "--json", tmp_path / "f.json"]  # fmt: skip
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    results = json.loads((tmp_path / "f.json").read_text())
    assert [(e["graph"], e["resolution"]) for e in results] == [
        ("log.csv", 1), ("log.csv", 4), ("planted 400", 1), ("planted 400", 4)
    ]  # fmt: skip
    assert (results[0]["n_edges"], results[2]["n_edges"]) == (9, 400)
    assert "log.csv: 9 users, 3 items, 9 edges; resolution 1\n" in done.stdout
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_command_needs_a_graph():
    with pytest.raises(click.UsageError, match="--data PATH or --interactions N"):
        cli.app.main(["bench", "cluster"], standalone_mode=False)
