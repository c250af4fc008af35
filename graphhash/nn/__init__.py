"""PyTorch layers and optimizers for compressed tables."""
