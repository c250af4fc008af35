"""A value that trained is scored the same, however it comes: as csv text, from pandas, as JSON, from parquet, as Python objects."""

from __future__ import annotations

import csv
import datetime
import io
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ctr.columns import checked_ids
from pipeline.logs.tables import LogFile, Rows
from pipeline.logs.values import hours_and_weekdays, kind_of, numbers, texts, whole_numbers
from serving.errors import InputError
from serving.raw_columns import as_ids, as_multi_valued, as_numbers, part_of_times
from serving.raw_ids import as_id_array
from serving.values import MISSING_TEXTS, TimeFormat, is_other_numeral, time_format

NONE = -(2**63)
SPELLINGS = st.sampled_from(sorted(MISSING_TEXTS))
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
COLUMNS = {
    "integers": st.integers(-(2**63) + 1, 2**63 - 1),
    "small integers": st.integers(0, 9),
    "integers beside missing ones": st.one_of(st.none(), st.integers(-(2**53), 2**53)),
    "integers as floats": st.one_of(st.none(), st.integers(-(2**53), 2**53).map(float)),
    "booleans": st.booleans(),
    "booleans beside missing ones": st.one_of(st.none(), st.booleans()),
    "words": WORDS,
    "words beside missing ones": st.one_of(st.none(), WORDS),
    "spellings": st.one_of(SPELLINGS, WORDS),
    "numerals": st.one_of(st.integers(-99, 99).map(str), st.sampled_from(["007", "+7", "7.0", " 7", "1e3", "7 "])),
    "stock codes": st.one_of(st.integers(10000, 99999).map(str), st.sampled_from(["85123A", "POST"])),
    "decimals": st.decimals(-1000, 1000, places=2),
    "whole decimals": st.integers(-(10**20), 10**20).map(Decimal),
    "unsigned": st.integers(2**63, 2**64 - 1),
    "fractions": st.floats(-1e6, 1e6, allow_nan=False),
}


