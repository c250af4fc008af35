"""Jobs on a real Ray cluster of one machine: a head with its dashboard on loopback, its own token, its own short folder."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.errors import JobError
from pipeline.extras import remedy
from pipeline.runs import jobs
from pipeline.runs.jobs import environment_of_job
from tests.helpers.mlflow_store import sqlite_store

ROOT = Path(__file__).resolve().parents[3]
# The copy of the checkout that a job runs in has no kernels that were compiled before, and the small logs here need none.
UNCOMPILED = ("--env", "NUMBA_DISABLE_JIT=1")
# The suite's limit is for a quiet machine, and a job starts half a dozen processes, one after the other.
pytestmark = pytest.mark.timeout(900)


# --- Before anything is sent --------------------------------------------------------------------------------------------


def test_the_jobs_environment_has_an_absolute_store_and_the_callers_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a credential")
    variables = environment_of_job({"X": "1"})
    assert variables["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/m.db"
    assert (variables["MLFLOW_RUN_ID"], variables["X"]) == ("abc", "1")
    assert "AWS_SECRET_ACCESS_KEY" not in variables
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert environment_of_job({})["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_no_dashboard_is_one_line():
    with pytest.raises(JobError, match=r"http://127.0.0.1:9: no Ray dashboard answers .*--ray-address"):
        jobs.submit(["ingest", "--data", "/x", "--out", "/o"], address="http://127.0.0.1:9")


def test_a_job_takes_the_interpreter_of_the_raylet_that_started_its_worker(tmp_path):
    head_python = tmp_path / "head-python"
    head_python.write_text('#!/bin/sh\necho "$0" "$@"\n')
    head_python.chmod(0o755)
    # A stand-in for the raylet starts one for the worker, which starts the job's shell.
    worker = f"import subprocess; subprocess.run({jobs.entrypoint(['run', '--data', 'a log.csv'])!r}, shell=True)"
    raylet = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    command = [sys.executable, "-c", raylet, f"--python_worker_command={head_python} setup_worker.py --node=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{head_python} -m pipeline run --data a log.csv"


def test_a_job_without_graphhash_says_so_in_one_line(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = subprocess.run(jobs.entrypoint(["run"], str(bare)), shell=True, capture_output=True, text=True, check=False)
    (line,) = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(
        r"a machine of the cluster, has no GraphHash; install graphhash\[all\] .*--working-dir.*--python PATH$", line
    )


def test_a_job_without_a_dependency_says_where_to_install_it(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    text = remedy(ModuleNotFoundError(name="click"))
    assert re.fullmatch(r"click is not installed on .*, a machine of the cluster; install graphhash\[all\] .*", text)


# --- Real jobs --------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """(environment of a client, dashboard's address). Never `ray stop`, which would end every Ray of the machine."""
    folder = Path(tempfile.mkdtemp(prefix="gj", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("RAY_ADDRESS", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "GRAPHHASH_WORK"):
        environment.pop(name, None)
    port, dashboard = free_port(), free_port()
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--temp-dir={folder}/r",
        "--node-ip-address=127.0.0.1",
    ]
    command += [
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        "--object-store-memory=150000000",
    ]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_this_process
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 180
        while True:
            request = urllib.request.Request(
                f"{address}/api/version", headers={"Authorization": f"Bearer {token.read_text()}"}
            )
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2) as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
        yield environment, address
    finally:
        # Not asked to end, which takes it 20 seconds: nothing of it is of use afterwards.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _kill_what_works_in(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_this_process() -> None:
    """A head must not outlive tests that were cut off."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _kill_what_works_in(folder: Path) -> None:
    """The head's own processes are named by its folder."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()):
                process.kill()


def call(head, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """A program of this Python, such as `ray` or `mlflow`, from a folder that is not the checkout."""
    environment, _ = head
    variables |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, env=environment | variables, cwd=folder, capture_output=True, text=True, timeout=600)


def write_log(path: Path) -> None:
    rows = "\n".join(f"{u},{i}" for u in range(40) for i in range(30) if (u + i) % 4 == 0)
    path.write_text(f"user_id,item_id\n{rows}\n")


def test_a_job_logs_to_the_callers_run_and_leaves_its_bundle_at_the_uri(head, tmp_path):
    """As of `mlflow run -e submit`, whose own part `test_mlflow_projects` looks at."""
    from mlflow import MlflowClient

    write_log(tmp_path / "log.csv")
    store, bucket = sqlite_store(tmp_path), f"file://{tmp_path}/bucket/run"
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("jobs")).info.run_id
    command = ["run", "--data", f"file://{tmp_path}/log.csv", "--out", bucket, "--work", str(tmp_path / "work")]
    # A refit is a training with other parts of the log: workers that refit together are in the tests of the refit.
    command += ["--method", "graph", "--ratio", "0.9", "--epochs", "3", "train.refit=false"]
    words = [sys.executable, "-m", "pipeline", "submit", "--ray-address", head[1], *UNCOMPILED, "--", *command]
    done = call(head, tmp_path, *words, MLFLOW_TRACKING_URI=store, MLFLOW_RUN_ID=run_id)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Progress is lines, not bars: nothing is written over.
    assert "train graph: done in" in done.stdout
    assert f"bundle: {bucket}/bundle" in done.stdout
    assert "\r" not in done.stdout
    assert "\x1b[" not in done.stdout
    assert "it/s" not in done.stdout
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.run_id == run_id
    assert {"capped_recall_at_20", "test.recall_at_20"} <= run.data.metrics.keys()
    assert len(client.get_metric_history(run_id, "loss")) == 3
    assert "bundle/model.onnx" in {file.path for file in client.list_artifacts(run_id, "bundle")}
    from pipeline.storage.uris import bundle_folder
    from serving.retriever import Retriever

    answer = Retriever(bundle_folder(f"{bucket}/bundle"), provider="cpu").recommend([1], k=3)
    assert answer is not None


