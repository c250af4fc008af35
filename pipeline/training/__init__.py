"""The training loop, its Ray Train workers, checkpoints and device speed-ups."""
