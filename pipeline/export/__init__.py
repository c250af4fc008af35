"""Pieces of ONNX graphs, and publishing of finished bundles."""
