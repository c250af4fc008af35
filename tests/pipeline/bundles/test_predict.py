"""`graphhash predict`: rows of files, and the probabilities that a click bundle gives them."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from pipeline.bundles import predict
from pipeline.bundles.predict import predict_files
from pipeline.cli.main import app
from pipeline.logs.csv import CsvFormat
from serving import BundleError, Scorer
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import small_model

N = 300


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    export_small(small_ctr(), folder)
    return folder


@pytest.fixture
def log(tmp_path):
    """Raw rows with a column that the model does not read, as parquet, and what the bundle gives them."""
    types = {"device": pa.int64(), "item": pa.int64()}
    columns = {name: pa.array(values, types.get(name)) for name, values in raw_log(N).items()}
    table = pa.table({"row": np.arange(N), **columns})
    pq.write_table(table, tmp_path / "log.parquet")
    return table


def expected(bundle):
    return Scorer(bundle, provider="cpu").predict(raw_log(N))


def test_rows_come_back_with_the_scorers_probabilities(bundle, log, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "SLICE_ROWS", 70)
    out = tmp_path / "new" / "scored.parquet"
    found = predict_files(bundle, str(tmp_path / "log.parquet"), out, provider="cpu")
    written = pq.read_table(out)
    # As texts, because NaN is not equal to itself.
    assert str(written.drop_columns(["probability"]).to_pylist()) == str(log.to_pylist())
    assert written.schema.field("probability").type == pa.float32()
    np.testing.assert_allclose(written["probability"], expected(bundle), rtol=1e-6)
    assert found.n_rows == N
    assert found.mean_prediction == pytest.approx(expected(bundle).mean())
    known = Scorer(bundle, provider="cpu").details(raw_log(N)).known
    assert found.oov_rate == {name: pytest.approx(1 - there.mean()) for name, there in known.items()}
    assert [p.name for p in out.parent.iterdir()] == ["scored.parquet"]


def test_files_of_a_folder_are_scored_in_order_into_csv(bundle, log, tmp_path):
    (tmp_path / "days").mkdir()
    for day, start in enumerate((0, 120)):
        pq.write_table(log.slice(start, 120 if day == 0 else N), tmp_path / "days" / f"{day}.parquet")
    out = tmp_path / "scored.csv"
    arguments = [
        "predict",
        str(bundle),
        "--data",
        str(tmp_path / "days"),
        "--out",
        str(out),
        "--keep",
        "row, user",
        "--column",
        "p",
    ]
    app.main([*arguments, "--provider", "cpu"], standalone_mode=False)
    written = pa_csv.read_csv(out)
    assert written.column_names == ["row", "user", "p"]
    assert written["row"].to_pylist() == list(range(N))
    np.testing.assert_allclose(written["p"], expected(bundle), rtol=1e-5)


def test_csv_in_any_layout_keeps_its_texts(bundle, log, tmp_path):
    texts = {
        "genres": pa.array(["war"] * N),
        "tags": pa.array(["5"] * N),
        "row": pa.array([f"{i:04d}" for i in range(N)]),
    }
    table = pa.table({name: texts.get(name, log[name]) for name in log.column_names})
    options = pa_csv.WriteOptions(include_header=False, delimiter=";")
    pa_csv.write_csv(table, tmp_path / "log.csv", options)
    out, layout = tmp_path / "scored.tsv", CsvFormat(";", "utf-8", tuple(table.column_names))
    predict_files(bundle, str(tmp_path / "log.csv"), out, keep=["row", "item"], layout=layout, provider="cpu")
    with open(out, encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, delimiter="\t")
    assert header == ["row", "item", "probability"]
    assert [line[0] for line in lines] == texts["row"].to_pylist()
    columns = {name: table[name].to_pylist() for name in table.column_names}
    np.testing.assert_allclose(
        [float(line[2]) for line in lines], Scorer(bundle, provider="cpu").predict(columns), rtol=1e-5
    )


def test_what_cannot_be_is_said_and_leaves_the_old_file(bundle, log, tmp_path):
    file, out = str(tmp_path / "log.parquet"), tmp_path / "scored.parquet"
    out.write_bytes(b"old")
    with pytest.raises(DataError, match=r"scored.json: the name of the file to write must end in .parquet, .csv, .tsv"):
        predict_files(bundle, file, tmp_path / "scored.json", provider="cpu")
    with pytest.raises(DataError, match=r"no column 'usr' to keep; did you mean 'user'\?"):
        predict_files(bundle, file, out, keep=["usr"], provider="cpu")
    with pytest.raises(DataError, match=r"there is a column 'row' already; .* with --column"):
        predict_files(bundle, file, out, column="row", provider="cpu")
    with pytest.raises(
        DataError, match=r"cannot be written to .*scored.csv .*name the columns to write with --keep, or write parquet"
    ):
        predict_files(bundle, file, tmp_path / "scored.csv", provider="cpu")
    pq.write_table(log.drop_columns(["item"]), tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"short.parquet: from row 1 on: no column 'item'"):
        predict_files(bundle, str(tmp_path / "short.parquet"), out, provider="cpu")
    small_model().export(tmp_path / "retrieval")
    with pytest.raises(BundleError, match="task 'retrieval', not 'ctr'"):
        predict_files(tmp_path / "retrieval", file, out, provider="cpu")
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "scored"))) == ["scored.parquet"]
