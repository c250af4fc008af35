"""Ranking and CTR metrics."""
