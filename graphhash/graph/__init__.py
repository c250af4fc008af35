"""Bipartite graphs, vocabularies of raw ids, and their kernels."""
