"""The order of the stages, with stand-ins for the stages themselves."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError, TrackingError
from pipeline.maps import methods  # noqa: F401  Before the stand-ins: what it imports needs the real modules, and so do the workers.
from pipeline.retrieval.task import Retrieval
from pipeline.runs import stages as stages_module
from pipeline.runs import tracked
from pipeline.runs.plan import plan
from pipeline.runs.run import run
from pipeline.tracking import mlflow_runs
from pipeline.tracking.store import Store
from pipeline.tracking.tracker import Tracker
from pipeline.training import workers  # noqa: F401
from pipeline.training.job import fit_job_of


@pytest.fixture
def calls(monkeypatch):
    """Replace every stage by one that leaves a file and notes its name here."""
    made: list[str] = []

    def stand_in(name: str, **functions) -> None:
        module = ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    @contextmanager
    def ray_session(address):
        made.append("ray up")
        yield
        made.append("ray down")

    def ingest(data, out):
        made.append("ingest")
        (out / "x").write_text("x")
        return {"n_users": 3, "hashes": {"users_hash": "ab"}}

    def cluster_run(config, ingest_dir, out):
        made.append("cluster")
        (out / "x").write_text("x")
        return {"rows": 2}

    def train_method(context, method, out, session):
        made.append(f"train {method}")
        (out / "x").write_text("x")
        return {"best_epoch": 1}

    def refit_method(context, method, out, session):
        made.append(f"refit {method}")
        (out / "x").write_text("x")
        return {}

    def evaluate_method(config, method, ingest_dir, method_dir):
        made.append(f"evaluate {method}")
        assert (method_dir / "x").exists()
        return {"recall@20": 0.5, "rows": 2, "bytes_ratio": 0.9}

    def export(task, context, method, out, metrics, train_key):
        made.append(f"export {method}")
        (out / "model.onnx").write_text("x")
        return {}

    def write_report(path):
        made.append("report")
        assert (path / "metrics.json").exists()
        return []

    stand_in(
        "pipeline.distributed.session",
        ray_session=ray_session,
        check_shared=lambda folder: None,
        on_cluster=lambda address: address is not None,
    )
    stand_in("pipeline.retrieval.ingest", ingest=ingest)
    stand_in("pipeline.retrieval.cluster", cluster_run=cluster_run)
    stand_in("pipeline.retrieval.train", train_method=train_method)
    stand_in("pipeline.retrieval.refit", refit_method=refit_method)
    stand_in("pipeline.retrieval.evaluate", evaluate_method=evaluate_method)
    stand_in("pipeline.retrieval.report", write_report=write_report)
    monkeypatch.setattr(Retrieval, "export", export)
    monkeypatch.setattr(Retrieval, "forecast", lambda task, context, stages: None)
    return made


@pytest.fixture
def config(tmp_path):
    (tmp_path / "log.csv").write_text("x")

    def make(*overrides: str) -> RunConfig:
        fixed = {
            "data.path": str(tmp_path / "log.csv"),
            "run.out": str(tmp_path / "out"),
            "run.mlflow": False,
        }
        return RunConfig.load(None, overrides, **fixed)

    return make


def test_stages_run_in_order_and_once(calls, config, tmp_path):
    outcome = run(config("run.methods=soft,full"))
    assert calls == [
        "ingest",
        "cluster",
        "train soft",
        "refit soft",
        "evaluate soft",
        "export soft",
        "train full",
        "refit full",
        "evaluate full",
        "report",
    ]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == outcome.metrics
    assert [entry["method"] for entry in written] == ["soft", "full"]
    assert list(written[0]["seconds"]) == ["ingest", "cluster", "train", "refit", "evaluate", "export"]
    assert RunConfig.load(tmp_path / "out" / "config.toml") == config("run.methods=soft,full")
    calls.clear()
    run(config("run.methods=soft,full"))
    # A report costs less than to know whether it is needed.
    assert calls == ["report"]


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("run.address=auto", "ingest"),
        ("cluster.shards=2", "cluster"),
        ("train.workers=2", "train soft"),
    ],
)
def test_ray_starts_once_for_the_first_stage_that_wants_it(calls, config, override, first):
    run(config(override, "run.methods=soft,full"))
    assert calls.count("ray up") == 1
    assert calls[calls.index("ray up") + 1] == first
    assert calls[-1] == "ray down"
    calls.clear()
    run(config(override, "run.methods=soft,full"))
    assert calls == ["report"]


@pytest.mark.parametrize(
    ("override", "environment", "expected"),
    [
        ("train.lr=none", {}, "fit_here"),
        ("train.workers=1", {}, "fit_here"),
        ("cluster.shards=2", {}, "fit_here"),
        ("train.workers=2", {}, "run_on_ray"),
        ("run.address=auto", {}, "run_on_ray"),
        ("train.lr=none", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "run_on_ray"),
    ],
)
def test_one_worker_of_this_machine_trains_in_this_process(config, override, environment, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fit_job_of(config(override)).__name__ == expected


def test_several_gpus_are_a_worker_each(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert fit_job_of(config()).__name__ == "run_on_ray"
    assert fit_job_of(config("train.workers=1")).__name__ == "fit_here"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("export.precision=float16", ["evaluate", "export"]),
        ("export.external_data_mib=3", ["export"]),
        ("train.refit=false", ["evaluate", "export"]),
        ("train.lr=0.5", ["train", "refit", "evaluate", "export"]),
        ("map.indices_per_id=3", ["train", "refit", "evaluate", "export"]),
        ("cluster.resolution=9", ["cluster", "train", "refit", "evaluate", "export"]),
        ("cluster.threads=2", []),
        ("cluster.shards=2", []),
        ("run.experiment=other", []),
        ("data.seed=3", ["ingest", "cluster", "train", "refit", "evaluate", "export"]),
    ],
)
def test_a_change_computes_what_depends_on_it(calls, config, override, expected):
    run(config("cluster.resolution=2"), until="export")
    calls.clear()
    run(config("cluster.resolution=2", override), until="export")
    assert [call.split()[0] for call in calls if not call.startswith("ray")] == expected


@pytest.mark.parametrize(
    "override",
    ["train.dim=8", "map.indices_per_id=2", "export.precision=float16", "run.methods=graph", "train.loss=directau"],
)
def test_a_budget_in_bytes_is_clustered_again_when_other_bytes_change(config, override):
    assert plan(config(), "cluster")["cluster"].key != plan(config(override), "cluster")["cluster"].key
    by_rows = [plan(config("cluster.rows=9", *extra), "cluster")["cluster"].key for extra in ([], [override])]
    assert by_rows[0] == by_rows[1]


def command(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code


def stages(calls) -> list[str]:
    return [call for call in calls if not call.startswith("ray")]


def test_an_export_in_another_precision_keeps_what_is_trained(calls, config, tmp_path, caplog):
    """A ratio budget counts rows in a precision: that of the run, and not that of a later export."""
    run(config("run.methods=soft,graph"))
    calls.clear()
    caplog.set_level(logging.INFO, "pipeline")
    run(config("run.methods=soft,graph", "export.precision=float32"), until="export", keep_trained=True)
    assert stages(calls) == ["evaluate soft", "export soft", "evaluate graph"]
    assert "evaluate soft: export.precision changed int4 -> float32 ..." in caplog.messages
    assert "soft: 90.0% of the full tables' bytes in float32, above the budget of 25.0%" in " ".join(caplog.messages)
    # The run folder remembers it: a later run without --data trains nothing either.
    calls.clear()
    later = RunConfig.load(tmp_path / "out" / "config.toml")
    assert (later.cluster.budget_precision, later.export.precision) == ("auto", "float32")
    run(later)
    assert stages(calls) == ["report"]
    # `auto` is what the run used.
    calls.clear()
    run(config("run.methods=soft,graph"), until="export", keep_trained=True)
    assert stages(calls) == ["evaluate soft", "export soft", "evaluate graph"]


def test_another_method_of_the_run_is_exported_without_training(calls, config):
    """A ratio budget shares its rows between the methods of the run; one of them alone would get other rows."""
    run(config("run.methods=soft,graph"))
    calls.clear()
    result = run(config("run.methods=graph"), until="export", keep_trained=True)
    assert stages(calls) == ["export graph"]
    assert [entry["method"] for entry in result.metrics] == ["graph", "soft"]


def test_auto_exports_in_the_precision_of_the_run(calls, config, tmp_path):
    run(config("export.precision=int8"))
    calls.clear()
    run(config("export.precision=auto"), until="export", keep_trained=True)
    assert calls == []


def test_a_new_run_plans_its_rows_in_the_precision_that_is_asked_for(calls, config):
    run(config(), until="export")
    calls.clear()
    run(config("export.precision=float32"), until="export")
    assert stages(calls) == ["cluster", "train soft", "refit soft", "evaluate soft", "export soft"]


@pytest.mark.parametrize("until", ["evaluate", "export"])
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.lr=0.02", "train.lr changed default -> 0.02"),
        ("cluster.rows=9", "cluster.rows changed default -> 9; cluster.resolution changed 2.0 -> default"),
        ("data.seed=1", "data.seed changed 0 -> 1"),
    ],
)
def test_a_command_for_a_later_stage_never_replaces_a_trained_model(calls, config, until, override, reason):
    run(config("cluster.resolution=2"))
    calls.clear()
    changed = config(*([] if "rows" in override else ["cluster.resolution=2"]), override)
    message = f"`graphhash {until}` would train soft again: {reason}; leave it out, or run `graphhash train` first"
    with pytest.raises(ConfigError) as refused:
        run(changed, until=until, keep_trained=True)
    assert str(refused.value) == message
    assert calls == []
    # What is not trained yet is no loss, and a damaged model is trained again.
    run(config("cluster.resolution=2", "run.methods=soft,graph"), until=until, keep_trained=True)
    assert stages(calls)[0] == "train graph"


def test_status_and_dry_run_print_the_plan_and_compute_nothing(calls, config, tmp_path, capsys):
    def printed(*words) -> list[str]:
        calls.clear()
        assert command(*words) == 0
        assert calls == []
        return capsys.readouterr().out.splitlines()

    log, out = ("--data", tmp_path / "log.csv"), ("--out", tmp_path / "out")
    names = ["ingest", "cluster", "train soft", "refit soft", "evaluate soft", "export"]
    # The log, which is not read yet, decides the method.
    planned = [f"{name}: never computed here".replace("soft", "auto") for name in names]
    assert printed("run", *log, *out, "--dry-run")[:6] == planned
    assert not (tmp_path / "out").exists()
    assert printed("run", *log, *out, "--dry-run")[-1] == "task retrieval: seconds and memory are not forecast"
    run(config())
    assert printed("run", *out, "--dry-run")[-1] == "report: written by every run"
    assert printed("status", tmp_path / "out") == [f"{name}: up to date" for name in names] + [
        "report: written by every run"
    ]
    dry = printed("run", *out, "--lr", "0.02", "--dry-run", "--json", tmp_path / "plan.json")
    assert dry[2:5] == [
        "train soft: train.lr changed default -> 0.02",
        "refit soft: train soft changed",
        "evaluate soft: refit soft changed",
    ]
    assert json.loads((tmp_path / "plan.json").read_text()) == dry
    assert printed("status", tmp_path / "out")[2] == "train soft: up to date"


def test_a_log_that_changed_is_not_trained_by_an_export(calls, config, tmp_path):
    run(config())
    (tmp_path / "log.csv").write_text("longer")
    with pytest.raises(ConfigError, match="train soft again: the log changed; run `graphhash train` first"):
        run(config(), until="export", keep_trained=True)


def test_a_copied_or_touched_log_computes_nothing(calls, config, tmp_path):
    run(config(), until="train")
    calls.clear()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "log.csv").write_text((tmp_path / "log.csv").read_text())
    run(config(f"data.path={tmp_path}/copy/log.csv"), until="train")
    assert calls == []


def test_changed_data_computes_everything_again(calls, config, tmp_path):
    run(config(), until="cluster")
    (tmp_path / "log.csv").write_text("longer")
    calls.clear()
    run(config(), until="cluster")
    assert calls == ["ingest", "cluster"]


def test_moved_data_computes_nothing(calls, config, tmp_path):
    run(config(), until="cluster")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "log.csv").rename(tmp_path / "elsewhere" / "log.csv")
    calls.clear()
    run(config(f"data.path={tmp_path}/elsewhere/log.csv"), until="cluster")
    assert calls == []


@pytest.mark.parametrize("until", ["ingest", "cluster", "train", "evaluate", "export"])
def test_stage_commands_stop_where_they_should(calls, config, until):
    run(config(), until=until)
    made = [call.split()[0] for call in stages(calls)]
    assert made == ["ingest", "cluster", "train", "refit", "evaluate", "export"][: len(made)]
    # A training without its refit would be one that no later command tests.
    assert made[-1] == ("refit" if until == "train" else until)


def test_plan_names_every_stage_once(config):
    steps = plan(config("run.methods=soft,full"), "report")
    assert list(steps) == [
        "ingest",
        "cluster",
        "train soft",
        "refit soft",
        "evaluate soft",
        "export",
        "train full",
        "refit full",
        "evaluate full",
    ]
    assert len({step.key for step in steps.values()}) == len(steps)


class Recorder:
    """Stands for the MLflow store: notes what would be logged, by run."""

    def __init__(self, monkeypatch) -> None:
        self.runs: dict[str, dict] = {}
        self.killed: tuple[str, ...] = ()
        monkeypatch.setattr(tracked, "connect", lambda experiment, folder: Store("uri", "1", killed=self.killed))
        monkeypatch.setattr(mlflow_runs, "_open", self.open)
        monkeypatch.setattr(mlflow_runs, "_reopen", lambda store, run_id: Tracker("uri", run_id))
        for name in ("log_params", "log_metrics", "set_tags", "log_artifact", "log_dataset", "end"):
            monkeypatch.setattr(Tracker, name, self.noting(name))
        monkeypatch.setattr(stages_module, "log_bundle", lambda tracker, folder, task: tracker.log_artifact("bundle"))

    def open(self, store, name, tags, *, alone):
        run_id = f"{tags['graphhash.method']}-{len(self.runs)}"
        self.runs[run_id] = {"alone": alone, "name": name}
        return Tracker("uri", run_id)

    def noting(self, name):
        def note(tracker, value, *rest, **more):
            if tracker.run_id is not None:
                self.runs[tracker.run_id].setdefault(name, []).append(value)

        return note


def test_each_training_is_one_run_with_its_test_metrics_and_bundle(calls, config, monkeypatch):
    recorder = Recorder(monkeypatch)
    outcome = run(config("run.methods=soft,full", "run.mlflow=true"))
    assert [entry["mlflow_run_id"] for entry in outcome.metrics] == ["soft-0", "full-1"] == list(recorder.runs)
    soft, full = recorder.runs.values()
    assert (soft["name"], soft["log_dataset"]) == ("soft mf bpr log.csv", ["log.csv"])
    assert (soft["alone"], soft["log_artifact"], soft["end"]) == (False, ["bundle"], ["FINISHED"])
    assert soft["log_metrics"] == [{"test.recall@20": 0.5, "test.rows": 2, "test.bytes_ratio": 0.9}]
    tags = {"graphhash.trained_on": "train,validation", "graphhash.ingest.hashes.users_hash": "ab"}
    assert soft["set_tags"] == [tags]
    assert soft["log_params"][0]["train.dim"] == 64
    assert "log_artifact" not in full


def test_a_later_stage_goes_on_with_the_run_of_its_training(calls, config, monkeypatch):
    recorder = Recorder(monkeypatch)
    run(config("run.mlflow=true"), until="train")
    run(config("run.mlflow=true"), until="export")
    assert list(recorder.runs) == ["soft-0"]
    assert recorder.runs["soft-0"]["log_artifact"] == ["bundle"]
    assert recorder.runs["soft-0"]["end"] == ["FINISHED", "FINISHED"]


def test_a_training_without_mlflow_gets_no_run_later(calls, config, monkeypatch):
    recorder = Recorder(monkeypatch)
    run(config(), until="train")
    run(config("run.mlflow=true"), until="export")
    assert recorder.runs == {}


def test_a_run_killed_after_its_last_stage_is_finished_by_the_next_command(calls, config, monkeypatch):
    recorder = Recorder(monkeypatch)
    run(config("run.mlflow=true"), until="export")
    run(config("run.mlflow=true"), until="export")
    assert recorder.runs["soft-0"]["end"] == ["FINISHED"], "nothing is left, and nobody is told"
    monkeypatch.setattr(tracked, "has_undelivered", lambda folder: True)
    recorder.killed = ("soft-0",)
    run(config("run.mlflow=true"), until="export")
    assert recorder.runs["soft-0"]["end"] == ["FINISHED", "FINISHED"]
    assert len(recorder.runs["soft-0"]["log_params"]) == 1


def test_mlflow_that_is_still_away_does_not_stop_a_command_that_has_nothing_to_do(calls, config, monkeypatch, caplog):
    Recorder(monkeypatch)
    run(config("run.mlflow=true"), until="export")

    def away(_experiment, _folder):
        raise TrackingError("away")

    monkeypatch.setattr(tracked, "connect", away)
    monkeypatch.setattr(tracked, "has_undelivered", lambda folder: True)
    run(config("run.mlflow=true"), until="export")
    assert "away; what it should get is kept" in caplog.messages


def test_unreachable_mlflow_stops_before_any_work(calls, config, monkeypatch):
    def away(_experiment, _folder):
        raise TrackingError("away")

    monkeypatch.setattr(tracked, "connect", away)
    with pytest.raises(TrackingError):
        run(config("run.mlflow=true"))
    assert calls == []
    run(config("run.mlflow=true"), until="cluster")


def test_failed_evaluation_fails_the_run(calls, config, monkeypatch):
    recorder = Recorder(monkeypatch)

    def fail(*_arguments):
        raise RuntimeError("bang")

    sys.modules["pipeline.retrieval.evaluate"].evaluate_method = fail
    with pytest.raises(RuntimeError):
        run(config("run.mlflow=true"))
    assert recorder.runs["soft-0"]["end"] == ["FAILED"]


@pytest.fixture
def stopped(calls, config, monkeypatch):
    """A run whose training was stopped after a checkpoint; later ones note what they find to go on from."""
    recorder, found = Recorder(monkeypatch), []

    def train_method(context, method, out, session):
        found.append(session.checkpoints.newest())
        if len(found) == 1:
            session.checkpoints.save({"epoch": 3, "step": 0})
            raise KeyboardInterrupt
        (out / "x").write_text("x")
        return {"best_epoch": 1}

    sys.modules["pipeline.retrieval.train"].train_method = train_method
    with pytest.raises(KeyboardInterrupt):
        run(config("run.mlflow=true"), until="train")
    return recorder, found


@pytest.mark.parametrize("resume", [None, True])
def test_the_same_command_goes_on_from_the_checkpoint_and_in_the_same_mlflow_run(stopped, config, tmp_path, resume):
    recorder, found = stopped
    run(config("run.mlflow=true"), until="train", resume=resume)
    assert found == [None, "epoch-000003-step-00000000"]
    assert list(recorder.runs) == ["soft-0"]
    assert recorder.runs["soft-0"]["end"] == ["KILLED", "FINISHED"]
    assert not (tmp_path / "out" / "checkpoints" / "soft").exists()
    # What is finished needs no checkpoint.
    run(config("run.mlflow=true"), until="train", resume=True)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("override", "resume"), [("train.lr=0.5", None), ("train.epochs=9", None), ("train.lr=none", False)]
)
def test_a_checkpoint_of_other_settings_or_an_unwanted_one_is_not_used(stopped, config, override, resume):
    run(config("run.mlflow=true", override), until="train", resume=resume)
    assert stopped[1] == [None, None]


@pytest.mark.parametrize("override", ["train.workers=2", "train.checkpoint_seconds=1"])
def test_other_numbers_of_workers_go_on_with_a_training(stopped, config, override):
    run(config("run.mlflow=true", override), until="train")
    assert stopped[1][1] is not None


def test_resume_without_a_checkpoint_is_refused(stopped, config):
    with pytest.raises(ConfigError, match=r"--resume: .*checkpoints holds none of a training with these settings"):
        run(config("run.mlflow=true", "train.lr=0.5"), until="train", resume=True)
    assert len(stopped[1]) == 1


def test_unknown_method_is_refused_before_any_work(calls, config):
    with pytest.raises(ConfigError, match=r"unknown method 'sfot'; did you mean 'soft'?"):
        run(config("run.methods=graph,sfot"))
    assert calls == []
