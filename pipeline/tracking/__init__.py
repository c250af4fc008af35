"""MLflow: runs, the offline queue, the model registry."""
