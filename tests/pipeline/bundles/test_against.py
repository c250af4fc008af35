"""`graphhash check --against`: a click bundle beside labelled samples."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from graphhash.metrics.ctr import auc, log_loss
from pipeline.bundles.against import bins_of, check_against
from pipeline.cli.main import app
from pipeline.logs.csv import CsvFormat
from serving import BundleError, Scorer
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import small_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    provenance = {"data": {"label": "rating", "label_from": 4}}
    export_small(small_ctr(), folder, provenance=provenance, metrics={"log_loss": 0.25, "auc": 0.75})
    return folder


def labelled(tmp_path, n=2000):
    """Raw samples whose labels are drawn from the bundle's own probabilities, and how they are stored."""
    log = raw_log(n)
    types = {"device": pa.int64(), "item": pa.int64()}
    columns = {name: pa.array(values, types.get(name)) for name, values in log.items()}
    return log, columns, tmp_path / "labelled.parquet"


def test_figures_are_those_of_the_scorers_predictions(bundle, tmp_path):
    log, columns, file = labelled(tmp_path)
    answer = Scorer(bundle, provider="cpu").details(log)
    labels = (np.random.default_rng(0).random(2000) < answer.probabilities).astype(int)
    pq.write_table(pa.table(columns | {"rating": 3 + labels}), file)
    found = check_against(bundle, str(file), provider="cpu")
    figures = found.figures
    assert figures["log_loss"] == pytest.approx(log_loss(labels, answer.logits), abs=1e-6)
    assert figures["auc"] == pytest.approx(auc(labels, answer.logits), abs=1e-6)
    assert figures["mean_prediction"] == pytest.approx(answer.probabilities.mean(), abs=1e-6)
    # Labels that are drawn from the predictions are calibrated.
    assert figures["calibration"] == pytest.approx(1, abs=0.06)
    assert figures["oov_rate"]["user"] == pytest.approx(1 - answer.known["user"].mean())
    assert found.tested == {"log_loss": 0.25, "auc": 0.75, "calibration": None}
    assert [part["n_rows"] for part in found.bins] == [200] * 10
    assert "log loss" in found.text()
    assert "(test 0.2500)" in found.text()
    json.dumps(found.as_dict())


def test_predictions_that_are_too_high_show_in_every_bin(bundle, tmp_path):
    log, columns, file = labelled(tmp_path)
    probabilities = Scorer(bundle, provider="cpu").predict(log)
    labels = (np.random.default_rng(0).random(2000) < probabilities / 2).astype(int)
    pq.write_table(pa.table(columns | {"clicked": labels}), file)
    found = check_against(bundle, str(file), provider="cpu")
    assert found.figures["calibration"] == pytest.approx(2, rel=0.1)
    assert all(part["predicted"] > part["positive"] for part in found.bins[3:])
    same = check_against(bundle, str(file), label="clicked", provider="cpu")
    assert same.as_dict() == found.as_dict()


def test_csv_may_be_written_in_any_way(bundle, tmp_path):
    _log, columns, file = labelled(tmp_path, 50)
    table = pa.table({name: values for name, values in columns.items() if name not in ("genres", "tags")})
    lists = {name: pa.array(["war" if name == "genres" else "5"] * 50) for name in ("genres", "tags")}
    table = pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **lists, "rating": [3, 4] * 25})
    pq.write_table(table, file)
    expected = check_against(bundle, str(file), provider="cpu").as_dict()
    pa_csv.write_csv(table, tmp_path / "plain.csv", pa_csv.WriteOptions(include_header=False, delimiter=";"))
    (tmp_path / "labelled.csv").write_text((tmp_path / "plain.csv").read_text("utf-8"), encoding="utf-16")
    layout = CsvFormat(";", "utf-16", tuple(table.column_names))
    found = check_against(bundle, str(tmp_path / "labelled.csv"), layout=layout, provider="cpu").as_dict()
    assert found["n_rows"] == 50
    assert found["auc"] == pytest.approx(expected["auc"], abs=1e-3)
    names = ",".join(table.column_names)
    app.main(["check", str(bundle), "--against", str(tmp_path / "labelled.csv"), "--separator", ";", "--encoding", "utf-16",
              "--header", "no", "--columns", names, "--provider", "cpu"], standalone_mode=False)  # fmt: skip


def test_bins_have_equal_numbers_of_rising_predictions():
    predictions = np.random.default_rng(0).random(1003)
    bins = bins_of((predictions > 0.5).astype(np.uint8), predictions)
    assert sum(part["n_rows"] for part in bins) == 1003
    assert max(part["n_rows"] for part in bins) - min(part["n_rows"] for part in bins) <= 1
    assert all(one["highest"] <= other["lowest"] for one, other in itertools.pairwise(bins))
    assert [part["positive"] for part in bins[:4]] == [0.0] * 4


def test_what_is_not_there_is_said(bundle, tmp_path):
    _log, columns, file = labelled(tmp_path, 20)
    pq.write_table(pa.table(columns), file)
    with pytest.raises(DataError, match=r"no column 'rating'; .*name the labels with --label-column"):
        check_against(bundle, str(file), provider="cpu")
    del columns["item"]
    pq.write_table(pa.table(columns | {"click": [0, 1] * 10}), file)
    with pytest.raises(DataError, match="from row 1 on: no column 'item'"):
        check_against(bundle, str(file), provider="cpu")
    small_model().export(tmp_path / "retrieval")
    with pytest.raises(BundleError, match="task 'retrieval', not 'ctr'"):
        check_against(tmp_path / "retrieval", str(file), provider="cpu")
