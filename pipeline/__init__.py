"""The run: Ray, disk, tracking and the command line."""
