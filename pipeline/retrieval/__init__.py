"""The retrieval task, one file per stage."""
