"""The configuration: precedence, types, contradictions, and the way through TOML and back."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.run_config import SECTIONS, DataConfig, RunConfig, TrainConfig, keys, parse_override
from pipeline.config.validation import fields_of
from pipeline.errors import ConfigError
from pipeline.runs.tasks import TASKS
from pipeline.task import budget_of


@pytest.fixture
def toml(tmp_path):
    def write(text: str):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_stronger_layers_win(toml):
    path = toml("[train]\ndim = 8\nlr = 0.1\nepochs = 3\n")
    config = RunConfig.load(path, ["train.epochs=5"], **{"train.epochs": 4, "train.lr": 0.2, "train.seed": None})
    assert (config.train.dim, config.train.lr, config.train.epochs, config.train.seed) == (8, 0.2, 5, 0)


def test_later_file_is_stronger(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\ndim = 8\nepochs = 3\n")
    (tmp_path / "b.toml").write_text("[train]\ndim = 16\n")
    config = RunConfig.load([tmp_path / "a.toml", tmp_path / "b.toml"])
    assert (config.train.dim, config.train.epochs) == (16, 3)


def test_a_budget_replaces_the_budget_of_a_weaker_layer(toml):
    path = toml("[cluster]\nratio = 0.2\n")
    assert budget_of(RunConfig.load(path, **{"cluster.rows": 100}), ("ratio", 0.25)) == ("rows", 100)
    config = RunConfig.load(path, ["cluster.resolution=7"], **{"cluster.rows": 100})
    assert budget_of(config, ("ratio", 0.25)) == ("resolution", 7.0)


def test_every_task_has_one_default_budget():
    assert TASKS["retrieval"].default_budget == ("ratio", 0.25)
    assert TASKS["ctr"].default_budget == ("resolution", 5.0)


def test_two_budgets_in_one_layer_contradict():
    with pytest.raises(ConfigError, match=r"cluster.rows=5 and cluster.ratio=0.5 contradict"):
        RunConfig.load(None, ["cluster.rows=5", "cluster.ratio=0.5"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-3", 0.001),
        ("train.lr=none", None),
        ("train.lr=1", 1.0),
        ("run.mlflow=False", False),
        ("run.methods=soft, graph", ("soft", "graph")),
        ("run.methods=[soft,graph]", ("soft", "graph")),
        ("data.user_column=7", "7"),
        ("data.path=a=b", "a=b"),
        ("data.path='with space'", "with space"),
        ("map.item_bias=true", True),
    ],
)
def test_override_is_read_as_the_keys_own_type(override, value):
    _key, parsed = parse_override(override)
    assert (parsed, type(parsed)) == (value, type(value))
    RunConfig.load(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian.lr=1", "unknown key 'trian.lr'; did you mean train.lr?"),
        ("train.weight_decey=1", "did you mean train.weight_decay?"),
        ("resolution=3", "did you mean cluster.resolution?"),
        ("seed=3", "did you mean data.seed or map.seed or train.seed?"),
        ("zzz.qqq=3", "sections are data, cluster"),
        ("train.lr", "write section.key=value"),
        ("train.epochs=1.5", "train.epochs='1.5' is not a whole number"),
        ("run.mlflow=maybe", "is not true or false"),
        ("train.dim=none", "is not a whole number"),
        ("run.methods=", "run.methods is empty"),
        ("run.methods=../x", "is not a method"),
        ("run.methods=soft,soft", "names a method twice"),
        ("cluster.ratio=0", "must be above 0"),
        ("cluster.resolution=inf", "finite"),
        ("cluster.resolution=nan", "finite"),
        ("train.lr=nan", "finite"),
        ("train.weight_decay=nan", "out of range"),
        ("train.patience=0", "at least 1"),
        ("data.test=1", "from 0.0 to below 1.0"),
        ("data.bad_rows=skpi", "did you mean 'skip'?"),
        ("data.format=xml", "choices are auto"),
        ("data.user_column=item_id", "both 'item_id'"),
        ("train.dim=0", "train.dim=0 is out of range; it must be from 1 to 65536"),
        ("train.lr=-1", "train.lr=-1.0 is out of range; it must be a finite number above 0"),
        ("cluster.ratio=2", "cluster.ratio=2.0 is out of range; it must be above 0 and at most 1"),
        ("train.popularity_power=inf", "it must be a finite number"),
        ("train.structure=stakced", "did you mean 'stacked'? choices are stacked, parallel"),
        ("train.model=lightgnc", "did you mean 'lightgcn'?"),
        ("train.decay=1", "train.decay was renamed; write train.l2_total"),
        ("evaluate.k=", "evaluate.k= must be whole numbers from 1 to 1000, such as 10,20,50"),
        ("evaluate.k=10,x", "evaluate.k=10,x must be whole numbers from 1 to 1000"),
        ("evaluate.k=10,1001", "whole numbers from 1 to 1000"),
        ("evaluate.k=10,20,010", "names a cut-off twice"),
        ("export.runtime=folded", "export.runtime='folded' was renamed; write 'materialized'"),
    ],
)
def test_bad_override_is_refused_with_the_remedy(text, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(None, [text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['k = ["10", "20"]', "k = [10, 20]"])
def test_cut_offs_are_numbers_in_a_file_or_texts(toml, text):
    config = RunConfig.load(toml(f"[evaluate]\n{text}\n"))
    assert (config.evaluate.k, config.evaluate.cutoffs) == (("10", "20"), (10, 20))
    assert RunConfig.load(toml("[evaluate]\nk = 5\n")).evaluate.cutoffs == (5,)
    with pytest.raises(ConfigError, match=r"run\.task=ctr; leave it out"):
        RunConfig.load(toml("[evaluate]\nk = 5\n"), ["run.task=ctr"])


def test_split_must_leave_something_to_train_on():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        DataConfig(validation=0.5, test=0.5)
    DataConfig(split="given", validation=0.5, test=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\ndimm = 8\n", "did you mean train.dim?"),
        ("[train]\ndim = '8'\n", "train.dim='8' is str; expected a whole number"),
        ("[train]\ndim = true\n", "train.dim=True is bool; expected a whole number"),
        ("[train]\nlr = 'x'\n", "expected a number or none"),
        ("[run]\nmethods = 'soft'\n", "expected a list of texts"),
        ("[run]\nmethods = ['soft', 1]\n", "expected a list of texts"),
        ("[train]\nlr = true\n", "train.lr=True is bool; expected a number or none"),
        ("[train]\nhidden = [256, 128]\n", "train.hidden holds 256, which is int; expected a list of texts or none"),
        ("[train]\ndim = 0\nepochs = 0\n", "from 1 to 65536; also train.epochs=0 is out of range"),
        ("[train]\ndecay = 0.1\n", "train.decay was renamed; write train.l2_total"),
        ("[cluster]\nrows = 3\n", "cluster.rows=3 is out of range; it must be at least 4"),
        ("[cluster]\nrows = 5\nratio = 0.5\n", "cluster.rows=5 and cluster.ratio=0.5 contradict"),
        ("dim = 8\n", "stands outside any section"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_bad_file_is_refused_by_name(toml, text, message):
    path = toml(text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_settings_are_validated_after_the_merge(toml):
    path = toml("[train]\nmodel = 'dlrm'\ndim = 0\n")
    config = RunConfig.load(path, ["train.dim=4"], **{"run.task": "ctr"})
    assert (config.train.model, config.train.dim, config.train.patience) == ("dlrm", 4, None)
    with pytest.raises(ConfigError, match=f"^{path}: train.model=dlrm is not of run.task=retrieval"):
        RunConfig.load(path, ["train.dim=4"])


def test_an_error_names_no_file_that_has_no_part_in_it(toml):
    path = toml("[train]\ndim = 8\n")
    with pytest.raises(ConfigError, match=r"^train.epochs=0 is out of range"):
        RunConfig.load(path, ["train.epochs=0"])
    with pytest.raises(ConfigError, match=r"^train.dim=0 is out of range"):
        RunConfig.load(path, ["train.dim=0"])


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        RunConfig.load(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        RunConfig.load(tmp_path / "x.toml")


def test_whole_numbers_are_taken_where_numbers_are_expected():
    assert type(TrainConfig(lr=1).lr) is float


def test_an_error_of_construction_is_one_line_and_survives_pickling():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(dim=0, lr="x")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert str(caught.value).startswith("train.dim=0 is out of range")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"unknown key 'train.dimm'; did you mean 'dim'"):
        TrainConfig(dimm=8)
    with pytest.raises(ConfigError, match=r"train.dim=-1 is out of range"):
        dataclasses.replace(TrainConfig(), dim=-1)


def test_a_configuration_survives_pickling():
    config = RunConfig.load(None, ["train.lr=0.1", "run.methods=soft,full"])
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_description(section):
    missing = [name for name, field in fields_of(SECTIONS[section]).items() if not field.description]
    assert not missing


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.dim = 3


def test_flat_has_every_key():
    assert list(RunConfig().flat()) == keys()


@given(
    path=st.text(st.characters(exclude_categories=("Cs",))),
    lr=st.none() | st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**60),
    bias=st.none() | st.booleans(),
    methods=st.lists(st.from_regex(r"[a-z][a-z_]{0,8}\Z", fullmatch=True), min_size=1, unique=True),
)
def test_toml_reads_back_equal(tmp_path_factory, path, lr, seed, bias, methods):
    settings = {
        "data.path": path,
        "train.lr": lr,
        "train.seed": seed,
        "map.item_bias": bias,
        "run.methods": methods,
    }
    config = RunConfig.from_flat(settings)
    file = tmp_path_factory.mktemp("toml") / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8", newline="")
    assert RunConfig.load(file) == config
