"""The space of a search: how it is written, what is refused, and what it is by default."""

from __future__ import annotations

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.sweeps.space import Range, default_point, default_space, parse_space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.01..0.1", ("train.lr", Range(0.01, 0.1))),
        ("train.weight_decay = 0..1e-5", ("train.weight_decay", Range(0.0, 1e-5))),
        ("map.indices_per_id=4..16", ("map.indices_per_id", Range(4, 16, whole=True))),
        ("map.hops=1,1+2", ("map.hops", ("1", "1+2"))),
        ("map.item_bias=true,false", ("map.item_bias", (True, False))),
        ("train.lr=0.05", ("train.lr", (0.05,))),
        ("cluster.method=louvain, leiden", ("cluster.method", ("louvain", "leiden"))),
    ],
)
def test_a_space_is_read_as_its_settings_are(text, expected):
    assert parse_space(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "write section.key=a,b,c or section.key=low..high"),
        ("train.lrr=1,2", "did you mean train.lr"),
        ("train.lr=1..x", "train.lr='x' is not a number"),
        ("train.lr=1..0.1", "is empty: 1 is not below 0.1"),
        ("train.lr=1..2..3", "more than two ends"),
        ("cluster.method=a..b", "has no range"),
        ("data.validation=0.1,0.2", "changes what is measured"),
        ("train.eval_users=10,20", "changes what is measured"),
        ("train.seed=0..9", "changes what is measured"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_space(text)


@pytest.mark.parametrize(("method", "hops"), [("soft", True), ("double_soft", True), ("graph", False), ("full", False)])
def test_the_default_space_lies_around_the_methods_own_settings(method, hops):
    base = RunConfig.from_flat({"run.methods": (method,), "cluster.ratio": 0.5, "train.loss": "bpr"})
    space = default_space(base)
    assert ("map.hops" in space) == hops
    point = default_point(base, space | {"map.indices_per_id": Range(1, 3, whole=True)})
    assert set(point) == set(space)
    assert space["train.lr"].low < point["train.lr"] < space["train.lr"].high
    # What depends on the graph, or lies outside of its range, is left to the sampler.
    assert "map.indices_per_id" not in point
    by_rows = RunConfig.from_flat({"run.methods": ("soft",), "cluster.rows": 50, "map.indices_per_id": 2})
    assert default_point(by_rows, {"map.indices_per_id": Range(1, 3, whole=True)}) == {"map.indices_per_id": 2}
