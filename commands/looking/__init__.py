"""Commands that look into caches."""
