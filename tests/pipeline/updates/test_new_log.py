"""A later log is read as ingestion reads the log of a run: the same ids, whatever the files look like."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.cli.update import update
from pipeline.config.run_config import DataConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.ingest import ingest
from pipeline.updates.log import read_new_log

PLAIN = "user_id,item_id\n7,71053\n7,85123A\nu8,71053\n007,22\n"
LATER = {
    "separator": (PLAIN.replace(",", ";").encode(), {"separator": ";"}),
    "tab": (PLAIN.replace(",", "\t").encode(), {"separator": "\t"}),
    "no header": (PLAIN.split("\n", 1)[1].encode(), {"columns": ("user_id", "item_id")}),
    "encoding": (
        PLAIN.replace("user_id", "us\u00e9r").encode("utf-16"),
        {"encoding": "utf-16", "user_column": "us\u00e9r"},
    ),
    "columns in another order": (b"item_id,user_id\n71053,7\n85123A,7\n71053,u8\n22,007\n", {}),
}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Vocabularies and train graph of the log, taken as text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "log.csv").write_text(PLAIN)
    settings = {"user_kind": "string", "item_kind": "string", "validation": 0.0, "test": 0.0, "shards": 1}
    ingest(DataConfig(str(folder / "log.csv"), **settings), folder / "out")
    return {side: Vocabulary.load(folder / "out" / f"{side}.parquet") for side in ("users", "items")}, folder / "out"


@pytest.mark.parametrize("name", LATER)
def test_the_same_log_in_another_layout_has_the_same_ids_and_interactions(name, known, tmp_path):
    vocabularies, out = known
    data, settings = LATER[name]
    (tmp_path / "later.csv").write_bytes(data)
    found = read_new_log(str(tmp_path / "later.csv"), DataConfig("run.csv", **settings), vocabularies)
    assert found.n_new == {"users": 0, "items": 0}
    assert (found.graph != ShardedCsr.open(out / "train").load()).nnz == 0


def test_a_type_of_ids_is_the_runs(known, tmp_path):
    (tmp_path / "later.csv").write_text("user_id,item_id\n7,22\n9,22\n")
    path, vocabularies = str(tmp_path / "later.csv"), known[0]
    found = read_new_log(path, DataConfig("run.csv", user_kind="string"), vocabularies)
    assert found.n_new == {"users": 1, "items": 0}
    assert found.vocabularies["users"].ids.to_pylist()[-1] == "9"
    with pytest.raises(DataError, match=r"item_kind=int64 contradicts the run, whose items are string; leave it out"):
        read_new_log(path, DataConfig("run.csv", item_kind="int64"), vocabularies)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--separator", "tab", "--user-kind", "string"], {"separator": "\t", "user_kind": "string"}),
        (["--header", "no", "--columns", "a, b"], {"columns": ("a", "b")}),
        (["--header", "yes"], {"columns": None}),
    ],
)
def test_options_of_update_are_those_of_ingestion(options, settings, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def record(run, log, **arguments):
        assert arguments["data"] == settings
        raise Reached

    monkeypatch.setattr("pipeline.updates.update.update", record)
    (tmp_path / "run").mkdir()
    result = CliRunner().invoke(update, [str(tmp_path / "run"), "later.csv", *options])
    assert isinstance(result.exception, Reached), result.output
