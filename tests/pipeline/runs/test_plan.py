"""Every setting either decides a stage's key or changes no output, and a plan names the reason for every stage that it computes."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.config.run_config import BUDGET_KEYS, RunConfig, keys
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import describe_plan, plan, reasons, root_reasons
from pipeline.runs.tasks import TASKS
from pipeline.task import CHANGE_NO_OUTPUT

PRECISION_FIELDS = {"cluster.budget_precision", "export.precision"}
# Another value of every setting that changes no output.
OTHER = {
    "data.path": None,
    "cluster.threads": 2,
    "cluster.shards": 3,
    "train.workers": 2,
    "train.checkpoint_seconds": 1.0,
    "train.propagation": "sharded",
    "run.out": None,
    "run.remote": "file:///tmp/x",
    "run.address": "auto",
    "run.experiment": "other",
    "run.mlflow": False,
}
LOG = "label,site\n1,a\n0,b\n"
# Of settings that one task alone reads, for the task that does not.
UNREAD = {
    "retrieval": {
        "train.hidden": ("9",),
        "train.n_cross": 3,
        "train.cross_rank": 3,
        "train.structure": "parallel",
        "train.score": "log_loss",
        "train.calibrate": False,
        "data.min_count": 2,
    },
    "ctr": {
        "data.shards": 3,
        "train.n_layers": 3,
        "train.gamma": 0.1,
        "train.unobserved_weight": 0.1,
        "train.sampler": "popularity",
        "train.popularity_power": 0.1,
        "train.eval_users": 3,
        "train.amp": "bf16",
        "train.compile": True,
        "train.sparse_gradients": True,
    },
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)

    def make(**settings) -> RunConfig:
        fixed = {"data.path": str(tmp_path / "log.csv"), "run.out": str(tmp_path / "out")}
        return RunConfig.from_flat(fixed | {key.replace("__", "."): value for key, value in settings.items()})

    return make


def recorded(steps, folder: RunFolder) -> None:
    """Leave every planned stage in the folder, as computed."""
    for step in steps.values():
        place = step.name.replace(" ", "/")
        folder.stage(step.name, step.settings, step.inputs, place, lambda out: (out / "x").write_text("x") and {})


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_setting_is_read_by_a_stage_or_changes_no_output(task):
    read = set().union(*task.stage_fields.values(), task.byte_budget_fields, PRECISION_FIELDS)
    read |= {f"cluster.{key}" for key in BUDGET_KEYS}
    idle = task.unread_fields | CHANGE_NO_OUTPUT
    assert set(keys()) == read | idle
    assert not (set().union(*task.stage_fields.values()) & idle)


@pytest.mark.parametrize("task", list(TASKS))
def test_a_setting_that_no_stage_reads_changes_no_key(base, tmp_path, task):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "log.csv").write_text(LOG)
    before = plan(base(run__task=task), "export")
    others = OTHER | UNREAD[task] | {"data.path": str(copy / "log.csv"), "run.out": str(tmp_path / "elsewhere")}
    if task == "ctr":
        others.pop("cluster.shards")
    for key, value in others.items():
        after = plan(base(run__task=task, **{key: value}), "export")
        assert {name: step.key for name, step in after.items()} == {name: s.key for name, s in before.items()}, key


def test_a_new_setting_invalidates_nothing(base, monkeypatch):
    """A field that no stage reads is no part of a key, whatever its section."""
    before = plan(base(), "export")
    config = base()
    wider = dataclasses.make_dataclass("Wider", [("brand_new", int, 3)], bases=(type(config.train),), frozen=True)
    object.__setattr__(config, "train", wider(**dataclasses.asdict(config.train)))
    assert [step.key for step in plan(config, "export").values()] == [step.key for step in before.values()]


def test_a_plan_names_the_reason_for_every_stage(base, tmp_path):
    with RunFolder(tmp_path / "out") as folder:
        steps = plan(base(cluster__resolution=2.0), "export")
        assert describe_plan(folder, steps)[1] == "cluster: never computed here"
        recorded(steps, folder)
        assert describe_plan(folder, steps) == [f"{name}: up to date" for name in steps]

        other = plan(base(cluster__resolution=2.0, train__lr=0.02), "export")
        assert describe_plan(folder, other) == [
            "ingest: up to date",
            "cluster: up to date",
            "train soft: train.lr changed default -> 0.02",
            "refit soft: train soft changed",
            "evaluate soft: refit soft changed",
            "export: refit soft changed; evaluate soft changed",
        ]
        other = plan(base(cluster__resolution=2.0, train__refit=False), "export")
        assert describe_plan(folder, other)[2:] == [
            "train soft: up to date",
            "evaluate soft: train soft changed; refit soft changed",
            "export: train soft changed; evaluate soft changed; refit soft changed",
        ]
        other = plan(base(cluster__rows=9), "export")
        assert reasons(folder, other["cluster"]) == [
            "cluster.rows changed default -> 9",
            "cluster.resolution changed 2.0 -> default",
        ]
        assert root_reasons(folder, other, "evaluate soft") == reasons(folder, other["cluster"])

        (tmp_path / "log.csv").write_text("longer")
        assert root_reasons(folder, plan(base(cluster__resolution=2.0), "export"), "train soft") == ["the log changed"]
        (folder.path / "evaluate" / "soft" / "x").unlink()
        assert reasons(folder, steps["evaluate soft"]) == ["its outputs are damaged or missing"]


def test_versions_and_records_of_another_layout_are_reasons(base, tmp_path):
    with RunFolder(tmp_path / "out") as folder:
        step = plan(base(), "ingest")["ingest"]
        recorded({"ingest": dataclasses.replace(step, settings={**step.settings, "version": 0})}, folder)
        assert reasons(folder, step) == ["this version of graphhash computes it differently"]
        record = folder.path / "stages" / "ingest.json"
        record.write_text('{"key": "k", "outputs": {}, "seconds": 1, "result": {}, "inputs": ["a"], "settings": {}}')
        assert reasons(folder, step) == ["made by an earlier version of graphhash"]


@pytest.mark.parametrize("task", list(TASKS))
def test_a_run_without_a_budget_is_the_run_with_the_tasks_default(base, task):
    kind, value = TASKS[task].default_budget
    with_budget = base(run__task=task, **{f"cluster.{kind}": value})
    assert plan(base(run__task=task), "cluster")["cluster"] == plan(with_budget, "cluster")["cluster"]


def test_a_precision_of_full_columns_is_evaluated_apart(base):
    steps = [plan(base(run__task="ctr", export__precision=p), "evaluate")["evaluate soft"] for p in ("auto", "float16")]
    assert steps[0].key != steps[1].key
