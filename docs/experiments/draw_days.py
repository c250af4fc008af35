"""Splits a log of `graphhash synth --task ctr` for an update: the days before the last one, and two halves of the last one.

    python docs/experiments/draw_days.py log days

Writes `days/train.parquet`, `days/later.parquet` and `days/test.parquet`; `days/both.parquet`, the first two together; and
`days/test-new.parquet`, the rows of the test with a value, in a column that has a partner, that `later` has and `train` lacks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PAIRED = [f"C{number}" for number in range(1, 11)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", help="the folder of the synthetic log")
    parser.add_argument("out", help="a folder")
    args = parser.parse_args()
    table, out = pq.read_table(sorted(Path(args.log).glob("log-*.parquet"))), Path(args.out)
    days = np.array(table["time"]).astype("datetime64[D]")
    last = np.flatnonzero(days == days.max())
    is_later = np.zeros(len(days), bool)
    is_later[np.random.default_rng(0).permutation(last)[: len(last) // 2]] = True
    parts = {"train": days < days.max(), "later": is_later, "test": (days == days.max()) & ~is_later}
    drawn = {name: table.filter(pa.array(rows)) for name, rows in parts.items()}
    drawn["both"] = pa.concat_tables([drawn["train"], drawn["later"]])
    has_new = np.zeros(len(drawn["test"]), bool)
    for name in PAIRED:
        new = np.setdiff1d(drawn["later"][name], drawn["train"][name])
        has_new |= np.isin(drawn["test"][name], new)
    drawn["test-new"] = drawn["test"].filter(pa.array(has_new))
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in drawn.items():
        pq.write_table(rows, out / f"{name}.parquet")
        print(f"{name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
