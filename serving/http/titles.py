"""Titles of items, for people: a table of two columns that the page shows beside the ids."""

from __future__ import annotations

import csv
from pathlib import Path

from serving.errors import InputError


def read_titles(path: Path) -> dict[str, str]:
    """Raw item id, as text -> title, of a CSV file (or TSV, by its ending) with the columns `item_id` and `title`; others are ignored.

    Raises:
        InputError: the file cannot be read as UTF-8, lacks a column or a cell, or has two titles for an item.
    """
    titles: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            missing = {"item_id", "title"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path}: has the columns {', '.join(reader.fieldnames or ()) or 'none'}; name one {sorted(missing)[0]!r}"
                )
            for row in reader:
                item_id, title = row["item_id"], row["title"]
                if item_id is None or title is None:
                    raise InputError(f"{path}, line {reader.line_num}: has too few cells; give item_id and title")
                if titles.setdefault(item_id, title) != title:
                    raise InputError(
                        f"{path}, line {reader.line_num}: a second title for item {item_id!r:.60}; keep one"
                    )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no CSV file in UTF-8 ({error}); give item_id,title with a header line") from None
    return titles
