"""How the ids of each method read the embedding tables, in words, for the reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.maps.methods import METHODS

# Methods whose bucket maps are made from the communities of the cluster stage. The others take the number of rows alone.
COMMUNITY_METHODS = ("graph", "double_graph", "multilevel", "soft", "double_soft", "residual")


def how_ids_read(method: str, indices_per_id: int | None = None) -> str:
    """What an id of a method reads from its table.

    Args:
        method: one of METHODS.
        indices_per_id: as trained; None: unknown, or not the same for all tables.
    """
    summary = METHODS[method].summary
    if indices_per_id is None or not METHODS[method].free_indices:
        return summary
    return f"{summary}: a weighted sum of {indices_per_id} rows"


def use_of_communities(methods: Sequence[str]) -> str:
    """One sentence on what each of some methods takes from the communities."""
    made = [method for method in methods if method in COMMUNITY_METHODS]
    counted = [method for method in methods if method not in COMMUNITY_METHODS and METHODS[method].reads_communities]
    parts = []
    if made:
        parts.append(f"the bucket maps of {listed(made)} are made from these communities")
    if counted:
        parts.append(f"{listed(counted)} {'take' if len(counted) > 1 else 'takes'} the number of rows alone")
    if unread := [method for method in methods if not METHODS[method].reads_communities]:
        parts.append(f"{listed(unread)} {'do' if len(unread) > 1 else 'does'} not use them")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:] if made else text


def listed(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
