from __future__ import annotations

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from pipeline.bench import ingestion
from pipeline.bench.ingestion import OURS, PEER, IngestionBench, bench, table, write_log


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_logs_of_strings_and_csv_hold_the_same_pairs(format, tmp_path):
    pairs = {}
    for ids in ("integer", "string"):
        write_log(tmp_path / ids, 2000, IngestionBench(2000, ids, format, 1))
        (file,) = (tmp_path / ids).iterdir()
        read = pq.read_table(file) if format == "parquet" else pa_csv.read_csv(file)
        pairs[ids] = list(zip(read["user_id"].to_pylist(), read["item_id"].to_pylist(), strict=True))
    assert pairs["string"] == [(f"user-{user:012}", f"item-{item:012}") for user, item in pairs["integer"]]


def test_programs_find_the_same_edges_in_turns(monkeypatch):
    pytest.importorskip(PEER)

    def here(program, logs, folder, settings):
        run = {OURS: ingestion._run_ours, PEER: ingestion._run_polars}[program]
        return ingestion._measured(run, logs, folder, settings.format)

    monkeypatch.setattr(ingestion, "_in_fresh_process", here)
    ours, peer = bench(IngestionBench(3000, "string", "parquet", 1))
    assert (ours["program"], peer["program"]) == (OURS, PEER)
    assert ours["edges"] == peer["edges"] == 3000
    assert [phase["phase"] for phase in ours["phases"]] == ["read", "cut", "merge", "encode", "build"]
    assert all(phase["peak_mib"] > 0 for phase in (*ours["phases"], *peer["phases"]))
    header, lines = table([ours, peer])
    assert {len(line) for line in lines} == {len(header)}
