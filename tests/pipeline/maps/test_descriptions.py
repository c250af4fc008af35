"""Methods in words."""

from __future__ import annotations

from pipeline.maps.descriptions import COMMUNITY_METHODS, how_ids_read, listed, use_of_communities
from pipeline.maps.methods import METHODS


def test_every_method_has_a_description():
    assert set(COMMUNITY_METHODS) <= set(METHODS)
    assert all(how_ids_read(method) for method in METHODS)


def test_the_number_of_rows_is_said_where_it_is_a_setting():
    assert how_ids_read("soft", 7).endswith("a weighted sum of 7 rows")
    assert how_ids_read("graph", 1) == METHODS["graph"].summary


def test_use_of_communities_names_each_method_once():
    text = use_of_communities(["soft", "graph", "modulo", "double", "full"])
    assert text == (
        "The bucket maps of soft and graph are made from these communities; modulo and double take the number of rows alone; "
        "full does not use them."
    )
    assert use_of_communities(["full"]) == "full does not use them."


def test_lists_read_as_english():
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
