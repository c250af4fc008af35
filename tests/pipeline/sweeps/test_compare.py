"""The comparison: which cells there are, that each is trained once, and that its figures are those of the cells."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import RunConfig
from pipeline.distributed import session as ray_session
from pipeline.errors import ConfigError
from pipeline.logs.synthetic import synth
from pipeline.sweeps.compare import (
    MODELS,
    Budget,
    Cell,
    budgets_of,
    cell_config,
    make_cells,
    parse_method_setting,
    share_out,
)
from pipeline.sweeps.table import Outcome, draw, summarise, write_comparison

METHODS = ("graph", "modulo", "full")
RATIOS = (0.4, 0.7)
BLOCKED = "modulo-mf-seed1-ratio0.4"


@dataclass(frozen=True)
class Comparison:
    """A folder, and the command that fills it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self) -> int:
        """The command's exit code."""
        before = signal.getsignal(signal.SIGTERM)
        words = [
            "compare",
            "--data",
            self.folder / "log",
            "--out",
            self.out,
            "--methods",
            ",".join(METHODS),
            "--jobs",
            2,
        ]
        words += ["--seeds", 0, 1, "--ratios", *RATIOS, "--precision", "float32", "train.epochs=4", "train.dim=8"]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{self.folder}/mlflow.db")
            patch.delenv("MLFLOW_RUN_ID", raising=False)
            cli.main([str(word) for word in words])
        signal.signal(signal.SIGTERM, before)
        return exit_.value.code

    def read(self) -> dict:
        return json.loads((self.out / "compare.json").read_text())

    def trained(self) -> dict[str, int]:
        """When each cell's training was recorded."""
        return {path.parts[-3]: path.stat().st_mtime_ns for path in self.out.glob("runs/*/stages/train-*.json")}

    def mlflow_runs(self) -> list:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, ray_local):
    """After its first command, in which one cell could not be trained."""
    made = Comparison(tmp_path_factory.mktemp("compare"))
    synth(made.folder / "log", n_users=120, n_items=80, n_interactions=2400, n_communities=4, mixing=0.2, seed=0)
    (made.out / "runs" / BLOCKED).mkdir(parents=True)
    (made.out / "runs" / BLOCKED / "methods").write_text("a file where a folder has to be")
    assert made.run() == 1
    return made


def names(cells) -> set[str]:
    return {cell["run"].removeprefix("runs/") for cell in cells}


def test_a_failed_cell_is_named_with_its_reason_and_the_others_are_kept(comparison):
    result = comparison.read()
    # Two methods at two ratios, and full, for two seeds.
    assert result["n_cells"] == 10 and len(names(result["cells"])) == 9
    (failed,) = result["failed"]
    assert (failed["run"], failed["method"], failed["seed"]) == (f"runs/{BLOCKED}", "modulo", 1)
    assert failed["reason"] in (comparison.out / "compare.md").read_text()
    assert "Traceback" in (comparison.out / "runs" / BLOCKED / "error.txt").read_text()
    assert "\n" not in failed["reason"] and "methods" in failed["reason"]
    (line,) = [entry for entry in result["summary"] if (entry["method"], entry["budget"]) == ("modulo", "ratio 0.4")]
    assert (line["n_seeds"], line["n_failed"], line["recall@20_std"]) == (1, 1, None)


