"""Files: atomic writes, locks and URIs."""
