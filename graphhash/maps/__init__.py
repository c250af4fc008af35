"""Bucket maps: which rows of a compressed table an id reads."""