def test_each_cell_is_one_run_below_one_parent(comparison):
    runs = comparison.mlflow_runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert parent.info.run_id == comparison.read()["mlflow_run_id"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    finished = {run.info.run_name for run in children if run.info.status == "FINISHED"}
    assert len(finished) == 9 and "graph mf seed 1 ratio 0.7" in finished
    assert all("test.recall_at_20" in run.data.metrics for run in children if run.info.run_name in finished)


def test_the_cells_of_a_seed_share_its_log_and_fill_their_budgets(comparison):
    folders = {name: comparison.out / "runs" / name for name in names(comparison.read()["cells"])}
    files = [(folder / "ingest" / "users.parquet").stat() for folder in folders.values()]
    assert len({status.st_ino for status in files}) == 2
    for cell in comparison.read()["cells"]:
        ratio = 1.0 if cell["method"] == "full" else float(cell["budget"].split()[1])
        assert ratio - 0.01 < cell["bytes_ratio"] <= ratio


def test_the_same_command_trains_what_is_missing_and_nothing_twice(comparison):
    before, n_runs = comparison.trained(), len(comparison.mlflow_runs())
    (comparison.out / "runs" / BLOCKED / "methods").unlink()
    assert comparison.run() == 0
    after = comparison.trained()
    assert after.keys() - before.keys() == {BLOCKED}
    assert {name: when for name, when in after.items() if name != BLOCKED} == before
    assert len(comparison.mlflow_runs()) == n_runs + 1
    assert not (comparison.out / "runs" / BLOCKED / "error.txt").exists()
    written = comparison.read()
    assert comparison.run() == 0
    assert comparison.read() == written and len(written["cells"]) == 10 and not written["failed"]
    assert comparison.trained() == after and len(comparison.mlflow_runs()) == n_runs + 1


def test_a_comparison_killed_after_its_last_cell_is_finished_by_the_next_command(comparison):
    from mlflow import MlflowClient

    from pipeline.tracking.tracker import outbox_of

    parent, store = comparison.read()["mlflow_run_id"], f"sqlite:///{comparison.folder}/mlflow.db"
    client = MlflowClient(store)
    # What SIGKILL leaves: the store has the run as running, and the folder has it as not ended.
    client.update_run(parent, status="RUNNING")
    outbox_of(comparison.out, store).opened(parent)
    before = comparison.trained()
    assert comparison.run() == 0
    assert client.get_run(parent).info.status == "FINISHED"
    assert comparison.trained() == before


def test_the_table_holds_means_and_deviations_of_its_cells(comparison):
    result = comparison.read()
    with open(comparison.out / "compare.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["budget"]) for line in lines][0] == ("full", "") and len(lines) == 5
    for line in lines:
        cells = [c for c in result["cells"] if (c["method"], c["budget"]) == (line["method"], line["budget"])]
        assert len(cells) == int(line["n_seeds"])
        for key in ("recall@20", "ndcg@20", "rows", "bytes", "bytes_ratio"):
            assert float(line[key]) == pytest.approx(np.mean([c[key] for c in cells]))
        for key in ("recall@20", "ndcg@20"):
            if len(cells) > 1:
                assert float(line[f"{key}_std"]) == pytest.approx(np.std([c[key] for c in cells], ddof=1))
        assert float(line["train_seconds"]) == pytest.approx(np.mean([c["seconds"]["train"] for c in cells]))
    text = (comparison.out / "compare.md").read_text()
    assert text.count("| mf | ") == 5 and "![recall@20 against bytes](compare.png)" in text
    assert (comparison.out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_every_cell_is_there_once_and_full_once_per_model_and_seed():
    budgets = [Budget("rows", 10), Budget("rows", 20)]
    cells = make_cells(["soft", "full", "soft"], ["mf", "lightgcn"], [0, 1], budgets)
    assert len(cells) == len(set(cells)) == 2 * 2 * (2 + 1)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.budget for cell in cells if cell.method == "full"} == {None}
    # A whole table of the first seed comes first.
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["sfot"]}, "unknown method 'sfot'; did you mean soft"),
        ({"models": ["mff"]}, "unknown model 'mff'; did you mean mf"),
        ({"seeds": []}, "no seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    whole = {"methods": ["soft"], "models": ["mf"], "seeds": [0], "budgets": [Budget("rows", 9)]}
    with pytest.raises(ConfigError, match=message):
        make_cells(**(whole | change))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "budget",
    [Budget("ratio", 0.25), Budget("rows", 50), Budget("resolution", 2.0), Budget("side_rows", (30, 20)), None],
)
def test_a_cell_is_an_ordinary_run_of_one_method(budget, model):
    base = RunConfig.from_flat(
        {"data.path": "log", "run.out": "cmp", "cluster.ratio": 0.9, "train.dim": 8, "data.shards": 3}
    )
    cell = Cell("soft" if budget else "full", model, 5, budget)
    config = cell_config(base, cell)
    assert config.cluster.budget == ((budget.kind, budget.value) if budget else ("resolution", 1.0))
    assert (config.data.seed, config.map.seed, config.train.seed) == (5, 5, 5)
    assert (config.run.methods, config.run.out) == ((cell.method,), f"cmp/runs/{cell.name}")
    assert {key: config.flat()[key] for key in MODELS[model]} == MODELS[model]
    assert (config.train.dim, config.data.shards) == (8, 3)
    assert RunConfig.from_flat(config.flat()) == config