def carriers(values: list) -> dict[str, object]:
    """The same values as people hand them on, once they were written as csv or parquet."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["x", "one"])
    writer.writerows([["" if v is None else v, 1] for v in values])
    text = stream.getvalue()
    array = as_arrow(values)
    found: dict[str, object] = {
        "csv text": [row["x"] for row in csv.DictReader(io.StringIO(text))],
        "pandas from csv": pd.read_csv(io.StringIO(text))["x"],
        "pandas from csv as text": pd.read_csv(io.StringIO(text), dtype=str)["x"],
        "pandas from parquet": pa.table({"x": array}).to_pandas()["x"],
        "pandas categorical": pa.table({"x": array}).to_pandas()["x"].astype("category"),
        "nullable pandas": pd.array(values, dtype=pd.ArrowDtype(array.type)) if array.type != pa.null() else values,
        "Python": values,
    }
    if not any(isinstance(v, Decimal) for v in values):
        found["JSON"] = json.loads(json.dumps(values))
    return found


def as_arrow(values: list) -> pa.Array:
    """The values as parquet would hold them."""
    is_large = any(isinstance(v, int) and v >= 2**63 for v in values)
    return pa.array(values, pa.uint64() if is_large else None)


@pytest.mark.parametrize("column", COLUMNS)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_categorical_value_that_trained_is_the_same_however_it_comes(column, data):
    values = data.draw(st.lists(COLUMNS[column], min_size=1, max_size=12))
    as_csv = pa.array(["" if v is None else str(v) for v in values])
    for source in (as_arrow(values), as_csv):
        kind = kind_of(source, booleans=True)
        rows = Rows({"x": source}, 1, LogFile("log", "csv"))
        try:
            expected = checked_ids(rows, "x", source, kind).to_pylist()
        except ValueError:
            continue  # It does not train.
        known = {v for v in expected if v is not None}
        text_only = kind == "string" and any(map(is_other_numeral, known))
        missing = NONE if kind == "int64" else ""
        for name, given_values in carriers(values).items():
            try:
                found = as_ids(given_values, kind, missing, "x", text_only=text_only).tolist()
            except InputError:
                # What a program has rounded, or whose form it has lost, is refused and never taken for another value.
                assert name.startswith("pandas from csv") or text_only or column == "fractions", (name, values)
                continue
            assert found == [missing if e is None else e for e in expected], (name, kind, values)


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e300, 1e300), st.integers(-(2**60), 2**60)), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_a_number_that_trained_is_the_same_however_it_comes(values):
    floats = [None if v is None else float(v) for v in values]
    expected, wrong = numbers(pa.array(floats, pa.float64()))
    assert not wrong.any()
    as_csv, wrong = numbers(pa.array(["" if v is None else repr(v) for v in floats]))
    assert not wrong.any()
    assert np.array_equal(as_csv, expected, equal_nan=True)
    for name, given_values in carriers(floats).items():
        if name == "pandas from csv":
            continue  # Its parser is off in the last digit, unless float_precision="round_trip" is asked for.
        if all(v is None for v in floats) and name in ("nullable pandas",):
            continue
        found = as_numbers(given_values, 0.0, 1e300, "x")
        assert np.array_equal(found, expected, equal_nan=True), name


@pytest.mark.parametrize("text", ["+5", "1e3", " 7 ", "NA", "True", "null", "-0.5", ".5", "5.", "1E-7"])
def test_odd_texts_of_numbers_are_the_same_in_training_and_serving(text):
    found, wrong = numbers(pa.array([text]))
    assert not wrong.any()
    assert np.array_equal(found, as_numbers([text], 0.0, 1.0, "x"), equal_nan=True)


@pytest.mark.parametrize("text", ["1e400", "inf", "-Infinity"])
def test_infinite_numbers_are_refused_by_both(text):
    assert np.isinf(numbers(pa.array([text]))[0]).all()
    with pytest.raises(InputError, match="infinite"):
        as_numbers([text], 0.0, 1.0, "x")


FORMATS = [
    "%y%m%d%H",
    "%Y%m%d",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S%z",
    "%d/%b/%Y:%H:%M:%S",
    "%Y-%m-%d %I:%M %p",
    "%Y-%m-%d %H:%M:%S.%f",
    "%Y %j %H",
]


@pytest.mark.parametrize("form", FORMATS)
@given(
    st.lists(
        st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2060, 1, 1)).map(lambda t: t.replace(second=0)),
        min_size=1,
        max_size=8,
    ),
    st.integers(-14, 14),
)
@settings(max_examples=30, deadline=None)
def test_a_time_that_trained_is_the_same_however_it_comes(form, times, offset):
    if "%z" in form:
        times = [time.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=offset))) for time in times]
    written = [time.strftime(form) for time in times]
    hours, weekdays, wrong = hours_and_weekdays(pa.array(written), time_format(form))
    assert not wrong.any()
    carried: dict[str, object] = {"csv text": written, "pandas": pd.Series(written)}
    read = [TimeFormat(form).parse(text) for text in written]
    carried |= {"datetimes": read, "numpy": np.array(read, "datetime64[us]"), "pandas times": pd.Series(read)}
    if all(text.isdigit() for text in written):
        carried |= {"integers": [int(text) for text in written], "pandas from csv": pd.Series(map(int, written))}
        carried["floats"] = np.array([float(text) for text in written])
    if "%z" in form:
        carried["zoned"] = times
        carried["zoned pandas"] = pd.Series(pd.to_datetime(times, utc=True)).dt.tz_convert("Asia/Tokyo")
    for name, values in carried.items():
        assert part_of_times(values, form, "hour", -1, "x").tolist() == hours.to_pylist(), name
        assert part_of_times(values, form, "weekday", -1, "x").tolist() == weekdays.to_pylist(), name
    for unit in ("s", "us"):
        array = pa.array(read, pa.timestamp(unit))
        assert hours_and_weekdays(array, time_format(form))[0].to_pylist() == hours.to_pylist()
    zoned = pa.array(read, pa.timestamp("s", "UTC")).cast(pa.timestamp("s", "Europe/Berlin"))
    assert hours_and_weekdays(zoned, time_format(form))[0].to_pylist() == hours.to_pylist()


@pytest.mark.parametrize("form", ["%c", "%s", "%Z", "%U", "plain", "%", ""])
def test_formats_that_depend_on_the_machine_are_refused(form):
    with pytest.raises(ValueError, match=r"not a part of times|no part of a time"):
        TimeFormat(form)


@given(
    st.lists(st.one_of(st.none(), st.lists(WORDS.filter(lambda w: "|" not in w), max_size=4)), min_size=1, max_size=6)
)
@settings(max_examples=60, deadline=None)
def test_lists_and_texts_between_separators_are_the_same(values):
    lists = as_multi_valued(values, "string", "", 8, "|", "x")
    joined = [None if v is None else "|".join(v) for v in values]
    # Text that is missing altogether is no list of one missing value.
    assert np.array_equal(as_multi_valued(joined, "string", "", 8, "|", "x"), lists)
    assert np.array_equal(as_multi_valued(pd.Series(joined, dtype=object), "string", "", 8, "|", "x"), lists)


def test_numbers_of_one_value_are_multi_valued_text():
    assert as_multi_valued(np.array([7.0, np.nan]), "int64", NONE, 2, "|", "x").tolist() == [[7], [NONE]]
    assert as_multi_valued([7, "7|8"], "string", "", 2, "|", "x").tolist() == [["7", ""], ["7", "8"]]


def test_a_number_is_refused_where_training_has_seen_another_form_of_it():
    ids = as_ids(["007", "85A"], "string", "", "zip", text_only=True)
    assert ids.tolist() == ["007", "85A"]
    with pytest.raises(InputError, match=r"zip\[1\] is 7; .* pass str values"):
        as_ids(["85A", 7], "string", "", "zip", text_only=True)


@given(st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_retrieval_ids_are_the_same_however_they_come(values):
    for source in (
        pa.array(values),
        pa.array(map(str, values)),
        pa.array(map(float, values)),
        pa.array(map(Decimal, values)),
    ):
        found, wrong = whole_numbers(source)
        assert not wrong.any()
        assert found.to_pylist() == values
        assert texts(source)[0].to_pylist() == list(map(str, values))
    carried = (
        values,
        list(map(str, values)),
        np.array(values),
        np.array(values, float),
        list(map(Decimal, values)),
        pd.Series(values),
    )
    for ids in carried:
        assert as_id_array(ids, "int64", "user_ids").tolist() == values
        assert as_id_array(ids, "string", "user_ids").tolist() == list(map(str, values))


@pytest.mark.parametrize("text", ["1_000", "٣", "0x10", "007", "+7", "7.5", "", "NA", "1e3"])
def test_what_only_python_takes_for_a_whole_number_is_no_id(text):
    assert whole_numbers(pa.array([text]))[1].all()
    with pytest.raises(InputError):
        as_id_array([text], "int64", "user_ids")
