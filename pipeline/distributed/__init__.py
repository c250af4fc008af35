"""Ray sessions, graphs stored in shards, and clustering and maps over Ray tasks."""
