"""Options for reading csv and tsv files with pyarrow: every column as text, the delimiter, the header."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv as pa_csv

BLOCK_BYTES = 16 * 2**20
# Longest header line that is looked at.
HEADER_BYTES = 2**20


def as_text(names: Sequence[str], *, only: bool = True) -> pa_csv.ConvertOptions:
    """Columns as text, because Arrow would take a column's type from its first rows.

    Null is an unquoted empty field: "NA" is an id, and a quoted empty field is the empty string.

    Args:
        only: leave all other columns out.
    """
    return pa_csv.ConvertOptions(
        include_columns=list(names) if only else None,
        column_types={name: pa.string() for name in names},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )


def delimiter_of(file: str, format: str) -> str:
    """Tab for tsv, and for a .csv file whose first line has tabs and no comma; else the comma."""
    if format == "tsv":
        return "\t"
    with open(file, "rb") as stream:
        line = stream.readline(HEADER_BYTES)
    return "\t" if b"\t" in line and b"," not in line else ","


def header_of(file: str, format: str) -> list[str]:
    """Column names in the first line of a file, which may have no rows.

    Raises:
        pyarrow.ArrowException: the line is no csv.
    """
    with open(file, "rb") as stream:
        line = stream.readline(HEADER_BYTES).lstrip(b"\xef\xbb\xbf")
    # Read as a row of data, so that a header without rows is read too.
    names = pa_csv.read_csv(
        pa.BufferReader(line),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter_of(file, format)),
        read_options=pa_csv.ReadOptions(autogenerate_column_names=True),
        convert_options=pa_csv.ConvertOptions(null_values=[], column_types={}, strings_can_be_null=False),
    )
    return [str(names.column(i)[0].as_py()) for i in range(names.num_columns)]
