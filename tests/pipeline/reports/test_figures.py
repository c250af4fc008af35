"""Figures: labels that do not overlap."""

from __future__ import annotations

import pytest

from pipeline.reports.figures import spaced, spread


def test_labels_keep_their_order_and_distance():
    assert spread([0.5, 0.5, 0.1], 0.2) == pytest.approx([0.5, 0.7, 0.1])
    assert spread([], 1.0) == []


def test_labels_far_apart_do_not_push_each_other():
    assert spread([0.5, 0.5, 0.5], 0.2, at=[0.0, 10.0, 1.0], width=5.0) == pytest.approx([0.5, 0.5, 0.7])


def test_names_are_as_near_to_their_values_as_their_distance_allows():
    assert spaced([0.5, 0.1], 0.2, 0.0, 1.0) == [0.5, 0.1]
    # Two that are too close share the way.
    assert spaced([0.5, 0.5, 0.9], 0.2, 0.0, 1.0) == pytest.approx([0.4, 0.6, 0.9])
    assert spaced([0.0, 1.0, 0.0], 0.2, 0.0, 1.0) == pytest.approx([0.0, 1.0, 0.2])
    # There is no room for their distance.
    assert spaced([0.3] * 5, 0.5, 0.0, 1.0) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
