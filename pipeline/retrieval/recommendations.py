"""The recommendations that a test measures, and its interactions, as parquet files with raw ids, so that other tools can evaluate them.

    recommendations: user_id, item_id, rank (from 1), score
    test interactions: user_id, item_id

Every test user has as many rows as the largest cut-off, or fewer where fewer items are left. Scores are those of the model as shipped, its
tables rounded. Equal scores are in the order of the catalogue, so an outside tool should take the ranks and not sort the scores again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.defaults import precision_of
from pipeline.retrieval.evaluate import ranked_blocks, shipped_model, users_to_rank
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.weights import load_method
from pipeline.storage.atomic import PARTIAL
from pipeline.task import REFIT_PARTS, StageContext


def write_recommendations(context: StageContext, method: str, file: Path) -> int:
    """Rank the catalogue for every test user, as the evaluation does, and write the file. Returns its number of rows.

    Raises:
        DataError: the precision of the export cannot hold a value of a table.
    """
    ingest_dir, k = context.ingest_dir, max(context.config.evaluate.cutoffs)
    model, _, _ = load_method(context.model_dir(method), ingest_dir)
    shipped = shipped_model(model, precision_of(context.config, method), method)
    seen = load_interactions(ingest_dir, REFIT_PARTS)
    tested = users_to_rank(context.config, ShardedCsr.open(ingest_dir / "test").load())
    users, items = _vocabularies(context)
    types = {"user_id": users.ids.type, "item_id": items.ids.type, "rank": pa.int32(), "score": pa.float32()}
    schema = pa.schema(list(types.items()))
    partial, n_rows, start = file.with_name(f".{file.name}{PARTIAL}"), 0, 0
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            for topk, scores in ranked_blocks(shipped, tested, seen, k):
                own = tested[start : start + len(topk)]
                start += len(topk)
                user, slot = np.nonzero(topk >= 0)
                item = topk[user, slot]
                columns = [users.ids.take(pa.array(own[user])), items.ids.take(pa.array(item))]
                columns += [pa.array(slot + 1, pa.int32()), pa.array(scores[user, item], pa.float32())]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                n_rows += len(item)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return n_rows


def write_test_interactions(context: StageContext, file: Path) -> int:
    """Write the interactions of the users that the test ranks. Returns their number."""
    users, items = _vocabularies(context)
    test = ShardedCsr.open(context.ingest_dir / "test").load()
    tested = users_to_rank(context.config, test)
    of_tested, item = test[tested].tocoo().coords
    user = tested[of_tested]
    partial = file.with_name(f".{file.name}{PARTIAL}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        table = pa.table({"user_id": users.ids.take(pa.array(user)), "item_id": items.ids.take(pa.array(item))})
        pq.write_table(table, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return len(user)


def _vocabularies(context: StageContext) -> tuple[Vocabulary, Vocabulary]:
    users, items = (Vocabulary.load(context.ingest_dir / f"{side}.parquet") for side in ("users", "items"))
    return users, items
