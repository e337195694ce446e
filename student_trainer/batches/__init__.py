"""From a cache to batches in the student's own tokens."""
