"""Stage two: students trained from a cache; also classifiers and merged models."""
