"""Synthetic interaction logs with planted communities and heavy tails, streamed to parquet.

Every user and every item belongs to one community. A user's activity and an item's popularity fall off as powers of a rank (Zipf). A
user draws each of its items by popularity, with probability 1 - mixing from its own community and else from all items. Pairs are
distinct: drawing is without replacement, by rejection. A user whose community has too few items left takes the rest from all items,
so `mixing` is then a lower bound of the share outside. Users get at least one interaction and at most half of the items, and the log
holds exactly the number of rows asked for; unpopular items of a small log may have none.

`docs/formats.md` (Synthetic logs) lists the files. The communities lie in a folder of their own, so that the output folder can be
read as the log. Users are drawn in blocks with a generator per block, so that memory is bounded (about 40 bytes per user and item,
and 200 MB) and the seed fixes every byte.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from graphhash.errors import ArgumentError
from pipeline.storage.atomic import new_folder, write_json_atomic

BLOCK_EDGES = 1_000_000
ROWS_PER_FILE = 16_000_000
# Exponents of rank: tails like those of published logs, where the top 1 % of items has a tenth to a fifth of
# the interactions.
USER_EXPONENT = 0.6
ITEM_EXPONENT = 0.7
# After so many rounds of rejection a user has used its community up, and after so many the popular items too.
OWN_ROUNDS = 24
UNIFORM_AFTER = 48


@dataclass(frozen=True)
class _Catalogue:
    """Items in order of community.

    Attributes:
        cumulative: running popularity, shape (n_items + 1,), from 0.
        starts: first item of each community and n_items, shape (n_communities + 1,).
    """

    cumulative: NDArray[np.float64]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class _Users:
    """Users in order of their numbers: raw ids, communities and numbers of interactions, shape (n_users,) each."""

    ids: NDArray[np.int64]
    communities: NDArray[np.int32]
    degrees: NDArray[np.int64]


def synth(
    out: Path | str,
    *,
    n_users: int,
    n_items: int,
    n_interactions: int,
    n_communities: int,
    mixing: float,
    seed: int,
) -> dict[str, Any]:
    """Write a log into the folder `out`, replacing one that was written here before.

    Returns: the arguments, n_files and seconds.

    Raises ValueError for sizes that cannot be met, with the bound, or for a folder that holds anything else.
    """
    started = time.perf_counter()
    _check_sizes(n_users, n_items, n_interactions, n_communities, mixing)
    out = Path(out).absolute()
    check_replaceable(out)
    rng = np.random.default_rng([seed, 0])
    user_ids, item_ids = _raw_ids(rng, n_users), _raw_ids(rng, n_items)
    user_community = rng.integers(0, n_communities, n_users, dtype=np.int32)
    item_community = _item_communities(rng, n_items, n_communities)
    activity = rng.permutation(_zipf(n_users, USER_EXPONENT))
    degrees = _degrees(activity, n_interactions, most=max(1, n_items // 2))
    popularity = rng.permutation(_zipf(n_items, ITEM_EXPONENT))
    catalogue = _Catalogue(
        np.concatenate([[0.0], np.cumsum(popularity)]),
        np.searchsorted(item_community, np.arange(n_communities + 1)),
    )

    with new_folder(out) as partial:
        (partial / "communities").mkdir()
        for side, ids, community in (("user", user_ids, user_community), ("item", item_ids, item_community)):
            table = pa.table({f"{side}_id": ids, "community": community})
            pq.write_table(table, partial / "communities" / f"{side}s.parquet")
        users = _Users(user_ids, user_community, degrees)
        n_files = _write_log(partial, users, item_ids, catalogue, mixing, seed)
        result = {
            "n_users": n_users,
            "n_items": n_items,
            "n_interactions": n_interactions,
            "n_communities": n_communities,
            "mixing": mixing,
            "seed": seed,
            "n_files": n_files,
            "seconds": time.perf_counter() - started,
        }
        write_json_atomic(partial / "synth.json", result)
    return result


def check_replaceable(out: Path) -> None:
    """Raise ArgumentError for a folder that holds anything but a synthetic log."""
    if out.exists() and not (out / "synth.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ArgumentError(f"{out} holds something that is no synthetic log; name a new folder")


def _check_sizes(n_users: int, n_items: int, n_interactions: int, n_communities: int, mixing: float) -> None:
    if min(n_users, n_items, n_communities) < 1:
        raise ArgumentError(f"users={n_users}, items={n_items} and communities={n_communities} must be 1 or more")
    if n_communities > n_items:
        raise ArgumentError(f"communities={n_communities} are more than items={n_items}; every community needs an item")
    most = n_users * max(1, n_items // 2)
    if not n_users <= n_interactions <= most:
        raise ArgumentError(
            f"interactions={n_interactions} must be {n_users}..{most}: every user has one at least and "
            "half of the items at most"
        )
    if not 0 <= mixing <= 1:
        raise ArgumentError(f"mixing={mixing} is a share; use 0 to 1")


def _raw_ids(rng: np.random.Generator, n_ids: int) -> NDArray[np.int64]:
    """Distinct ids with gaps, in no order, so that nothing works by taking them for row numbers."""
    ids = 1_000_000_007 + np.cumsum(rng.integers(1, 100, n_ids))
    return rng.permutation(ids)


def _item_communities(rng: np.random.Generator, n_items: int, n_communities: int) -> NDArray[np.int32]:
    """Community of each item, ascending, each at least once; the raw ids are in no order anyway."""
    community = rng.integers(0, n_communities, n_items, dtype=np.int32)
    community[:n_communities] = np.arange(n_communities)
    return np.sort(community)


def _zipf(n: int, exponent: float) -> NDArray[np.float64]:
    return (np.arange(n, dtype=np.float64) + 10.0) ** -exponent


def _degrees(activity: NDArray[np.float64], total: int, most: int) -> NDArray[np.int64]:
    """Interactions per user: 1..most each, `total` together, else in proportion to activity."""
    degrees = np.ones(len(activity), np.int64)
    while (left := total - int(degrees.sum())) > 0:
        open_to_more = np.where(degrees < most, activity, 0.0)
        share = np.cumsum(open_to_more)
        # Rounding the running sum, not each share, hands out exactly what is left.
        steps = np.diff(np.floor(share / share[-1] * left + 1e-9).astype(np.int64), prepend=0)
        degrees = np.minimum(degrees + steps, most)
    return degrees


def _write_log(
    folder: Path,
    users: _Users,
    item_ids: NDArray[np.int64],
    catalogue: _Catalogue,
    mixing: float,
    seed: int,
) -> int:
    """Write the log block by block, a row group each; returns the number of files."""
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64())])
    cumulative = np.cumsum(users.degrees)
    bounds = np.flatnonzero(np.diff((cumulative - 1) // BLOCK_EDGES, prepend=-1, append=np.iinfo(np.int64).max))
    n_files, room = 0, 0
    writer: pq.ParquetWriter | None = None
    bar = tqdm(
        total=int(cumulative[-1]),
        desc="synth",
        unit="row",
        unit_scale=True,
        file=sys.stderr,
        disable=None,
        leave=False,
    )
    try:
        for block, (start, stop) in enumerate(itertools.pairwise(bounds)):
            rng = np.random.default_rng([seed, 1, block])
            block_users = slice(start, stop)
            drawn, items = _draw_block(
                rng, users.degrees[block_users], users.communities[block_users], catalogue, mixing
            )
            if writer is None or room <= 0:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"log-{n_files:05d}.parquet", schema, compression="zstd")
                n_files, room = n_files + 1, ROWS_PER_FILE
            writer.write_table(pa.table([users.ids[start + drawn], item_ids[items]], schema=schema))
            room -= len(drawn)
            bar.update(len(drawn))
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    return n_files


def _draw_block(
    rng: np.random.Generator,
    degrees: NDArray[np.int64],
    community: NDArray[np.int32],
    catalogue: _Catalogue,
    mixing: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct (user, item) pairs of users numbered from 0, degrees[u] of each, in random order."""
    n_items = len(catalogue.cumulative) - 1
    users = np.repeat(np.arange(len(degrees)), degrees)
    own = rng.random(len(users)) >= mixing
    drawn = np.empty(0, np.int64)
    n_rounds = 0
    while len(users):
        if n_rounds == OWN_ROUNDS:
            own[:] = False
        first = np.where(own, catalogue.starts[community[users]], 0)
        last = np.where(own, catalogue.starts[community[users] + 1], n_items)
        if n_rounds < UNIFORM_AFTER:
            low, high = catalogue.cumulative[first], catalogue.cumulative[last]
            place = low + rng.random(len(users)) * (high - low)
            items = np.searchsorted(catalogue.cumulative, place, side="right") - 1
            # Rounding may reach the upper end itself.
            items = np.clip(items, first, last - 1)
        else:
            items = rng.integers(first, last)
        pairs: NDArray[np.int64] = users * n_items + items
        keys, where = np.unique(pairs, return_index=True)
        position: NDArray[np.int64] = np.searchsorted(drawn, keys)
        is_new = np.ones(len(keys), bool)
        inside = position < len(drawn)
        is_new[inside] = drawn[position[inside]] != keys[inside]
        drawn = np.insert(drawn, position[is_new], keys[is_new])
        # What collided is drawn again from the same pool, so that collisions do not change the mixing.
        again = np.ones(len(users), bool)
        again[where[is_new]] = False
        users, own = users[again], own[again]
        n_rounds += 1
    drawn = rng.permutation(drawn)
    return drawn // n_items, drawn % n_items
