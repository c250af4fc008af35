"""Clustering on several nodes, one of which dies half-way: the labels are those of one process."""

from __future__ import annotations

import subprocess
import sys

import graphs
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_clusters import ingested

import graphhash

# A process of its own, because this one may be in a Ray already.
SCRIPT = """
import logging, sys, threading, time
import numpy as np
import ray
from ray.cluster_utils import Cluster

from graphhash.clustering import cluster_graph
from pipeline import ray_graph, ray_session
from pipeline.shards import ShardedCsr
from pipeline.stages import RunFolderError

folder = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 150 * 2**20})
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
        worked.update(ray.get([ray.remote(num_cpus=1)(noting).remote() for _ in range(6)]))
        # While the tasks of this half-sweep are out.
        threading.Timer(0.01, cluster.remove_node, [nodes[0]], {"allow_graceful": False}).start()
    return move(self, *arguments)

ray_graph.RayGraph.move = move_and_kill
stored = [ShardedCsr.open(f"{folder}/{name}") for name in ("train", "train_by_item")]
labels = cluster_graph(ray_graph.RayGraph(*stored, 4, ray_graph.Path(folder)), 4)
assert n_moves > 6, n_moves
deadline = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) > 2 and time.monotonic() < deadline:
    time.sleep(0.2)
print("nodes that worked", len(worked), "alive at the end", sum(node["Alive"] for node in ray.nodes()))
np.savez(f"{folder}/labels.npz", users=labels.users, items=labels.items)
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_dies_half_way_does_not_change_the_labels(tmp_path):
    pytest.importorskip("ray.cluster_utils")
    graph = graphs.random_graph(11, 300, 200, 3000, weighted=True)
    ingested(graph, tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    # One machine does not see the folder: here because its task says so, as all nodes of this test are on one machine.
    assert f"{tmp_path}: not seen on" in ended.stdout and "of 3 machines; work in a folder on storage that all" in ended.stdout
    assert not list(tmp_path.glob(".seen-*"))
    # Head and the node that was left.
    assert "nodes that worked 2 alive at the end 2" in ended.stdout
    expected = graphhash.cluster(graph, resolution=4)
    with np.load(tmp_path / "labels.npz") as labels:
        assert_array_equal(labels["users"], expected.users)
        assert_array_equal(labels["items"], expected.items)
