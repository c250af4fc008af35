"""Presets of CTR models, and which of their tables a step seldom reads."""

from __future__ import annotations

import pytest

import graphhash
from graphhash.maps.bucket_map import full_map
from graphhash.maps.hashes import modulo_map
from graphhash.models.ctr import HEADS, CtrSpec
from pipeline.ctr.models import CTR_MODELS, CTR_PRESETS, MAP_SETTINGS, seldom_read
from pipeline.maps.methods import METHODS
from tests.helpers import graphs


def test_every_model_has_a_recipe_and_all_methods_the_same_but_for_id_biases():
    assert set(CTR_MODELS) == set(HEADS) == set(CTR_PRESETS)
    for model in CTR_MODELS:
        specs = {method: CTR_PRESETS[model].spec(model, method, seed=3, dropout=0.25, dim=8) for method in METHODS}
        assert {(s.kind, s.seed, s.dropout, s.dim, s.hidden) for s in specs.values()} == {
            (model, 3, 0.25, 8, CTR_PRESETS[model].hidden)
        }
        assert {method for method, s in specs.items() if not s.id_bias} == {"full"}
        assert not CTR_PRESETS[model].spec(model, "soft", seed=0, id_bias=False).id_bias


def test_settings_of_maps_are_those_that_the_maps_take():
    biadjacency, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    labels = graphhash.cluster(biadjacency, rows=150)
    for method, settings in MAP_SETTINGS.items():
        make = {"soft": graphhash.soft_maps, "double_soft": graphhash.double_soft_maps}[method]
        maps = make(biadjacency, labels, **settings, **({"seed": 0} if method == "double_soft" else {}))
        assert maps[0].indices_per_id == settings["indices_per_id"]


@pytest.mark.parametrize("batch_size", [10, 30, 3000])
def test_tables_wait_where_a_batch_reads_few_of_their_rows(batch_size):
    maps = [full_map(50_000), full_map(3), modulo_map(900_000, 2001), full_map(4)]
    model = CtrSpec("widedeep", dim=4, id_bias=True).build(maps, 0, n_multi_valued=1)
    found = seldom_read(model, batch_size, multi_valued_widths=(5,))
    for part in (model.fields, model.wide):
        large, hashed = part.own
        # The small columns lie in one table of 9 rows, and are read six times a row of the log.
        assert part.joint not in found
        assert (large in found) == (batch_size * 8 <= 50_001)
        assert (hashed in found) == (batch_size * 8 <= 2001)
    assert (model.bias.own[0] in found) == (batch_size * 8 <= 900_001)
    expected = {10: 5, 30: 5, 3000: 3}
    assert len(found) == expected[batch_size]
