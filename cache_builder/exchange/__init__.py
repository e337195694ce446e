"""Caches from elsewhere, and caches for elsewhere: files of log-probabilities that others have written or can read."""