def test_full_depends_on_no_setting_of_the_clusters():
    settings = {"data.path": "log", "run.out": "cmp", "cluster.method": "balanced", "cluster.rows": 60}
    config = cell_config(RunConfig.from_flat(settings), Cell("full", "mf", 0, None))
    assert config == cell_config(
        RunConfig.from_flat({"data.path": "log", "run.out": "cmp"}), Cell("full", "mf", 0, None)
    )


def test_a_setting_of_one_method_changes_its_cells_alone():
    base = RunConfig.from_flat({"data.path": "log", "run.out": "cmp"})
    own = [parse_method_setting("full:train.lr=0.04"), parse_method_setting("full:map.item_bias=true")]
    full, soft = (cell_config(base, Cell(method, "mf", 0, None), own) for method in ("full", "soft"))
    assert (full.train.lr, full.map.item_bias) == (0.04, True)
    assert soft == cell_config(base, Cell("soft", "mf", 0, None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr=0.04", "names no method"),
        ("fulll:train.lr=0.04", "unknown method 'fulll'; did you mean full"),
        ("full:train.lrr=0.04", "unknown key 'train.lrr'"),
        ("full:data.seed=1", "data.seed cannot differ between methods"),
        ("full:train.seed=1", "train.seed cannot differ"),
    ],
)
def test_a_setting_that_cannot_be_one_methods_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_method_setting(text)


def test_budgets_are_those_given_then_the_configured_one_then_a_default():
    configured = RunConfig.from_flat({"cluster.user_rows": 30, "cluster.item_rows": 20})
    assert budgets_of(configured, ratio=[0.1, 0.2], rows=[]) == [Budget("ratio", 0.1), Budget("ratio", 0.2)]
    assert budgets_of(configured, ratio=[], rows=[]) == [Budget("side_rows", (30, 20))]
    assert [budget.kind for budget in budgets_of(RunConfig(), ratio=[])] == ["ratio", "ratio"]
    with pytest.raises(ConfigError, match="ratio and in rows contradict"):
        budgets_of(configured, ratio=[0.1], rows=[5])


@pytest.mark.parametrize(
    ("words", "seeds", "overrides"),
    [
        ("--seeds 0 1 2", (0, 1, 2), ()),
        ("--seeds 0,1,2 train.epochs=3", (0, 1, 2), ("train.epochs=3",)),
        ("train.epochs=3 --seeds 0 --seeds=1,2", (0, 1, 2), ("train.epochs=3",)),
        ("--seeds 0, 1 2 --ratios 0.5 train.epochs=3 train.dim=4", (0, 1, 2), ("train.epochs=3", "train.dim=4")),
    ],
)
def test_lists_are_written_with_commas_with_spaces_or_again(words, seeds, overrides):
    command = cli.app.commands["compare"]
    context = click.Context(command)
    command.parse_args(context, ["--data", "x", "--out", "o", *words.split()])
    assert sum(context.params["seeds"], ()) == seeds
    assert context.params["overrides"] == overrides


