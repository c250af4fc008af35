"""Figures: labels that do not overlap."""

from __future__ import annotations

import pytest

from pipeline.reports.figures import spread


def test_labels_keep_their_order_and_distance():
    assert spread([0.5, 0.5, 0.1], 0.2) == pytest.approx([0.5, 0.7, 0.1])
    assert spread([], 1.0) == []


def test_labels_far_apart_do_not_push_each_other():
    assert spread([0.5, 0.5, 0.5], 0.2, at=[0.0, 10.0, 1.0], width=5.0) == pytest.approx([0.5, 0.5, 0.7])
