"""The cluster files are what Ray and KubeRay take, agree with the tested versions, and start commands that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.cli.jobs import checked_command
from pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "pipeline" / "deploy"
CLUSTER = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text(encoding="utf-8"))
RAY = Path(importlib.util.find_spec("ray").origin).parent  # Ray itself takes a moment to import.
SCHEMA = json.loads((RAY / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
RAY_VERSION = re.search(
    r"^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
).group(1)
# The fields of the v1 API that a RayJob's spec may have, of which KubeRay ignores unknown ones silently.
JOB_FIELDS = {
    "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "runtimeEnvYAML",
    "rayClusterSpec", "activeDeadlineSeconds", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "metadata",
    "clusterSelector", "submitterPodTemplate", "submitterConfig", "suspend", "managedBy", "deletionStrategy",
}  # fmt: skip
GROUP_FIELDS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    "numOfHosts",
    "idleTimeoutSeconds",
}


def test_the_cluster_fits_rays_schema():
    jsonschema.validate(CLUSTER, SCHEMA)


@pytest.mark.parametrize(
    "damage",
    [{"max_worker": 3}, {"idle_timeout_minutes": "ten"}, {"provider": {"region": "us-west-2"}}],
    ids=lambda d: next(iter(d)),
)
def test_the_schema_refuses_what_it_should(damage):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(CLUSTER | damage, SCHEMA)


def test_the_cluster_has_cpu_and_gpu_machines_and_a_head_without_work():
    kinds = CLUSTER["available_node_types"]
    head = kinds[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in line for line in CLUSTER["head_start_ray_commands"])
    workers = {name: kind for name, kind in kinds.items() if name != CLUSTER["head_node_type"]}
    assert {"GPU" in kind["resources"] for kind in workers.values()} == {True, False}
    for kind in workers.values():
        assert kind["resources"]["CPU"] > 0
        assert 0 <= kind["min_workers"] <= kind["max_workers"]
    assert CLUSTER["max_workers"] >= sum(kind["max_workers"] for kind in workers.values())
    # Ray's dashboard takes jobs from whoever reaches it.
    assert any("--dashboard-host=127.0.0.1" in line for line in CLUSTER["head_start_ray_commands"])
    mounts = " ".join(CLUSTER["initialization_commands"])
    assert "/shared" in mounts
    assert any("-v /shared:/shared" in option for option in CLUSTER["docker"]["run_options"])


def containers(template: dict) -> list[dict]:
    return template["spec"]["containers"]


def test_the_job_is_a_rayjob_that_kuberay_takes():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", JOB["metadata"]["name"])
    spec = JOB["spec"]
    assert spec.keys() <= JOB_FIELDS
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] == "K8sJobMode"
    runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    assert runtime_env["env_vars"]["MLFLOW_TRACKING_URI"].startswith("http")
    assert all(isinstance(value, str) for value in runtime_env["env_vars"].values()), "Ray takes texts alone"


def test_the_jobs_cluster_has_resources_for_every_container():
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    for group in groups.values():
        assert group.keys() <= GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for template in (cluster["headGroupSpec"]["template"], *(group["template"] for group in groups.values())):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert len(containers(template)) == 1
        for container in containers(template):
            for kind in ("requests", "limits"):
                assert re.fullmatch(r"\d+", container["resources"][kind]["cpu"])
                assert re.fullmatch(r"\d+Gi", container["resources"][kind]["memory"])
            # A pod that is killed for memory takes its objects with it.
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert containers(groups["gpu"]["template"])[0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in containers(groups["cpu"]["template"])[0]["resources"]["limits"]


def test_the_entrypoint_is_a_command_with_paths_that_all_machines_have():
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "pipeline"]
    assert checked_command(app, words[3:]) == words[3:], "it names the cluster's Ray itself"
    mount = {
        m["mountPath"]
        for m in containers(JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])[0]["volumeMounts"]
    }
    assert words[words.index("--work") + 1].startswith(tuple(mount))


@pytest.mark.parametrize("file", ["ray-cluster.yaml", "rayjob.yaml"])
def test_commands_in_the_comments_exist(file):
    text = (DEPLOY / file).read_text(encoding="utf-8")
    for line in re.findall(r"^#\s+graphhash submit -- (.*)$", text, re.MULTILINE):
        assert checked_command(app, shlex.split(line))[0] == "run"
    assert set(re.findall(r"FROM rayproject/ray:([\d.]+)-", text)) == {RAY_VERSION}