@pytest.mark.parametrize("words", ["--seeds 0 x", "--ratios a", "--rows 1.5"])
def test_a_list_of_what_it_does_not_take_is_refused(words):
    command = cli.app.commands["compare"]
    with pytest.raises(click.BadParameter, match="holds what is not"):
        command.parse_args(click.Context(command), ["--data", "x", "--out", "o", *words.split()])


@pytest.mark.parametrize(
    ("command", "setting", "option"),
    [
        ("compare", "train.loss=directau", "--models"),
        ("compare", "train.seed=3", "--seeds"),
        ("tune", "train.model=neumf", "--model"),
    ],
)
def test_settings_that_an_option_stands_for_are_refused(command, setting, option, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--data", "x", "--out", str(tmp_path), setting])
    assert exit_.value.code == 2
    assert (
        f"{setting}: graphhash {command} takes {setting.split('=')[0]} from {option}; give it there"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["compare", "tune"])
def test_help_names_every_model(name):
    command = cli.app.commands[name]
    text = command.get_help(click.Context(command, max_content_width=200))
    assert all(model in text for model in MODELS)


@pytest.mark.parametrize(
    ("gpus", "machines", "n_cells", "jobs", "expected"),
    [
        (0, [2], 9, None, (1, {"num_cpus": 2})),
        (0, [16], 9, None, (4, {"num_cpus": 4})),
        (0, [16], 2, None, (2, {"num_cpus": 8})),
        (0, [16, 16], 99, None, (8, {"num_cpus": 4})),
        (0, [2], 9, 2, (2, {"num_cpus": 1})),
        (0, [2], 9, 4, (4, {"num_cpus": 1})),
        (4, [64], 9, None, (4, {"num_cpus": 1, "num_gpus": 1})),
        (4, [64], 9, 8, (4, {"num_cpus": 1, "num_gpus": 1})),
    ],
)
def test_as_many_at_once_as_the_cluster_has_room_for(monkeypatch, gpus, machines, n_cells, jobs, expected):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(machines)} | ({"GPU": gpus} if gpus else {}))
    monkeypatch.setattr(ray_session, "cpus_of_machines", lambda: machines)
    assert share_out(n_cells, jobs) == expected


def entry(method: str, model: str, seed: int, budget: str, recall: float | None, ratio: float = 0.2):
    metrics = {
        "rows": 9,
        "bytes": 90,
        "bytes_ratio": ratio,
        "recall@20": recall,
        "ndcg@20": recall,
        "seconds": {"train": 1.0},
    }
    return {"method": method, "model": model, "seed": seed, "budget": budget, "run": "r"}, Outcome(metrics=metrics)


def test_the_picture_has_a_panel_per_model_and_a_line_per_method():
    entries = [
        entry(method, model, seed, budget, 0.1 * (seed + 1), ratio)
        for method, model in (("soft", "mf"), ("graph", "mf"), ("soft", "neumf"), ("soft", "ials"))
        for budget, ratio in (("ratio 0.2", 0.2), ("ratio 0.1", 0.1))
        for seed in (0, 1)
    ] + [entry("full", "mf", 0, "", 0.3, 1.0)]
    panels = [axes for axes in draw(summarise(entries)).axes if axes.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == ["mf", "neumf", "ials"]
    assert [len(panel.containers) for panel in panels] == [2, 1, 1]
    line = panels[0].containers[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [(10, 0.15), (20, 0.15)])


def test_without_a_test_there_is_a_table_and_no_picture(tmp_path):
    (tmp_path / "compare.png").write_text("of another time")
    write_comparison(tmp_path, [entry("soft", "mf", 0, "rows 9", None)], n_cells=2, run_id=None)
    assert not (tmp_path / "compare.png").exists()
    text = (tmp_path / "compare.md").read_text()
    assert "1 of 2 cells so far" in text and "| mf | soft | rows 9 | 1 | 9 | 90 | 20.0 % | - | - | 1 |" in text
