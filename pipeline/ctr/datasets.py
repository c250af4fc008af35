"""Named CTR data sets: their schemas, and what is special about reading each.

frappe          a folder with frappe.csv, or that file: app use in context. For every row two apps that the user has not used are
                drawn, with the same context and label 0; shares 70/20/10.
movielens-1m    a folder with ratings.dat, users.dat and movies.dat: the label is 1 from four stars on.
                A timestamp is for splits by time alone.
avazu           a folder with `train`, csv with the published header, and perhaps `test`, which may lack it.

and those of `pipeline.ctr.published`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from graphhash.errors import DataError, first_line
from pipeline.ctr.published import (
    AVAZU_PLAIN,
    CRITEO_IDS,
    FILES,
    FRAPPE_CONTEXT,
    NUMBERS,
    PUBLISHED,
    SEVEN_TWO_ONE,
    has_published_files,
    pair,
    published_files,
)
from pipeline.ctr.schema import Category, CtrSchema, MultiValued
from pipeline.logs.columns import Columns
from pipeline.logs.csv import CsvFormat, header_of
from pipeline.logs.readers import READERS, movielens_fields
from pipeline.logs.sources import Source, cut_chunks
from pipeline.logs.tables import LogFile, Rows, read_rows

FRAPPE_NEGATIVES = 2
ZIP_PREFIX = 3


@dataclass(frozen=True)
class Named:
    """A data set that is known by name.

    Args:
        schema: of its columns.
        landmark: the file that gives a folder away.
        shares: of validation and test in its protocol; None: those of any log.
    """

    schema: CtrSchema
    landmark: str
    shares: tuple[float, float] | None = None


NAMED = {
    "frappe": Named(
        CtrSchema("label", (*pair("user", "item"), *map(Category, FRAPPE_CONTEXT)), group="user"),
        "frappe.csv",
        SEVEN_TWO_ONE,
    ),
    "movielens-1m": Named(
        CtrSchema(
            "rating",
            (
                *pair("user_id", "item_id"),
                *map(Category, ("gender", "age", "occupation", "year")),
                Category("zip_prefix", kind="string"),
            ),
            multi_valued=(MultiValued("genres"),),
            group="user_id",
            label_from=4,
        ),
        "ratings.dat",
    ),
    "avazu": Named(
        CtrSchema(
            "click",
            (*pair("device_ip", "site_id"), *pair("device_id", "app_id"), *map(Category, AVAZU_PLAIN)),
            times=(("hour", "%y%m%d%H"),),
            group="device_ip",
        ),
        "train",
    ),
    **{name: Named(known.schema, FILES[0], known.shares) for name, known in PUBLISHED.items()},
}


def find_name(path: str, format: str) -> str | None:
    """Name of the data set that lies at a path, if it is one of NAMED."""
    if format in NAMED:
        return format
    if format != "auto":
        return None
    root = Path(path)
    if root.is_dir() and has_published_files(root):
        header = tuple(header_of(str(root / FILES[0]), "csv"))
        return next((name for name, known in PUBLISHED.items() if known.header == header), None)
    for name, known in NAMED.items():
        if name in PUBLISHED:
            continue
        file = root / known.landmark if root.is_dir() else root
        if file.name == known.landmark and file.is_file() and (name != "avazu" or _is_avazu(file)):
            return name
    return None


def named_files(name: str, path: str, split: str) -> list[LogFile]:
    """The files of a named data set.

    Raises:
        DataError: a file that it needs is missing.
    """
    root = Path(path)
    folder = root if root.is_dir() else root.parent
    if name in PUBLISHED:
        return _published(name, folder, split)
    main = folder / NAMED[name].landmark
    joined = [folder / file for file in ("users.dat", "movies.dat")] if name == "movielens-1m" else []
    for file in (main, *joined):
        if not file.is_file():
            raise DataError(f"{folder}: no {file.name}, which {name} needs; check the path")
    if name == "avazu":
        train, test = main, folder / "test"
        header = tuple(header_of(str(train), "csv"))
        files = [LogFile(str(train), "csv")]
        if test.is_file() and (root.is_dir() or split == "given"):
            layout = CsvFormat(columns=() if _is_avazu(test) else header)
            files.append(LogFile(str(test), "csv", split == "given", layout))
        if split == "given" and len(files) == 1:
            raise DataError(f"{folder}: split='given' needs a file 'test'; use split='random'")
        return files
    if split == "given":
        raise DataError(f"{path}: {name} has no test file of its own; use split='random'")
    return [LogFile(str(main), name, joined=tuple(map(str, joined)))]


def _published(name: str, folder: Path, split: str) -> list[LogFile]:
    """The published files of a data set, or those that its recipe is followed on.

    Raises:
        DataError: neither is there.
    """
    original = PUBLISHED[name].original
    if has_published_files(folder):
        return published_files(folder, split)
    if original is None or not (folder / original).is_file():
        other = f", nor {original}" if original else ""
        raise DataError(
            f"{folder}: {name} has the files {', '.join(FILES)}, which are not there{other}; check the path"
        )
    if split == "given":
        raise DataError(f"{folder}: {original} has no test file of its own; use split='random'")
    layout = CsvFormat(separator="\t", columns=("Label", *NUMBERS, *CRITEO_IDS)) if name == "criteo_x4" else CsvFormat()
    format = {"frappe_x1": "frappe", "movielenslatest_x1": name}.get(name, "csv")
    return [LogFile(str(folder / original), format, csv=layout)]


def read_named(file: LogFile, seed: int) -> Iterator[Rows]:
    """The rows of a file that is not read as it stands; `seed` draws negatives."""
    if file.format == "movielens-1m":
        yield from _read_movielens(file)
    else:
        yield from _read_frappe(file, seed) if file.format == "frappe" else _read_tags(file, seed)


def _is_avazu(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.readline(2**16).startswith(b"id,click,hour,")


def _read_frappe(file: LogFile, seed: int) -> Iterator[Rows]:
    names = ["user", "item", *FRAPPE_CONTEXT]
    parts = [rows.columns for rows in read_rows(LogFile(file.path, "csv"), names)]
    table = pa.table({name: pa.chunked_array([part[name] for part in parts]) for name in names})
    users, items = (table[name].combine_chunks().dictionary_encode() for name in ("user", "item"))
    if users.null_count or items.null_count:
        raise DataError(f"{file.path}: a user or an item is null; this is not the published frappe.csv")
    user_rows, item_rows = (ids.indices.to_numpy().astype(np.int64) for ids in (users, items))
    drawn = unobserved(user_rows, item_rows, len(items.dictionary), FRAPPE_NEGATIVES, seed)
    each = 1 + FRAPPE_NEGATIVES
    shown = np.column_stack([item_rows, drawn]).ravel()
    repeated = table.take(pa.array(np.repeat(np.arange(len(table)), each)))
    columns = {name: repeated[name].combine_chunks() for name in names}
    columns = {name: c.chunk(0) if isinstance(c, pa.ChunkedArray) else c for name, c in columns.items()}
    columns["item"] = items.dictionary.take(pa.array(shown))
    columns["label"] = pa.array((np.arange(len(shown)) % each == 0).astype(np.int64))
    yield Rows(columns, 1, file)


def _read_tags(file: LogFile, seed: int) -> Iterator[Rows]:
    """The tags of MovieLens Latest, and behind each the same user and movie with tags that the user has not given it."""
    names = {"user_id": "userId", "item_id": "movieId", "tag_id": "tag"}
    parts = [rows.columns for rows in read_rows(LogFile(file.path, "csv"), list(names.values()))]
    table = pa.table({name: pa.chunked_array([part[raw] for part in parts]) for name, raw in names.items()})
    tags = table["tag_id"].combine_chunks().dictionary_encode()
    users, items = (table[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id"))
    user_rows, item_rows, tag_rows = (ids.indices.to_numpy(zero_copy_only=False) for ids in (users, items, tags))
    pairs = user_rows.astype(np.int64) * len(items.dictionary) + item_rows
    _, groups = np.unique(pairs, return_inverse=True)
    drawn = unobserved(groups.astype(np.int64), tag_rows.astype(np.int64), len(tags.dictionary), FRAPPE_NEGATIVES, seed)
    each = 1 + FRAPPE_NEGATIVES
    repeated = pa.array(np.repeat(np.arange(len(table)), each))
    shown = np.column_stack([tag_rows, drawn]).ravel()
    columns = {
        "label": pa.array((np.arange(len(shown)) % each == 0).astype(np.int64)),
        "user_id": users.dictionary.take(users.indices.take(repeated)),
        "item_id": items.dictionary.take(items.indices.take(repeated)),
        "tag_id": tags.dictionary.take(pa.array(shown)),
    }
    yield Rows(columns, 1, file)


def unobserved(
    users: NDArray[np.int64], items: NDArray[np.int64], n_items: int, n: int, seed: int
) -> NDArray[np.int64]:
    """``n`` different items for every row that its user has in no row, uniform, shape (n_rows, n).

    Args:
        users, items: rows of a log, shape (n_rows,); items in 0..n_items-1.

    Raises:
        DataError: a user has fewer than ``n`` such items.
    """
    seen = np.unique(users * n_items + items)
    busiest = int(np.bincount(seen // n_items).max())
    if n_items - busiest < n:
        raise DataError(f"a user has used {busiest} of {n_items} items: there are no {n} others to draw")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(n_items, size=(len(users), n))
    while True:
        taken = np.isin(users[:, None] * n_items + drawn, seen)
        for column in range(1, n):
            taken[:, column] |= (drawn[:, :column] == drawn[:, column : column + 1]).any(1)
        if not taken.any():
            return drawn
        drawn[taken] = rng.integers(n_items, size=int(taken.sum()))


def _read_movielens(file: LogFile) -> Iterator[Rows]:
    users_file, movies_file = file.joined
    users = _read_dat(users_file, ["user_id", "gender", "age", "occupation", "zip"])
    movies = _read_dat(movies_file, ["item_id", "title", "genres"])
    titles = pc.extract_regex(movies["title"].combine_chunks(), r"\((?P<year>[0-9]{4})\)\s*$")
    of_user = {name: users[name].combine_chunks() for name in ("gender", "age", "occupation")}
    of_user["zip_prefix"] = pc.utf8_slice_codeunits(users["zip"].combine_chunks(), 0, ZIP_PREFIX)
    of_item = {"year": pc.struct_field(titles, "year"), "genres": movies["genres"].combine_chunks()}
    first = 1
    source = Source(file.path, "movielens-1m")
    times = "timestamp" if movielens_fields(source) == 4 else None
    for chunk in cut_chunks([source]):
        for raw in READERS["movielens-1m"](chunk, Columns("user_id", "item_id", "rating", time=times)):
            if raw.malformed:
                row, reason, _text = raw.malformed[0]
                raise DataError(f"{file.path}: near row {first + row - 1}: {reason}; copy the file again")
            columns = {"rating": raw.weights, "user_id": raw.users, "item_id": raw.items}
            for key, table, values in (("user_id", users, of_user), ("item_id", movies, of_item)):
                places = pc.index_in(columns[key], value_set=table[key].combine_chunks())
                columns |= {name: column.take(places) for name, column in values.items()}
            if times:
                columns[times] = raw.times
            yield Rows(columns, first, file)
            first += len(raw.rows)


def _read_dat(path: str, names: list[str]) -> pa.Table:
    """A file of fields between `::`, in Latin-1, as texts."""
    data = Path(path).read_bytes().decode("latin-1").replace("::", "\t").encode()
    try:
        return pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(column_names=names, block_size=len(data) + 1),
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, strings_can_be_null=True
            ),
        )
    except pa.ArrowException as error:
        raise DataError(f"{path}: {first_line(error)}; {len(names)} fields between '::' are expected") from None
