"""Build a cache: plan it, estimate its cost, run the teacher over its shards, continue after a stop."""
