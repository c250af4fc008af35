"""Writes random subsamples of named CTR data sets as parquet, with their schemas as TOML, so that presets can be tried on small logs.

    python docs/experiments/make_subsamples.py frappe ml-1m avazu-sample hour --out sub

writes sub/frappe-1000.parquet, sub/frappe-10000.parquet, ..., and sub/frappe.toml. Sets are read as by `graphhash run --task ctr`, and
Frappe's negatives are drawn first. `hour` is a made-up log whose label depends on the hour alone: sub/hour-10000.parquet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.run_config import DataConfig
from pipeline.ctr.log import open_log
from pipeline.ctr.schema import TIME_PARTS, Category, CtrSchema


def as_toml(schema: CtrSchema) -> str:
    """A schema as `pipeline.ctr.schema.read_schema` reads it."""
    lines = [f'label = "{schema.label}"']
    lines += [] if schema.label_from is None else [f"label_from = {schema.label_from:g}"]
    lines += [f'group = "{schema.group}"'] if schema.group else []
    lines += [f"categorical = {[column.name for column in schema.categories]}".replace("'", '"')]
    for column in schema.categories:
        lines += [f"[columns.{column.name}]", f'kind = "{column.kind}"', f'compress = "{column.compress}"']
        lines += [f'partner = "{column.partner}"'] if column.partner else []
    for feature in schema.multi_valued:
        lines += [f"[multi_valued.{feature.name}]", f'separator = "{feature.separator}"', f'kind = "{feature.kind}"']
    lines += ["[times]"] if schema.times else []
    lines += [f'{name} = "{form}"' for name, form in schema.times]
    return "\n".join(lines) + "\n"


HOUR_SCHEMA = CtrSchema(
    "click",
    (
        Category("user_id", kind="int64", partner="item_id"),
        Category("item_id", kind="int64", partner="user_id"),
        Category("hour", kind="int64"),
    ),
)


def hour_log(n_rows: int = 10_000) -> pa.Table:
    """A log of random users and items whose label is 1 with probability .9 from 8 to 19 o'clock, and .1 otherwise."""
    rng = np.random.default_rng(0)
    hours = rng.integers(0, 24, n_rows)
    click = (rng.random(n_rows) < np.where((hours >= 8) & (hours < 20), 0.9, 0.1)).astype(int)
    users, items = rng.integers(0, 200, n_rows), rng.integers(0, 150, n_rows)
    return pa.table({"click": click, "user_id": users, "item_id": items, "hour": hours})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders of named data sets, or hour")
    parser.add_argument("--out", default="sub")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for data in args.data:
        if data == "hour":
            pq.write_table(hour_log(), out / "hour-10000.parquet")
            (out / "hour.toml").write_text(as_toml(HOUR_SCHEMA), encoding="utf-8")
            continue
        log, name = open_log(DataConfig(data)), Path(data).name
        (out / f"{name}.toml").write_text(as_toml(log.schema), encoding="utf-8")
        made = {f"{time}_{part}" for time, _ in log.schema.times for part in TIME_PARTS}
        columns = [column for column in log.schema.names if column not in made]
        whole = pa.concat_tables([pa.table({c: rows.columns[c] for c in columns}) for rows in log.rows(0)])
        for n_rows in args.rows:
            chosen = np.sort(np.random.default_rng(1).permutation(len(whole))[:n_rows])
            pq.write_table(whole.take(pa.array(chosen)), out / f"{name}-{n_rows}.parquet")


if __name__ == "__main__":
    main()
