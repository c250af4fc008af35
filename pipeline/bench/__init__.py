"""Benchmarks of clustering, training and serving on this machine."""
