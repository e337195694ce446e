"""Weights that are not plain files of numbers: checkpoints that are stored quantised, and adapters that are merged."""
