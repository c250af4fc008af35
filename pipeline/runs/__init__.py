"""One run: plan, order of stages, run folder, remote copy, jobs."""
