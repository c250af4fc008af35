"""Recipes of click-through models, and which of their tables a step seldom reads."""

from __future__ import annotations

import graphs
import pytest

import graphhash
from graphhash.buckets import full_map
from graphhash.ctr import HEADS, CtrSpec
from graphhash.hashes import modulo_map
from pipeline.ctr_models import CTR_MODELS, CTR_RECIPES, MAP_SETTINGS, METHOD_CLASSES, method_class, recipe_of, seldom_read
from pipeline.methods import METHODS


def test_every_model_has_a_recipe_for_every_method():
    assert set(CTR_MODELS) == set(HEADS)
    assert set(CTR_RECIPES) == {(model, group) for model in CTR_MODELS for group in METHOD_CLASSES}
    assert {method_class(method) for method in METHODS} == set(METHOD_CLASSES)
    assert method_class("double_frequency") == "hash" and method_class("double_graph") == "graph"
    for model in CTR_MODELS:
        for method in METHODS:
            recipe = recipe_of(model, method)
            spec = recipe.spec(model, seed=3, dropout=0.25)
            assert (spec.kind, spec.seed, spec.dropout, spec.hidden) == (model, 3, 0.25, recipe.hidden)


def test_settings_of_maps_are_those_that_the_maps_take():
    biadjacency, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    labels = graphhash.cluster(biadjacency, rows=150)
    for method, settings in MAP_SETTINGS.items():
        make = {"soft": graphhash.soft_maps, "double_soft": graphhash.double_soft_maps}[method]
        maps = make(biadjacency, labels, **settings, **({"seed": 0} if method == "double_soft" else {}))
        assert maps[0].n_lookups == settings["n_lookups"]


@pytest.mark.parametrize("batch_size", [10, 30, 3000])
def test_tables_wait_where_a_batch_reads_few_of_their_rows(batch_size):
    maps = [full_map(50_000), full_map(3), modulo_map(900_000, 2001), full_map(4)]
    model = CtrSpec("widedeep", dim=4, id_bias=True).build(maps, 0, n_bags=1)
    found = seldom_read(model, batch_size, bag_widths=(5,))
    for part in (model.fields, model.wide):
        large, hashed = part.own
        # The small columns lie in one table of 9 rows, and are read six times a row of the log.
        assert part.joint not in found
        assert (large in found) == (batch_size * 8 <= 50_001)
        assert (hashed in found) == (batch_size * 8 <= 2001)
    assert (model.bias.own[0] in found) == (batch_size * 8 <= 900_001)
    expected = {10: 5, 30: 5, 3000: 3}
    assert len(found) == expected[batch_size]
