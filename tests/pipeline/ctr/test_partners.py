"""Partners that the data decide: a column of the same communities, and none that says nothing or follows from the other one."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig
from pipeline.ctr import partners
from pipeline.ctr.data import Features
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.maps import find_pairs
from pipeline.ctr.partners import EncodedColumn, modularity_gain, with_partners
from pipeline.ctr.schema import Category, CtrSchema
from tests.helpers.ctr_log import SCHEMA, columns, write_csv, write_schema

N_IDS, N_ROWS = 200, 12_000
NAMES = ("left", "right", "city", "noise")


def samples(seed: int = 0):
    """Left and right have ten communities in common; a city follows from left; noise from nothing. Half of the samples are positive."""
    rng = np.random.default_rng(seed)
    left = rng.integers(N_IDS, size=N_ROWS)
    right = np.where(
        rng.random(N_ROWS) < 0.9, rng.integers(20, size=N_ROWS) * 10 + left % 10, rng.integers(N_IDS, size=N_ROWS)
    )
    city = np.arange(N_IDS)[::-1] * 101 // N_IDS
    categorical = np.stack([left, right, city[left], rng.integers(N_IDS, size=N_ROWS)], axis=1).astype(np.int32)
    return (np.arange(N_ROWS) % 2).astype(np.uint8), categorical


def encoded(categorical):
    sizes = (N_IDS, N_IDS, 101, N_IDS)
    return [
        EncodedColumn(name, np.bincount(values, minlength=size + 1))
        for name, values, size in zip(NAMES, categorical.T, sizes, strict=True)
    ]


def schema_of(**changes):
    return CtrSchema("click", tuple(Category(name, **{"partner": "auto", **changes.get(name, {})}) for name in NAMES))


def chosen(schema, labels, categorical):
    found = with_partners(schema, encoded(categorical), labels, categorical)
    return {category.name: (category.partner, category.compress) for category in found.categories}


def test_columns_of_the_same_communities_are_partners(caplog):
    labels, categorical = samples()
    with caplog.at_level(logging.INFO, "pipeline.ctr.partners"):
        found = chosen(schema_of(), labels, categorical)
    assert found["left"] == ("right", "auto")
    assert found["right"] == ("left", "auto")
    assert found["noise"] == (None, "full")
    # Its values are of one community each, as those of left are; left does not need it.
    assert found["city"][0] == "right"
    assert "partner of left: right" in caplog.text
    assert "column noise has no partner" in caplog.text
    assert "double_frequency" in caplog.text


def test_a_partner_that_is_named_and_a_small_column_stay_as_they_are():
    labels, categorical = samples()
    found = chosen(schema_of(left={"partner": "noise"}, city={"partner": None}), labels, categorical)
    assert (found["left"], found["city"]) == (("noise", "auto"), (None, "auto"))
    columns = [EncodedColumn(name, np.ones(101, np.int64)) for name in NAMES]
    few = with_partners(schema_of(), columns, labels, categorical % 100)
    assert {(category.partner, category.compress) for category in few.categories} == {(None, "full")}


def test_a_gain_is_what_shuffled_pairs_do_not_have():
    _, categorical = samples()
    left, right, city, noise = categorical.T
    assert modularity_gain(left, right) > 0.1
    assert abs(modularity_gain(left, noise)) < partners.LEAST_GAIN
    # A function of the column: stars, which are as modular shuffled.
    assert modularity_gain(left, city) == pytest.approx(0, abs=1e-6)


def test_blocks_and_values_with_many_samples_do_not_matter(monkeypatch):
    labels, categorical = samples()
    whole = partners._samples(encoded(categorical), [0, 2], labels, categorical)
    monkeypatch.setattr(partners, "BLOCK_ROWS", 77)
    for (_, rows), (_, in_blocks) in zip(
        whole, partners._samples(encoded(categorical), [0, 2], labels, categorical), strict=True
    ):
        np.testing.assert_array_equal(rows, in_blocks)
    positive = categorical[labels > 0]
    for number, rows in whole:
        seen = np.bincount(positive[:, number], minlength=N_IDS)
        np.testing.assert_array_equal(
            np.bincount(rows[:, number], minlength=N_IDS), np.minimum(seen, partners.OF_A_VALUE)
        )
    monkeypatch.setattr(partners, "MOST_SAMPLES", 100)
    ((_, few),) = partners._samples(encoded(categorical), [0], labels, categorical)
    frequent = np.argsort(-np.bincount(categorical[:, 0]), kind="stable")[:4]
    assert set(few[:, 0].tolist()) == set(frequent.tolist())


def test_ranks_count_equal_values_before():
    assert partners._ranks(np.array([5, 3, 5, 5, 3, 0], np.int32)).tolist() == [0, 0, 1, 2, 1, 0]
    assert partners._ranks(np.empty(0, np.int32)).tolist() == []


def test_a_hash_without_rows_needs_the_partner_that_is_not_there():
    labels, categorical = samples()
    with pytest.raises(DataError, match="'noise' is hashed into no number of rows"):
        chosen(schema_of(noise={"compress": "double"}), labels, categorical)


def test_ingestion_writes_the_partners_into_the_schema(tmp_path, monkeypatch):
    # Columns of 60 and 40 values count as large here.
    monkeypatch.setattr(partners, "SMALL", 10)
    text = SCHEMA.replace('partner = "item"', 'partner = "auto"').replace('partner = "user"', 'partner = "auto"')
    data = DataConfig(str(write_csv(tmp_path / "log.csv", columns())), schema=write_schema(tmp_path, text))
    (tmp_path / "out").mkdir()
    ingest_ctr(data, tmp_path / "out")
    features = Features.open(tmp_path / "out")
    assert {c.name: c.partner for c in features.schema.categories} == {"user": "item", "item": "user", "device": None}
    assert [pair.names(features) for pair in find_pairs(features)] == [("user", "item")]
    assert "auto" not in {
        c["partner"] for c in json.loads((tmp_path / "out" / "schema.json").read_text())["log"]["categories"]
    }
