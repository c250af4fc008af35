"""`graphhash update`: fold the new ids of a later log into a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from pipeline.cli.command import Epilog
from pipeline.cli.output import json_option, write_json
from pipeline.cli.settings import csv_settings
from pipeline.config.choices import FORMATS, ID_KINDS

if TYPE_CHECKING:
    from pipeline.updates.update import UpdateResult
    from pipeline.updates.update_ctr import CtrUpdateResult


@click.command(
    cls=Epilog,
    epilog="""
graphhash update out today.parquet
graphhash update out 'logs/2024-06-*.csv' --user-column uid --item-column sku
graphhash update out today.csv --separator ';' --header no --columns user_id,item_id
graphhash update out today.parquet --refit --json figures.json
""",
)
@click.argument("run", metavar="RUN")
@click.argument("log", metavar="NEW_LOG")
@click.option("--method", metavar="NAME", help="The method whose bundle is written.  [the run's first]")
@click.option("--format", type=click.Choice(FORMATS), help="Format of the new log.  [the run's]")
@click.option("--user-column", metavar="NAME", help="Column of user ids.  [the run's]")
@click.option("--item-column", metavar="NAME", help="Column of item ids.  [the run's]")
@click.option("--user-kind", type=click.Choice(ID_KINDS), help="Type of the user ids, which is the run's.  [the run's]")
@click.option("--item-kind", type=click.Choice(ID_KINDS), help="Type of the item ids, which is the run's.  [the run's]")
@click.option("--separator", metavar="CHAR", help="csv: the character between fields, or tab.  [the run's]")
@click.option("--encoding", metavar="NAME", help="csv: the encoding of the text.  [the run's]")
@click.option(
    "--header", type=click.Choice(("yes", "no")), help="csv: no: no header; give --columns.  [as the run's log]"
)
@click.option("--columns", metavar="NAME[,NAME]...", help="csv without a header: the names of its columns, in order.")
@click.option("--weight-column", metavar="NAME", help="Column of weights.  [the run's]")
@click.option(
    "--bad-rows", type=click.Choice(("error", "skip")), help="skip: leave bad rows out, counted.  [the run's]"
)
@click.option("--refit", is_flag=True, help="Train a full refit as well, and compare the new users under both.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help="With --refit: share of a new user's interactions to test on, at least one.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="With --refit: draws them.")
@json_option("the figures")
def update(
    run: str,
    log: str,
    method: str | None,
    refit: bool,
    held_out: float,
    seed: int,
    json_file: str | None,
    **data: str | None,
) -> None:
    """Fold the new users and items of NEW_LOG into RUN, and write its bundle anew, without training.

    A new id gets the rows that a trained one with its interactions would have, and a new item the bias of items of its degree. Where
    nearly every trained user has a row of its own (soft maps of dense logs), a new user gets one, solved from what it used. Trained ids
    answer as before. A new id whose neighbours are all unassigned stays unassigned: the fallback answers, and the next update looks again.
    Interactions between known ids change no answer; `graphhash recommend --exclude-seen` leaves them out. A further update goes on from
    this one, and later exports of the same training keep the folded-in ids; a new training starts without them.

    A CTR run gets the new values of all compressed columns of NEW_LOG, which has the columns of the run's log, labels among them: by the
    positive samples that they are in, or by their hash. Rows without a new value are answered as before.

    Models: mf, with any loss, and those of CTR. --refit trains once more on the old interactions and the new users' remaining ones, and
    prints recall@20, capped recall@20 and NDCG@20 of the new users: folded in, under the refit, and with the fallback.
    """
    from pipeline.runs.remote import held_folder
    from pipeline.storage.uris import fetch, is_uri
    from pipeline.updates.update import update as fold_in

    given: dict[str, Any] = {key: value for key, value in data.items() if value is not None and key != "header"}
    given |= csv_settings(data)
    with held_folder(run) as folder:
        log = str(fetch(log, folder / ".source")) if is_uri(log) else log
        result = fold_in(folder, log, method=method, data=given, refit=(held_out, seed) if refit else None)
    of_columns = "columns" in result
    for line in ctr_lines(cast("CtrUpdateResult", result)) if of_columns else lines(cast("UpdateResult", result)):
        print(line)
    write_json(json_file, result)


def ctr_lines(result: CtrUpdateResult) -> list[str]:
    """What the command prints of a CTR run."""
    text = [f"method {result['method']}: new values are assigned {result['rule']}", f"samples: {result['n_rows']:,}"]
    for name, counts in result["columns"].items():
        text.append(
            f"{name}: {counts['new']:,} new, {counts['folded_in']:,} folded in, {counts['unassigned']:,} unassigned (out of vocabulary)"
        )
    return [*text, f"bundle: {result['bundle']}"]


def lines(result: UpdateResult) -> list[str]:
    """What the command prints."""
    text = [f"method {result['method']}: new ids are assigned {result['rule']}"]
    for side in ("users", "items"):
        counts = result[side]
        text.append(
            f"{side}: {counts['new']:,} new, {counts['folded_in']:,} folded in, {counts['unassigned']:,} unassigned (the fallback answers)"
        )
    text.append(
        f"interactions: {result['n_interactions']:,}, {result['n_used']:,} of new ids used, {result['n_unused']:,} of new ids without use, "
        f"{result['n_known']:,} of known ids (they change no answer)"
    )
    if result["n_rejected"]:
        text.append(f"rejected rows: {result['n_rejected']:,}")
    if not result["users"]["new"] and not result["items"]["new"]:
        text.append("the log holds no new user and no new item")
    text.append(f"bundle: {result['bundle']}")
    if "refit" in result and result["refit"] is None:
        text.append("no new user has two interactions: there is nothing to compare with a refit")
    if (refit := result.get("refit")) is not None:
        text.append(f"\n{refit['n_users']:,} new users, {refit['n_held_out']:,} interactions held out")
        for name, figures in (
            ("folded in", refit["folded_in"]),
            ("refit", refit["refit"]),
            ("fallback", refit["fallback"]),
        ):
            text.append(
                f"{name:10}recall@20 {figures['recall@20']:.4f}  capped {figures['capped_recall@20']:.4f}  NDCG@20 {figures['ndcg@20']:.4f}"
            )
        shares = ", ".join(
            "-" if share is None else f"{100 * share:.1f} %" for share in refit["share_of_refit"].values()
        )
        text.append(f"folded-in users have {shares} of the refit's")
    return text
