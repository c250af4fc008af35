"""Fold-in of new users and items into a finished run, without training."""
