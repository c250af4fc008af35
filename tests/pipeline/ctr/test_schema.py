"""The schema of a CTR data set: what a file may say, and what is refused with a reason."""

from __future__ import annotations

import pytest

from graphhash.errors import DataError
from pipeline.ctr.schema import Category, CtrSchema, MultiValued, read_schema
from tests.helpers.ctr_log import SCHEMA


def read(tmp_path, text):
    (tmp_path / "schema.toml").write_text(text)
    return read_schema(tmp_path / "schema.toml")


def test_a_file_says_what_every_column_is(tmp_path):
    text = SCHEMA + 'kind = "string"\nmin_count = 3\n[times]\nhour = "%y%m%d%H"\n'
    schema = read(tmp_path, text.replace('label = "click"', 'label = "stars"\nlabel_from = 4'))
    assert (schema.label, schema.label_from, schema.group, schema.dense) == ("stars", 4, "user", ("price",))
    assert schema.categories[0] == Category("user", "method", "item")
    assert [c.name for c in schema.categories] == ["user", "item", "device", "hour_hour", "hour_weekday"]
    assert schema.multi_valued == (MultiValued("genres", "|", 3, "string"),)
    # What is read from the file, once, and the two parts of the time are not.
    assert schema.names == ["stars", "user", "item", "device", "price", "genres", "hour"]
    assert CtrSchema.from_dict(schema.as_dict()) == schema


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('label = "click"', ""), "names no label"),
        (('dense = ["price"]', 'dense = ["price", "user"]'), "'user' is named 2 times"),
        (('partner = "item"', 'partner = "iten"'), "partner of 'user' is 'iten'"),
        (('partner = "item"', 'partner = "user"'), "no other categorical"),
        (('compress = "method"', 'compress = "metod"'), "did you mean 'method'"),
        (('partner = "item"', ""), "has no partner; name one"),
        (('[columns.user]\npartner = "item"\ncompress = "method"', '[columns.user]\ncompress = "double"'), "give rows, or a partner"),
        (('[columns.user]', '[columns.usr]'), "add it there"),
        (('group = "user"', 'groop = "user"'), "unknown key 'groop'; did you mean 'group'"),
        (('dense = ["price"]', 'dense = "price"'), "which it does not take"),
        (('dense = ["price"]', "dense = [1]"), "no list of names"),
        (('separator = "|"', 'separator = ""'), "empty separator"),
        (('categorical = ["user", "item", "device"]', "categorical = ["), "not valid TOML"),
        (('[multi_valued.genres]', '[multi_valued.genres]\nmin_count = 0'), "min_count=0"),
    ],
)  # fmt: skip
def test_a_wrong_schema_is_one_line_with_file_and_reason(tmp_path, change, words):
    assert change[0] in SCHEMA
    with pytest.raises(DataError) as error:
        read(tmp_path, SCHEMA.replace(*change, 1))
    assert words in str(error.value)
    assert "schema.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.toml: cannot read"):
        read_schema(tmp_path / "none.toml")
