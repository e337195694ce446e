"""Texts in an object store: which objects a spec names, and their bytes piece by piece."""
