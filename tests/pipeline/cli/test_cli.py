"""The command line: what options mean, what is printed, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pipeline.bundles.recommend
from graphhash.graph.vocabulary import Vocabulary
from pipeline.cli import main as cli
from pipeline.cli import settings as cli_settings
from pipeline.config.run_config import RunConfig
from pipeline.maps.methods import METHODS
from pipeline.task import budget_of
from tests.pipeline.cli.conftest import METRICS

ROOT = Path(__file__).resolve().parents[3]


def test_options_become_settings(graphhash, runs, tmp_path):
    code, _, _ = graphhash(
        "run",
        "--data",
        "log.csv",
        "--out",
        tmp_path / "out",
        "--method",
        "soft, full",
        "--rows",
        500,
        "--seed",
        7,
        "--no-item-bias",
        "--indices-per-id",
        4,
        "--dim",
        16,
        "--lr",
        0.01,
        "--weight-decay",
        1e-6,
        "--epochs",
        9,
        "--threads",
        2,
        "--shards",
        3,
        "--bad-rows",
        "skip",
        "--user-column",
        "u",
        "--split",
        "given",
        "--address",
        "auto",
        "--no-mlflow",
        "--precision",
        "float16",
        "train.patience=2",
        "data.seed=8",
    )
    ((config, until),) = runs
    flat = config.flat()
    expected = {
        "data.path": str(Path("log.csv").absolute()),
        "run.methods": ("soft", "full"),
        "cluster.rows": 500,
        "map.seed": 7,
        "train.seed": 7,
        "data.seed": 8,
        "map.item_bias": False,
        "map.indices_per_id": 4,
        "train.dim": 16,
        "train.lr": 0.01,
        "train.weight_decay": 1e-6,
        "train.epochs": 9,
        "cluster.threads": 2,
        "cluster.shards": 3,
        "data.bad_rows": "skip",
        "data.user_column": "u",
        "data.split": "given",
        "run.address": "auto",
        "run.mlflow": False,
        "export.precision": "float16",
        "train.patience": 2,
    }
    assert (code, until) == (0, "report")
    assert {key: flat[key] for key in expected} == expected


def test_every_option_names_existing_settings():
    names = set(RunConfig().flat())
    assert {key for keys in cli_settings.KEYS.values() for key in keys} <= names
    options = {option.name for command in cli.app.commands.values() for option in command.params}
    assert set(cli_settings.KEYS) <= options


def test_help_names_every_method(graphhash):
    _, out, _ = graphhash("run", "--help")
    assert all(method in out for method in METHODS)


def test_run_prints_the_table_and_writes_the_figures(graphhash, runs, tmp_path):
    code, out, err = graphhash("run", "--data", "x", "--out", tmp_path / "out", "--json", tmp_path / "f.json")
    assert code == 0
    assert out.splitlines()[:2] == [
        "method    rows      bytes  of full  recall@20  capped recall@20  NDCG@20  train s",
        "soft    11,061  4,000,000   25.0 %     0.1399            0.1421   0.1131       12",
    ]
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out
    assert err == "progress\n"
    assert json.loads((tmp_path / "f.json").read_text()) == [METRICS]


@pytest.mark.parametrize("command", ["ingest", "cluster", "train", "evaluate", "export"])
def test_stage_commands_go_as_far_as_their_name(graphhash, runs, tmp_path, command):
    code, out, _ = graphhash(command, "--data", "x", "--out", tmp_path / "out", "--json", tmp_path / "f.json")
    assert (code, runs[0][1]) == (0, command)
    assert out
    assert json.loads((tmp_path / "f.json").read_text())


def test_without_data_the_run_folder_remembers(graphhash, runs, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "f.toml").write_text("[train]\nepochs = 5\nlr = 0.5\n")
    graphhash("ingest", "--data", "x", "--out", out, "--seed", 3, "cluster.ratio=0.5")
    graphhash("train", "--out", out, "--config", tmp_path / "f.toml", "--lr", 0.1, "--resolution", 20)
    config = runs[1][0]
    assert (config.data.path, config.data.seed) == (runs[0][0].data.path, 3)
    assert (config.train.epochs, config.train.lr, budget_of(config, ("ratio", 0.25))) == (5, 0.1, ("resolution", 20.0))
    # With --data a command starts from the defaults again.
    graphhash("train", "--data", "x", "--out", out)
    assert runs[2][0].train.epochs == RunConfig().train.epochs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--out", "o"], "no data: give --data PATH"),
        (["run", "--data", "x"], "Missing option '--out'"),
        (["run", "--data", "x", "--out", "o", "--rows", "5", "--ratio", "0.5"], "contradict each other"),
        (["run", "--data", "x", "--out", "o", "--ratoi", "3"], "Did you mean"),
        (["run", "--data", "x", "--out", "o", "train.lrr=3"], "did you mean train.lr?"),
        (["run", "--data", "x", "--out", "o", "extra"], "write section.key=value"),
        (["run", "--data", "x", "--out", "o", "--dim", "x"], "not a valid integer"),
        (["run", "--data", "x", "--out", "o", "--config", "none.toml"], "cannot read the configuration file"),
        (["run", "--data", "", "--out", "o"], "no data"),
        (["rnu"], "No such command 'rnu'"),
        (["recommend", "b"], "give --user-id ID or --users-file FILE"),
        (["recommend", "b", "--users-file", "none.txt"], "none.txt: cannot be read"),
        (["recommend", "b", "--user-id", "1", "-k", "0"], "not in the range"),
        (["synth"], "Missing argument 'OUT'"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(graphhash, runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = graphhash(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("graphhash: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert runs == []


def test_synth_passes_its_sizes_on(graphhash, monkeypatch, tmp_path):
    module = ModuleType("pipeline.logs.synthetic")
    module.synth = lambda out, **sizes: {"out": str(out), **sizes}
    monkeypatch.setitem(sys.modules, "pipeline.logs.synthetic", module)
    code, out, _ = graphhash("synth", tmp_path / "log", "--users", 10, "--mixing", 0.5, "--json", tmp_path / "f.json")
    assert code == 0
    assert "n_users" in out
    written = json.loads((tmp_path / "f.json").read_text())
    assert written == {
        "out": str(tmp_path / "log"),
        "n_users": 10,
        "n_items": 5000,
        "n_interactions": 300000,
        "n_communities": 50,
        "mixing": 0.5,
        "seed": 0,
    }


def test_synth_of_ctr_passes_its_sizes_on_and_refuses_those_of_retrieval(graphhash, monkeypatch, tmp_path):
    from pipeline.ctr.synthetic_model import LogSettings

    module = ModuleType("pipeline.ctr.synthetic")
    module.synth_ctr = lambda out, settings: {"settings": settings == LogSettings(500, 900, 3, 5, 0.2, 0.05, 0.25, 7)}
    monkeypatch.setitem(sys.modules, "pipeline.ctr.synthetic", module)
    sizes = ("--rows", 500, "--cardinality", 900, "--days", 3, "--communities", 5, "--seed", 7)
    code, out, _ = graphhash("synth", tmp_path / "log", "--task", "ctr", *sizes)
    assert (code, out.split()) == (0, ["settings", "True"])
    code, _, err = graphhash("synth", tmp_path / "log", "--task", "ctr", "--users", 10)
    assert (code, "--users is no option of --task ctr" in err) == (2, True)
    code, _, err = graphhash("synth", tmp_path / "log", "--positive-rate", 0.1)
    assert (code, "--positive-rate is no option of --task retrieval" in err) == (2, True)


def test_recommend_prints_ranks_and_marks_unknown_users(graphhash, monkeypatch, tmp_path):
    asked = {}

    def recommend(bundle, user_ids, k, **more):
        asked.update(user_ids=user_ids, k=k, **more)
        items = [{"item_id": 17, "score": 2.5}, {"item_id": 4, "score": -1.0}]
        return [{"user_id": user, "known": user != "x", "items": items} for user in user_ids]

    monkeypatch.setattr(pipeline.bundles.recommend, "recommend", recommend)
    (tmp_path / "users.txt").write_text("x\n\n y \n")
    code, out, _ = graphhash(
        "recommend",
        "b",
        "--user-id",
        "7",
        "--users-file",
        tmp_path / "users.txt",
        "-k",
        2,
        "--exclude",
        "1, 2",
        "--json",
        tmp_path / "f.json",
    )
    assert code == 0
    assert (asked["user_ids"], asked["k"], asked["exclude"], asked["exclude_seen"]) == (
        ("7", "x", " y "),
        2,
        ["1", " 2"],
        False,
    )
    assert out.splitlines()[:6] == [
        "user 7",
        "rank  item    score",
        "1       17   2.5000",
        "2        4  -1.0000",
        "user x (out of vocabulary: the OOV row answers)",
        "rank  item    score",
    ]
    assert [answer["known"] for answer in json.loads((tmp_path / "f.json").read_text())] == [
        True,
        False,
        True,
    ]


def test_json_alone_is_on_standard_output_where_the_file_is_a_dash(graphhash, monkeypatch, tmp_path):
    answer = [{"user_id": "7", "known": True, "items": [{"item_id": 17, "score": 2.5}]}]
    monkeypatch.setattr(pipeline.bundles.recommend, "recommend", lambda *_args, **_more: answer)
    monkeypatch.chdir(tmp_path)
    code, out, err = graphhash("recommend", "b", "--user-id", "7", "--json", "-")
    assert (code, json.loads(out)) == (0, answer)
    assert "rank  item" in err
    assert not list(tmp_path.iterdir())
    # Another command in the same process prints as ever.
    assert "rank  item" in graphhash("recommend", "b", "--user-id", "7")[1]


def test_recommend_from_no_bundle_is_one_line(graphhash, tmp_path):
    code, _, err = graphhash("recommend", tmp_path, "--user-id", "1")
    assert code == 1
    assert err.count("\n") == 1
    assert "no bundle there" in err


def test_demo_goes_the_whole_way_and_asks_for_a_user_of_its_log(graphhash, runs, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    folder, asked = tmp_path / "demo", []
    (folder / "run" / "ingest").mkdir(parents=True)
    Vocabulary([7, 3]).save(folder / "run" / "ingest" / "users.parquet")
    monkeypatch.setattr(
        pipeline.bundles.recommend, "recommend", lambda bundle, users, k, **_: asked.append((bundle, users)) or []
    )
    monkeypatch.setattr(
        "pipeline.cli.demo.DEMO_LOG", ["--users", "20", "--items", "10", "--interactions", "50", "--communities", "2"]
    )
    code, out, _ = graphhash("demo", folder)
    assert code == 0
    assert [line.split()[2] for line in out.splitlines() if line.startswith("$ ")] == [
        "synth",
        "run",
        "recommend",
    ]
    assert runs[0][0].run.methods == ("soft", "graph", "modulo", "full")
    assert asked == [(folder / "run" / "bundle", ("7",))]
    assert os.environ.pop("MLFLOW_TRACKING_URI") == f"sqlite:///{folder}/mlflow.db"
    assert out.splitlines()[-1].endswith("report.html")


def test_every_command_teaches_with_examples(graphhash):
    for name in cli.app.commands:
        code, out, _ = graphhash(name, "--help")
        assert code == 0, name
        assert f"  graphhash {name} " in out, name


def test_module_and_pipe(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: graphhash [OPTIONS] COMMAND")


def test_the_first_cut_off_is_that_of_the_table(graphhash, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "recall@10", 0.07)
    monkeypatch.setitem(METRICS, "capped_recall@10", 0.08)
    monkeypatch.setitem(METRICS, "ndcg@10", 0.09)
    code, out, _ = graphhash("evaluate", "--data", "x", "--out", tmp_path / "out", "--k", "10,20")
    assert code == 0
    assert runs[0][0].evaluate.cutoffs == (10, 20)
    assert "recall@10  capped recall@10  NDCG@10" in out
    assert "0.0700            0.0800   0.0900" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "soft,graph", "--recommendations", "top.parquet"], "takes one method, the run has soft,graph"),
        (["--task", "ctr", "--recommendations", "top.parquet"], "run.task=ctr ranks nothing"),
        (["--task", "ctr", "--test-interactions", "top.parquet"], "run.task=ctr ranks nothing"),
    ],
)
def test_recommendations_are_of_one_method_that_ranks(graphhash, runs, tmp_path, arguments, message):
    code, _, err = graphhash("evaluate", "--data", "x", "--out", tmp_path / "out", *arguments)
    assert (code, runs) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_without_validation_the_epochs_have_to_be_given(graphhash, tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\na,b\n")
    given = ["run", "--data", tmp_path / "log.csv", "--out", tmp_path / "out", "--validation", 0]
    code, _, err = graphhash(*given)
    assert code == 2
    assert err == (
        "graphhash: error: data.validation=0.0 leaves nothing to stop the training by; give the number of epochs, such as --epochs 40, "
        "or a share above 0\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["retrieval", "ctr"])
def test_the_log_decides_on_the_method_where_none_is_given(graphhash, runs, tmp_path, task):
    common = ("cluster", "--task", task, "--data", tmp_path / "log.csv", "--out", tmp_path / "out", "--ratio", 0.1)
    assert graphhash(*common)[0] == 0
    assert runs[-1][0].run.methods == ("auto",)
    assert graphhash(*common, "run.methods=graph")[0] == 0
    assert runs[-1][0].run.methods == ("graph",)
