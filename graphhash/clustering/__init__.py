"""Modularity clustering of bipartite graphs."""
