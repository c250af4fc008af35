"""The click-through-rate (CTR) task, one file per stage."""
