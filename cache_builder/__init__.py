"""Stage one: a teacher's soft targets in a store, and everything that is done with such a cache."""
