"""The options of the log: which columns it has, which rows count, and how it is split."""

from __future__ import annotations

import click

from pipeline.cli.command import group
from pipeline.config.choices import FORMATS, ID_KINDS, SPLITS, TASKS

task_option = click.option(
    "--task",
    type=click.Choice(TASKS),
    help="retrieval: rank items for users; ctr: predict click probabilities from samples with labels.  [retrieval]",
)
ctr_data_options = group(
    click.option("--label-column", metavar="NAME", help="ctr: the label column, 0 or 1.  [label, click or clicked]"),
    click.option(
        "--schema",
        metavar="FILE",
        help="ctr: TOML file with the role of each column.  [known for named data sets, else inferred]",
    ),
    click.option("--min-count", type=int, help="ctr: ids in fewer training samples are out of vocabulary.  [1]"),
)
kind_options = group(
    click.option(
        "--user-kind", type=click.Choice(ID_KINDS), help="Type of the user ids; string: as they stand.  [auto]"
    ),
    click.option("--item-kind", type=click.Choice(ID_KINDS), help="Type of the item ids, likewise.  [auto]"),
)
bad_rows_option = click.option(
    "--bad-rows",
    type=click.Choice(("error", "skip")),
    help="error: stop at the first bad row; skip: keep bad rows in ingest/rejected.parquet.  [error]",
)
csv_options = group(
    click.option(
        "--separator", metavar="CHAR", help="csv: the character between fields, or tab.  [recognised: , tab ; |]"
    ),
    click.option("--encoding", metavar="NAME", help="csv: the encoding of the text, such as latin-1.  [utf-8]"),
    click.option(
        "--header", type=click.Choice(("yes", "no")), help="csv: no: the files have no header; give --columns.  [yes]"
    ),
    click.option(
        "--columns", metavar="NAME[,NAME]...", help="csv without a header: the names of its columns, in order."
    ),
)
filter_options = group(
    click.option(
        "--positive-from", type=float, metavar="RATING", help="Leave rows with a lower rating out.  [every row counts]"
    ),
    click.option(
        "--rating-column", metavar="NAME", help="The column of --positive-from.  [the weight column, or else rating]"
    ),
    click.option(
        "--min-user-interactions",
        type=int,
        metavar="N",
        help="Remove users with fewer items, and items with fewer users (below), until none is left to remove.  [1]",
    ),
    click.option(
        "--min-item-interactions", type=int, metavar="N", help="Remove items with fewer users, likewise.  [1]"
    ),
    click.option(
        "--half-life", type=float, metavar="DAYS", help="An interaction weighs half after so many days.  [no ageing]"
    ),
)
time_options = group(
    click.option(
        "--time-column",
        metavar="NAME",
        help="The column of times, of the splits by time and of --half-life.  [recognised, such as timestamp]",
    ),
    click.option("--test-from", metavar="TIME", help="temporal: the test begins here, as 2024-05-01.  [by --test]"),
    click.option(
        "--validation-from", metavar="TIME", help="temporal: validation begins here, likewise.  [by --validation]"
    ),
    click.option("--last-n", type=int, metavar="N", help="leave-last-out: items of every user in the test.  [1]"),
)
data_options = group(
    task_option,
    click.option(
        "--data", metavar="PATH", help="The interaction log, or CTR data set: a file, a folder or a quoted glob."
    ),
    click.option("--format", type=click.Choice(FORMATS), help="Format of the log.  [auto: detected]"),
    click.option("--user-column", metavar="NAME", help="csv, tsv, parquet: the column of user ids.  [user_id]"),
    click.option("--item-column", metavar="NAME", help="csv, tsv, parquet: the column of item ids.  [item_id]"),
    kind_options,
    csv_options,
    click.option("--weight-column", metavar="NAME", help="The column of interaction weights.  [every row weighs 1]"),
    filter_options,
    click.option(
        "--user-features",
        metavar="FILE",
        help="Method lsh: user features, a csv, tsv or parquet file of the id column and numbers.",
    ),
    click.option("--item-features", metavar="FILE", help="Method lsh: item features, likewise."),
    bad_rows_option,
    click.option(
        "--split",
        type=click.Choice(SPLITS),
        help="random: draw validation and test; given: the data set's own test file; temporal: the latest interactions; "
        "leave-last-out: the latest of every user.  [random]",
    ),
    time_options,
    click.option("--validation", type=float, help="Share of interactions held out for validation.  [0.1]"),
    click.option("--test", type=float, help="Share of interactions held out for the test.  [0.1]"),
    ctr_data_options,
)
