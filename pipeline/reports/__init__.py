"""What the report pages of both tasks are made of."""
