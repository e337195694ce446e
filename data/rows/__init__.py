"""Rows: the `Example`, table files, and data sets of the Hugging Face hub."""