@pytest.mark.parametrize("program", ["graphhash submit", "ray job submit"])
def test_a_job_that_fails_gives_its_exit_code_and_the_reason(head, tmp_path, program):
    command = ["ingest", "--data", "/home/somebody/log.csv", "--out", str(tmp_path / "run")]
    if program == "ray job submit":
        words = [
            "ray",
            "job",
            "submit",
            "--address",
            head[1],
            "--working-dir",
            str(ROOT),
            "--",
            "python",
            "-m",
            "pipeline",
            *command,
        ]
        done = call(head, tmp_path, *words, "--address", "auto")
    else:
        done = call(
            head, tmp_path, sys.executable, "-m", "pipeline", "submit", "--ray-address", head[1], "--", *command
        )
        assert "failed with exit code 1" in done.stderr
    assert done.returncode == 1
    assert "/home/somebody/log.csv: no such file or folder on" in done.stdout
    assert "where the job runs" in done.stdout
    assert "pipeline/" not in done.stdout, "no traceback of ours"


def test_ctrl_c_stops_the_job(head, tmp_path):
    from mlflow import MlflowClient

    environment, address = head
    write_log(tmp_path / "log.csv")
    store, out = sqlite_store(tmp_path), tmp_path / "cmp"
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "submit",
        "--ray-address",
        address,
        *UNCOMPILED,
        "--",
        "compare",
        "--data",
        f"{tmp_path}/log.csv",
    ]
    command += [
        "--out",
        str(out),
        "--methods",
        "graph",
        "--ratios",
        "0.9",
        "train.epochs=1000000",
        "train.eval_every=1000",
    ]
    process = subprocess.Popen(
        command,
        env=environment | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def statuses() -> dict[str, str]:
        client = MlflowClient(store)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments)
        # The parent of the comparison is of no method.
        return {run.data.tags.get("graphhash.method", run.info.run_name): run.info.status for run in runs}

    try:
        for line in process.stdout:
            if line.startswith("graph mf seed 0 ratio 0.9 ..."):
                break
        deadline = time.monotonic() + 200
        while statuses().get("graph") != "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, rest + error
    assert "stopping job" in error
    assert ": stopped" in error
    # The training was in a process of its own, which had no time to say anything.
    assert statuses() == {"compare log.csv": "KILLED", "graph": "KILLED"}
