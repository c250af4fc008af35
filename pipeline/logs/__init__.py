"""Reading interaction logs of any format."""
