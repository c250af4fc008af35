"""What one does with an exported bundle: check, ask, serve, prepare for Triton."""
