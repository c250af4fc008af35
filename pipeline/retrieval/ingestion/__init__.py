"""The steps of the ingest stage of retrieval, as plain functions over files: read, ids, merge, core, encode, graphs."""
