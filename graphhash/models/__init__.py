"""Retrieval and CTR models, losses and samplers in PyTorch."""
