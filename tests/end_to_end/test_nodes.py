"""A run on several nodes, one of which dies while clustering, and a worker while training: the labels are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from numpy.testing import assert_array_equal

import graphhash
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.communities import load_communities
from tests.helpers import graphs

pytestmark = pytest.mark.ray

# A process of its own, because this one may be in a Ray already.
SCRIPT = """
import json, logging, os, sys, threading, time
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.distributed import graph as ray_graph
from pipeline.distributed import session as ray_session
from pipeline.config.run_config import RunConfig
from pipeline.training.checkpointing import PROGRESS, progress_of
from pipeline.training.here import fit_here
from pipeline.runs.run import run
from pipeline.runs.folder import RunFolderError

folder = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 150 * 2**20})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
cluster.wait_for_nodes()
ray_session.check_shared(ray_session.Path(folder))
sees, blind = ray_session._sees, nodes[1].node_id
ray_session._sees = lambda path: ray.get_runtime_context().get_node_id() != blind
try:
    ray_session.check_shared(ray_session.Path(folder))
except RunFolderError as error:
    print(error)
ray_session._sees = sees
worked = set()
move, n_moves = ray_graph.RayGraph.move, 0

def noting(*place):
    time.sleep(0.3)
    return ray.get_runtime_context().get_node_id()

def move_and_kill(self, *arguments):
    global n_moves
    n_moves += 1
    if n_moves == 5:
        # One task on each machine: a busy scheduler may leave one of them out otherwise.
        there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
        tasks = [ray.remote(num_cpus=1, scheduling_strategy=place)(noting).remote() for place in there]
        worked.update(ray.get(tasks))
        # While the tasks of this half-sweep are out.
        threading.Timer(0.01, cluster.remove_node, [nodes[0]], {"allow_graceful": False}).start()
    return move(self, *arguments)

ray_graph.RayGraph.move = move_and_kill
settings = {"data.path": f"{folder}/log.csv", "run.out": f"{folder}/out", "run.mlflow": False, "run.methods": ("soft",),
            "cluster.resolution": 4.0, "cluster.shards": 4, "train.dim": 16, "train.lr": 0.02,
            "train.epochs": 1000, "train.eval_every": 200, "train.patience": 1000, "train.workers": 2, "train.refit": False,
            "map.hops": "1+2", "map.indices_per_id": 4}
run(RunConfig.from_flat(settings), until="cluster")
assert n_moves > 6, n_moves

def alive():
    return [node for node in ray.nodes() if node["Alive"]]

deadline = time.monotonic() + 120
while len(alive()) > 2 and time.monotonic() < deadline:
    time.sleep(0.2)
print("nodes that clustered", len(worked), "alive afterwards", len(alive()))

raylets = set()

trained = threading.Event()

def kill_one():
    # Until the training ends: how long its workers take to come up is the machine's affair.
    while not trained.wait(0.05):
        # A stage works in a folder beside its own until it is done.
        seen = [progress_of(file) for file in ray_session.Path(folder).rglob(PROGRESS)]
        if not any(entry is not None and entry["epoch"] >= 230 for entry in seen):
            continue
        for process in psutil.process_iter():
            try:
                # Of this cluster alone: what other Rays of the machine run is none of ours.
                if "RayTrainWorker" in " ".join(process.cmdline()) and process.parent().ppid() == os.getpid():
                    raylets.add(process.ppid())
                    victim = process
            except psutil.Error:
                continue
        victim.kill()
        return

thread = threading.Thread(target=kill_one)
thread.start()
try:
    run(RunConfig.from_flat(settings), until="evaluate")
finally:
    trained.set()
    thread.join()
print("nodes that trained", len(raylets))

# Nothing is taken over from the other folder, whose training would be the same stage.
alone = RunConfig.from_flat(settings | {"run.out": f"{folder}/alone", "cluster.shards": 0})
run(alone, until="evaluate", fit_job=fit_here)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.timeout(600)  # Three machines of Ray on one, which may be busy.
def test_a_run_over_nodes_survives_the_death_of_one_and_of_a_worker(tmp_path):
    pytest.importorskip("ray.cluster_utils")
    graph, _, _ = graphs.planted(0, 6, 30, 0.3, 0.02)
    users, items = graph.nonzero()
    (tmp_path / "log.csv").write_text(
        "user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i in zip(users, items, strict=True))
    )
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    # One machine does not see the folder: here because its task says so, as all nodes of this test are on one machine.
    assert f"{tmp_path}: not seen on" in ended.stdout
    assert "of 3 machines; work in a folder on storage that all" in ended.stdout
    assert not list(tmp_path.glob(".seen-*"))
    # The head, which works as well, and the node that was left.
    assert "nodes that clustered 3 alive afterwards 2" in ended.stdout, ended.stdout[-3000:]
    out = tmp_path / "out"
    train = ShardedCsr.open(out / "ingest" / "train").load()
    expected = graphhash.cluster(train, resolution=4)
    labels = load_communities(out / "cluster", json.loads((out / "cluster" / "cluster.json").read_text()))
    assert_array_equal(labels.users, expected.users)
    assert_array_equal(labels.items, expected.items)
    assert "nodes that trained 2" in ended.stdout
    history = json.loads((out / "methods" / "soft" / "history.json").read_text())
    assert [entry["epoch"] for entry in history["epochs"]] == list(range(200, 1001, 200))
    assert len(history["resumed"]) == 1
    assert history["resumed"][0] >= 200
    alone = json.loads((tmp_path / "alone" / "methods" / "soft" / "history.json").read_text())
    assert alone["resumed"] == []
    recalls = [json.loads((tmp_path / name / "metrics.json").read_text())[0]["recall@20"] for name in ("out", "alone")]
    assert recalls[0] == pytest.approx(recalls[1], abs=0.05)
    assert recalls[0] > 0.3
